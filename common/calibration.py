"""Calibration: whether of the cases that a model calls 80 % likely about 80 % are so. Metrics of sums, as all are.

With two classes it is of the probability of the second one; with more, of the most probable class (confidence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from locum.common.intervals import Interval, student, wilson
from locum.common.metrics import (
    Floats,
    Metric,
    Outcomes,
    Value,
    from_sums,
    mean_of_means,
    moment_sums,
    moments_of,
)

BINS = 10


def _bins(outcomes: Outcomes, classes: int) -> Floats:
    """Of each bin of equal width: cases, the sum of their probabilities, and those where the class is the true one."""
    sums = np.zeros((BINS, 3))
    if len(outcomes.labels):
        chosen = np.ones(len(outcomes.labels), np.int64) if classes == 2 else outcomes.scores.argmax(axis=1)
        chance = outcomes.scores[np.arange(len(chosen)), chosen]
        rows = np.minimum((chance * BINS).astype(np.int64), BINS - 1)
        np.add.at(sums, rows, np.stack([np.ones(len(chosen)), chance, outcomes.labels == chosen], axis=1))
    return sums.ravel()


def _bins_bound(_classes: int) -> float:
    """A case, its probability and its event, none above one."""
    return math.sqrt(3)


def _table(sums: Floats, _classes: int) -> Value:
    rows = sums.reshape(BINS, 3)
    return rows.tolist() if rows[:, 0].sum() > 0 else None


def _error(sums: Floats, _classes: int) -> float | None:
    """Expected calibration error: the mean of |share − mean probability| over the bins, by cases."""
    cases, chances, events = sums.reshape(-1, 3).T
    return float(np.abs(events - chances).sum() / cases.sum()) if cases.sum() > 0 else None


def _squares(outcomes: Outcomes, classes: int) -> Floats:
    """The squared error of the probabilities of each case: of the second class, or of all where there are more."""
    if len(outcomes.labels) == 0:
        return moment_sums(np.zeros((0, 1)), 1)
    errors = outcomes.scores - np.eye(classes)[outcomes.labels]
    chosen = errors[:, 1:] if classes == 2 else errors
    return moment_sums((chosen**2).sum(axis=1, keepdims=True), 1)


def _squares_bound(classes: int) -> float:
    """An error, a count and a square; an error is at most 1 with two classes, 2 with more."""
    return math.sqrt(3) if classes == 2 else math.sqrt(21)


def _squares_interval(sums: Floats, classes: int) -> Interval | None:
    return student(moments_of(sums), most=1.0 if classes == 2 else 2.0)


#: The reliability table: BINS × (cases, sum of probabilities, cases of the class).
calibration = Metric("calibration", _bins, _table, from_sums(_bins, _table), scalar=False, bound=_bins_bound)
#: Naeini, Cooper & Hauskrecht, AAAI 2015; with more than two classes as Guo et al., ICML 2017. It has no interval.
ece = Metric("ECE", _bins, _error, from_sums(_bins, _error), -1, bound=_bins_bound)
#: Brier, Monthly Weather Review 1950; with two classes half of what he defined, as is the use.
brier = Metric("Brier", _squares, mean_of_means, from_sums(_squares, mean_of_means), -1,
               interval=_squares_interval, method="Student's t over cases", bound=_squares_bound)  # fmt: skip


@dataclass(frozen=True)
class Reliability:
    """One bin of a reliability table.

    Attributes:
        low: where the bin begins; `high` where it ends.
        cases: in it.
        chance: the mean probability that the model gives them; None where there is no case.
        share: of them that are of the class; None where there is no case.
        interval: of the share, 95 % (Wilson).
    """

    low: float
    high: float
    cases: int
    chance: float | None
    share: float | None
    interval: Interval | None


def reliability(table: Sequence[Sequence[float]]) -> list[Reliability]:
    """The bins of a table, the value of :data:`calibration`; with noise in it, its numbers can be below 0."""
    return [
        Reliability(
            place / len(table),
            (place + 1) / len(table),
            round(cases),
            chances / cases if cases > 0 else None,
            events / cases if cases > 0 else None,
            wilson(events, cases),
        )
        for place, (cases, chances, events) in enumerate(table)
    ]


def error_of(table: Sequence[Sequence[float]]) -> float | None:
    """The expected calibration error of a table, the value of :data:`calibration`."""
    return _error(np.array(table, np.float64), 0)
