"""FedAvg (McMahan et al., AISTATS 2017): the weighted mean of the updates, added to the model.

With the server learning rate η of Reddi et al. (ICLR 2021, algorithm 1) at its default 1 this is FedAvg exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.build import Model
from locum.common.messages import Arrays
from locum.common.tensor_files import forget_part
from locum.server.strategies import Totals

#: Elements that are computed at once.
_BLOCK = 1 << 16


@dataclass(frozen=True)
class FedAvg:
    """Hyper-parameters. `server_lr` is η: the step along the mean update."""

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.server_lr <= 10:
            raise ValueError("server_lr must be above 0 and at most 10")

    def start(self, _model: Arrays) -> Model:
        """FedAvg keeps nothing from round to round."""
        return {}

    def step(self, model: Arrays, totals: Totals, weight: float, _state: Arrays) -> tuple[Model, Model]:
        """The next model and state from Σ wᵢ·Δᵢ (float64, by tensor; used up) and Σ wᵢ > 0."""
        scale = self.server_lr / weight
        return {name: _moved(tensor, totals.pop(name), scale) for name, tensor in model.items()}, {}


def _moved(tensor: NDArray[Any], total: NDArray[np.float64], scale: float) -> NDArray[Any]:
    """Tensor + scale · total in float64, in the tensor's own type."""
    moved = np.empty(tensor.shape, tensor.dtype)
    new, old, sums = moved.reshape(-1), tensor.reshape(-1), total.reshape(-1)
    for start in range(0, new.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        new[part] = old[part].astype(np.float64) + scale * sums[part]
    forget_part(tensor)
    return moved


strategy = FedAvg
