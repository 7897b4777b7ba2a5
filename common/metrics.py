"""Metrics as sums, so that what a federation measures is what a sum over sites can say.

Rules:
  * Each metric turns the outcomes of cases into a float64 vector (`sums`) that adds up over sites, and that vector into
    a value (`value`). No metric needs one site's numbers apart from another's.
  * `exact` is the same metric from the cases themselves, for who holds them: a site, or a simulation.
  * `interval` is the 95 % interval of the value, from the same sums (:mod:`locum.common.intervals`).
  * A value that does not exist (an AUC with one class only) is None, never 0 or 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from locum.common.intervals import Interval, Moments, auc_error, logit, student, wilson

Floats = NDArray[np.float64]
Value = float | list[list[float]] | None

_BINS = 1024
_LOGIT_RANGE, _FINENESS = 16.0, 8.0
#: Bins that count as one where noise is added: 32 groups.
_GROUP = 32
#: Bins over the logit of a score, ever finer towards 0: early in training all scores lie close together.
_EDGES = _LOGIT_RANGE * np.sinh(np.linspace(-_FINENESS, _FINENESS, _BINS + 1)) / np.sinh(_FINENESS)


@dataclass(frozen=True)
class Outcomes:
    """What a model said of n cases, and the truth.

    Attributes:
        patients: patient of each case (n).
        labels: true class of each case (n); empty in segmentation.
        scores: probability of each class (n × classes); empty in segmentation.
        dice: Dice of each foreground class (n × (classes − 1)), NaN where truth and prediction are both empty.
        surface: average symmetric surface distance in mm (n × (classes − 1)), NaN where it does not exist.
    """

    patients: tuple[str, ...]
    labels: NDArray[np.int64]
    scores: Floats
    dice: Floats
    surface: Floats

    def take(self, rows: NDArray[np.intp]) -> Outcomes:
        """The outcomes of some cases, repeats allowed."""
        classified = len(self.labels) > 0
        return Outcomes(
            tuple(self.patients[row] for row in rows),
            self.labels[rows] if classified else self.labels,
            self.scores[rows] if classified else self.scores,
            self.dice if classified else self.dice[rows],
            self.surface if classified else self.surface[rows],
        )


def join(parts: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of several sites, one after the other."""
    return Outcomes(
        tuple(patient for part in parts for patient in part.patients),
        np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)]),
        _stack([part.scores for part in parts]),
        _stack([part.dice for part in parts]),
        _stack([part.surface for part in parts]),
    )


def _stack(parts: Sequence[Floats]) -> Floats:
    """Rows one below the other; parts without rows may have any width."""
    return np.concatenate([part for part in parts if len(part)] or [np.zeros((0, 0))])


@dataclass(frozen=True)
class Metric:
    """One metric; see the module's rules.

    `better` is +1 where more is better, −1 where less is. `scalar` is false where the value is a matrix. `interval`
    gives the 95 % interval of the value of sums, by the `method` that it is known by; None where there is none.

    For differential privacy: `bound` is the largest L2 norm that the sums of one case can have, None where there is
    none. `merge` says to which place of the sums each place is moved before noise is added, so that there are fewer
    to hide; a value can be had of such sums as of any others.
    """

    name: str
    sums: Callable[[Outcomes, int], Floats]
    value: Callable[[Floats, int], Value]
    exact: Callable[[Outcomes, int], Value]
    better: int = 1
    unit: str = ""
    scalar: bool = True
    interval: Callable[[Floats, int], Interval | None] | None = None
    method: str = ""
    bound: Callable[[int], float] | None = None
    merge: Callable[[int], NDArray[np.intp]] | None = None

    def length(self, classes: int) -> int:
        """How many numbers its sums have."""
        return len(self.sums(_NOTHING, classes))


_NOTHING = Outcomes((), np.zeros(0, np.int64), *(np.zeros((0, 0)) for _ in range(3)))


def area_under_curve(positive: Floats, negative: Floats) -> float | None:
    """Area under the ROC curve as the Mann–Whitney statistic (Hanley & McNeil, Radiology 1982)."""
    if len(positive) == 0 or len(negative) == 0:
        return None
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.mean() / (2 * len(negative)))


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of values that exist; None when one of them does not."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _auc_classes(classes: int) -> range:
    return range(1, 2) if classes == 2 else range(classes)


def _auc_exact(outcomes: Outcomes, classes: int) -> float | None:
    if len(outcomes.labels) == 0:
        return None
    areas = [
        area_under_curve(outcomes.scores[outcomes.labels == c, c], outcomes.scores[outcomes.labels != c, c])
        for c in _auc_classes(classes)
    ]
    return _mean(areas)


def _auc_sums(outcomes: Outcomes, classes: int) -> Floats:
    """Histograms of logits: class × (others, class) × bins. Within a bin, scores count as tied."""
    sums = np.zeros((classes, 2, _BINS))
    for c in _auc_classes(classes) if len(outcomes.labels) else ():
        p = np.clip(outcomes.scores[:, c], 1e-7, 1 - 1e-7)
        logits = np.clip(np.log(p) - np.log1p(-p), -_LOGIT_RANGE, _LOGIT_RANGE)
        for member in (0, 1):
            sums[c, member] = np.histogram(logits[(outcomes.labels == c) == bool(member)], _EDGES)[0]
    return sums.ravel()


def _auc_value(sums: Floats, classes: int) -> float | None:
    histograms = sums.reshape(classes, 2, _BINS)
    return _mean([_auc_of_histograms(*histograms[c]) for c in _auc_classes(classes)])


def _auc_of_histograms(negative: Floats, positive: Floats) -> float | None:
    pairs = negative.sum() * positive.sum()
    if pairs == 0:
        return None
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / pairs)


def _auc_interval(sums: Floats, classes: int) -> Interval | None:
    histograms = sums.reshape(classes, 2, _BINS)
    error = _mean([auc_error(*histograms[c]) for c in _auc_classes(classes)])
    area = _auc_value(sums, classes)
    return None if error is None or area is None else logit(area, error)


def _auc_bound(classes: int) -> float:
    """A case counts once in each histogram pair."""
    return math.sqrt(len(_auc_classes(classes)))


def _auc_merge(classes: int) -> NDArray[np.intp]:
    """Each bin's place in the middle of its group of bins: noise in a thousand bins would leave no area."""
    places = np.arange(classes * 2 * _BINS)
    return places - places % _GROUP + _GROUP // 2


def _confusion_sums(outcomes: Outcomes, classes: int) -> Floats:
    matrix = np.zeros((classes, classes))
    if len(outcomes.labels):
        np.add.at(matrix, (outcomes.labels, outcomes.scores.argmax(axis=1)), 1)
    return matrix.ravel()


def _one(_classes: int) -> float:
    """A case counts in one place."""
    return 1.0


def _confusion_value(sums: Floats, classes: int) -> Value:
    """Rows are truth, columns are prediction, in cases."""
    return [[float(count) for count in row] for row in sums.reshape(classes, classes)]


def _accuracy_value(sums: Floats, classes: int) -> float | None:
    matrix = sums.reshape(classes, classes)
    return float(np.trace(matrix) / matrix.sum()) if matrix.sum() else None


def _accuracy_interval(sums: Floats, classes: int) -> Interval | None:
    matrix = sums.reshape(classes, classes)
    return wilson(float(np.trace(matrix)), float(matrix.sum()))


def moment_sums(values: Floats, columns: int) -> Floats:
    """Sum, count and sum of squares of each column's values that exist, columns × 3."""
    if len(values) == 0:
        return np.zeros(columns * 3)
    known = np.isfinite(values)
    numbers = np.where(known, values, 0)
    return np.stack([numbers.sum(axis=0), known.sum(axis=0), (numbers**2).sum(axis=0)], axis=1).ravel()


def moments_of(sums: Floats) -> list[Moments]:
    """What :func:`moment_sums` tells of each column that has a value."""
    return [
        Moments(float(count), float(total), float(squares)) for total, count, squares in sums.reshape(-1, 3) if count
    ]


def mean_of_means(sums: Floats, _classes: int) -> float | None:
    """The mean over the columns of their means; a column without a value does not count."""
    return _mean([each.mean for each in moments_of(sums)])


def _share_interval(sums: Floats, _classes: int) -> Interval | None:
    return student(moments_of(sums), most=1.0)


def _length_interval(sums: Floats, _classes: int) -> Interval | None:
    return student(moments_of(sums))


def from_sums(
    sums: Callable[[Outcomes, int], Floats], value: Callable[[Floats, int], Value]
) -> Callable[[Outcomes, int], Value]:
    """The value of a metric of which its sums tell everything, from the cases."""
    return lambda outcomes, classes: value(sums(outcomes, classes), classes)


def _dice_sums(outcomes: Outcomes, classes: int) -> Floats:
    return moment_sums(outcomes.dice, classes - 1)


def _dice_bound(classes: int) -> float:
    """A Dice, a count and a square of each foreground class, none above one."""
    return math.sqrt(3 * (classes - 1))


def _surface_sums(outcomes: Outcomes, classes: int) -> Floats:
    return moment_sums(outcomes.surface, classes - 1)


_STUDENT = "Student's t over cases"

auc = Metric("AUC", _auc_sums, _auc_value, _auc_exact, interval=_auc_interval,
             method="DeLong 1988, on the logit scale", bound=_auc_bound, merge=_auc_merge)  # fmt: skip
accuracy = Metric("accuracy", _confusion_sums, _accuracy_value, from_sums(_confusion_sums, _accuracy_value),
                  interval=_accuracy_interval, method="Wilson 1927", bound=_one)  # fmt: skip
confusion = Metric("confusion", _confusion_sums, _confusion_value, from_sums(_confusion_sums, _confusion_value),
                   scalar=False, bound=_one)  # fmt: skip
dice = Metric("Dice", _dice_sums, mean_of_means, from_sums(_dice_sums, mean_of_means),
              interval=_share_interval, method=_STUDENT, bound=_dice_bound)  # fmt: skip
surface_distance = Metric(
    "surface_distance", _surface_sums, mean_of_means, from_sums(_surface_sums, mean_of_means), -1, "mm",
    interval=_length_interval, method=_STUDENT,
)  # fmt: skip


def bootstrap(
    metric: Metric, outcomes: Outcomes, classes: int, *, rng: np.random.Generator, draws: int = 1000
) -> tuple[float, float] | None:
    """The 95 % percentile interval of a scalar metric, resampling patients (Efron & Tibshirani 1993, ch. 13).

    Returns:
        (low, high), or None when the metric does not exist in half of the draws.
    """
    order = np.argsort(np.array(outcomes.patients), kind="stable")
    names = np.array(outcomes.patients)[order]
    groups = np.split(order, np.flatnonzero(names[1:] != names[:-1]) + 1) if len(order) else []
    values = []
    for _ in range(draws if groups else 0):
        chosen = rng.integers(len(groups), size=len(groups))
        value = metric.exact(outcomes.take(np.concatenate([groups[c] for c in chosen])), classes)
        if isinstance(value, float):
            values.append(value)
    if len(values) < draws / 2 or not values:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
