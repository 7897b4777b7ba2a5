"""FedAvg (McMahan et al., AISTATS 2017): the weighted mean of the updates, added to the model.

With the server learning rate η of Reddi et al. (ICLR 2021, algorithm 1) at its default 1 this is FedAvg exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from locum.common.build import Model

Totals = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class FedAvg:
    """Hyper-parameters. `server_lr` is η: the step along the mean update."""

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.server_lr <= 10:
            raise ValueError("server_lr must be above 0 and at most 10")

    def start(self, _model: Model) -> Model:
        """FedAvg keeps nothing from round to round."""
        return {}

    def step(self, model: Model, totals: Totals, weight: float, state: Model) -> tuple[Model, Model]:
        """The next model and state from Σ wᵢ·Δᵢ (float64, by tensor) and Σ wᵢ > 0."""
        scale = self.server_lr / weight
        moved = {
            name: (tensor.astype(np.float64) + scale * totals[name]).astype(tensor.dtype)
            for name, tensor in model.items()
        }
        return moved, state


strategy = FedAvg
