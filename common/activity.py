"""What an agent can be doing, as it tells the coordinator and as people are told."""

from __future__ import annotations

from typing import Literal

Activity = Literal["idle", "describing", "training", "evaluating", "uploading", "downloading", "delivering"]

#: The activities in which `done` and `total` count bytes.
COUNTED: frozenset[Activity] = frozenset({"uploading", "downloading"})
