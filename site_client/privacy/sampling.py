"""Poisson sampling of patients: each takes part in a step by itself, with the same probability.

Rules:
  * The unit is the patient. One with fifty images is drawn no more often than one with a single image.
  * Who is drawn comes from the operating system's entropy and stays at the site: privacy is amplified only while
    nobody can tell who took part.
  * How often and how many steps follow from the plan and the number of patients alone, so that the ledger and the
    worker agree.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from locum.common.plan import Plan
from locum.common.secagg.masks import SEED_BYTES, Stream

#: Numbers that one piece of a stream has, at most.
_PIECE = 1 << 16


def rate_of(plan: Plan, patients: int) -> float:
    """q, the probability that a patient takes part in a step: `batch_size` of them are expected."""
    return min(1.0, plan.training.batch_size / patients) if patients else 1.0


def steps_of(plan: Plan, rate: float) -> int:
    """Steps of one private round: `local_steps`, or as many as pass over all patients `local_epochs` times."""
    training = plan.training
    if training.local_steps is not None:
        return training.local_steps
    return (training.local_epochs or 1) * math.ceil(1 / rate - 1e-9)  # 1 / (B/N) may lie just above N/B


@dataclass
class PoissonSampler:
    """Draws patients, and of each some images.

    Attributes:
        patients: the cases of each patient, as positions in a dataset.
        rate: q, the probability of each patient in each draw.
        images: the most images of a patient in one draw.
    """

    patients: Sequence[Sequence[int]]
    rate: float
    images: int = 1
    _stream: Stream = field(default_factory=lambda: Stream(os.urandom(SEED_BYTES)), repr=False)

    def draw(self) -> list[list[int]]:
        """The patients of one step, each as the cases that were drawn of it; often fewer or more than expected."""
        drawn = np.flatnonzero(self._uniform(len(self.patients)) < self.rate)
        return [self._some(self.patients[patient]) for patient in drawn.tolist()]

    def _some(self, cases: Sequence[int]) -> list[int]:
        if len(cases) <= self.images:
            return list(cases)
        chosen = np.argsort(self._uniform(len(cases)))[: self.images].tolist()
        return [cases[place] for place in chosen]

    def _uniform(self, count: int) -> NDArray[np.float64]:
        """Numbers in [0, 1), of 53 bits."""
        bits = np.empty(count, np.uint64)
        for start in range(0, count, _PIECE):
            self._stream.fill(bits[start : start + _PIECE])
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
