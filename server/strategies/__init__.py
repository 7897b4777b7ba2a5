"""Strategies: one file each, pure functions over sums.

A strategy sees the weighted sum of the updates and the sum of the weights, never one site's update; so every strategy
works when the sum is all that the aggregator can read.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from locum.common.build import Model, resolve
from locum.common.messages import Arrays
from locum.common.plan import Plan


class Totals(Protocol):
    """Σ wᵢ·Δᵢ in float64, by tensor; each can be taken once."""

    def pop(self, name: str, /) -> NDArray[np.float64]:
        """The sum of one tensor."""
        ...


class Strategy(Protocol):
    """How the sum of a round's updates moves the model."""

    def start(self, model: Arrays, /) -> Model:
        """The strategy's state before round 1."""
        ...

    def step(self, model: Arrays, totals: Totals, weight: float, state: Arrays, /) -> tuple[Model, Model]:
        """The next model and state from Σ wᵢ·Δᵢ (float64, by tensor; used up) and Σ wᵢ > 0."""
        ...


def strategy_of(plan: Plan) -> Strategy:
    """The strategy that a plan names; the plan has been checked before."""
    made: Strategy = resolve("locum.strategies", plan.strategy.name)[0](**plan.strategy.parameters)
    return made
