"""Membership inference: can the model's loss tell who it was trained on?

The attack is the threshold on the loss of Yeom et al., CSF 2018: a patient whose loss is low is called a member. It is
told as the area under its ROC curve, and as the share of members that it finds at few false alarms (Carlini et al.,
IEEE S&P 2022): an attack that is right of a few patients and guesses of all others has an area near 0.5.

Rules:
  * The unit is the patient: its loss is the mean over its cases.
  * Members are the patients of the training fold, others those of the validation and test folds of the same site.
  * What does not exist (nobody on one side) is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from locum.common.metrics import Floats, Outcomes, area_under_curve

#: How words begin that tell of a fault.
FAILED = "FAILED"
#: The false alarm rates at which the share of members found is told.
FALSE_ALARMS = (0.01, 0.1)
#: The least probability that a loss is taken of: float32 has nothing between it and 0.
_LEAST = 1e-30
_SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval: percentile bootstrap over patients, members and others apart."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} (95 % interval {self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Attack:
    """How far the loss of a model tells members from others.

    Attributes:
        members: patients of the training fold.
        others: patients of the validation and test folds.
        auc: area under the ROC curve; 0.5 is what a guess has.
        found: share of members found, at each rate of :data:`FALSE_ALARMS`.
    """

    members: int
    others: int
    auc: Estimate
    found: tuple[Estimate, ...]


def patient_losses(outcomes: Outcomes) -> Floats:
    """The loss of each patient: the mean cross entropy of its cases, or the mean of 1 − Dice in segmentation.

    A case without a Dice, for neither truth nor model has a foreground, is one without loss: 0.
    """
    whose = np.unique(outcomes.patients, return_inverse=True)[1]
    return np.asarray(np.bincount(whose, weights=_case_losses(outcomes)) / np.bincount(whose))


def _case_losses(outcomes: Outcomes) -> Floats:
    if len(outcomes.labels):
        chances = outcomes.scores[np.arange(len(outcomes.labels)), outcomes.labels]
        return np.asarray(-np.log(np.maximum(chances, _LEAST)))
    return np.asarray(np.nan_to_num(1 - outcomes.dice).mean(axis=1))


def attack(members: Floats, others: Floats, *, draws: int = 1000) -> Attack | None:
    """The attack on losses of patients; None without members or without others."""
    if not len(members) or not len(others):
        return None
    rng = np.random.default_rng(_SEED)
    drawn = np.array([_measured(rng.choice(members, len(members)), rng.choice(others, len(others)))
                      for _ in range(draws)])  # fmt: skip
    lows, highs = np.percentile(drawn, [2.5, 97.5], axis=0)
    auc, *found = (
        Estimate(value, float(low), float(high))
        for value, low, high in zip(_measured(members, others), lows, highs, strict=True)
    )
    return Attack(len(members), len(others), auc, tuple(found))


def _measured(members: Floats, others: Floats) -> Sequence[float]:
    ordered = np.sort(others)
    area = area_under_curve(-members, -others) or 0.0  # neither side is empty
    return [area, *(_found(members, ordered, rate) for rate in FALSE_ALARMS)]


def _found(members: Floats, ordered: Floats, rate: float) -> float:
    """The share of members below the threshold under which at most `rate` of the others lie."""
    return float(np.mean(members < ordered[int(rate * len(ordered))]))
