"""What is remembered of a run: a record per committed round, and the events a person follows.

`events.jsonl` in the run's folder is what a live view reads; it is not the audit log.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from locum.common.blobs import DISK_FULL

Number = float | list[list[float]] | None
Bounds = tuple[float, float]


class CellRecord(BaseModel):
    """Metrics over the cases of one value of a subgroup; what a site has too few of is in `other`.

    Attributes:
        by: what tells the cases apart.
        value: as the plan has it, or `other`.
        cases: of all sites, if that is told.
        overall: the metrics; None where there is no case.
        intervals: of the metrics that have one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str
    value: str
    cases: int | None
    overall: dict[str, Number]
    intervals: dict[str, Bounds] = {}


class Evaluated(BaseModel):
    """Metric values of a model on one fold: over all sites by their sums, and of each site that told its own.

    `sites` are those in the sums, `total` is their number of cases, if that is told. `excluded` names the sites without
    numbers, with the reason; `silent` those of them that did not answer at all. `intervals` are those of 95 % that the
    sums tell, `site_intervals` those of each site that told its own; `cells` are the plan's subgroups.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    round: int
    fold: str
    overall: dict[str, Number]
    per_site: dict[str, dict[str, Number]]
    cases: dict[str, int | None]
    sites: tuple[str, ...] = ()
    total: int | None = None
    excluded: dict[str, str] = {}
    silent: tuple[str, ...] = ()
    intervals: dict[str, Bounds] = {}
    site_intervals: dict[str, dict[str, Bounds]] = {}
    cells: tuple[CellRecord, ...] = ()


class SecureRecord(BaseModel):
    """What a secure sum was: the digests of its roster and context, and of each survivor's signed header.

    `sites` is how many sites the roster has, `threshold` how many of them had to answer, `total` the SHA-256 of the
    unmasked sum of the updates (little-endian ring elements), `noise` the standard deviation of the sites' noise in a
    coordinate of the mean update, 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    roster: str
    context: str
    sites: int
    threshold: int
    uploads: dict[str, str]
    total: str | None = None
    noise: float = 0.0


class RoundRecord(BaseModel):
    """A committed round: who took part, who did not and why, what is known of it, and what it cost.

    Attributes:
        start: the round whose model it started from, if that is not the one before.
        sites: those whose updates are in the sum.
        weight: Σ w over them.
        loss: the mean training loss over the sites that released theirs, by weight.
        model_sha256: of the committed model's file.
        weights: of each site that told its own; `losses` and `train_seconds` likewise.
        epsilon: of each site that has signed what it has spent of its patients' privacy by now, in this run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    round: int
    attempt: int
    start: int | None = None
    sites: tuple[str, ...]
    weight: float
    loss: float | None
    weights: dict[str, float]
    losses: dict[str, float | None]
    train_seconds: dict[str, float]
    excluded: dict[str, str]
    update_norm: float
    bytes_down: int
    bytes_up: int
    seconds: float
    model_sha256: str = ""
    secured: SecureRecord | None = None
    evaluation: Evaluated | None = None
    epsilon: dict[str, float] = {}


class RunSummary(BaseModel):
    """The end of a run, `run.json`: whose model it is, how it does on the test folds, who was lost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: str
    round: int
    sites: tuple[str, ...]
    excluded: dict[str, str]
    lost: dict[str, list[int]]
    test: Evaluated
    history: tuple[RoundRecord, ...]


class Events:
    """Appends events to a file, one JSON line each, for a live view."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)

    def emit(self, kind: str, **fields: Any) -> None:
        """Writes one event with the time (seconds since 1970); one that finds no room on the disk is lost."""
        try:
            self._file.write(json.dumps({"at": time.time(), "event": kind, **fields}).encode() + b"\n")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
