"""What several readers say together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def majority(labels: Sequence[str]) -> str | None:
    """The label that more than half of the readers give; None if there is none."""
    label, number = Counter(labels).most_common(1)[0]
    return label if 2 * number > len(labels) else None
