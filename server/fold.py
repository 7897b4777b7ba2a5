"""The running sum of a round's updates, always added in roster order.

Floating-point addition is not associative; a fixed order makes a run bit-identical however replies arrive. An update
that comes before its turn waits; memory is the sum plus the updates that wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.messages import Arrays
from locum.common.tensor_files import forget_part
from locum.server.admission import Update

#: Elements that are added at once.
_BLOCK = 1 << 16


class Fold:
    """Σ wᵢ·Δᵢ in float64 and Σ wᵢ over the sites of a roster."""

    def __init__(self, model: Arrays, order: Sequence[str]) -> None:
        self._totals = {name: np.zeros(tensor.shape, np.float64) for name, tensor in model.items()}
        self._pending = list(order)
        self._waiting: dict[str, Update | None] = {}
        self.weight = 0.0
        self.count = 0

    def offer(self, site: str, update: Update | None) -> None:
        """Adds a site's update, or None if it has none; folds what is next in order."""
        self._waiting[site] = update
        while self._pending and self._pending[0] in self._waiting:
            self._add(self._waiting.pop(self._pending.pop(0)))

    def close(self) -> dict[str, NDArray[np.float64]]:
        """Folds what still waits, as if the sites that never answered were not there; returns the totals."""
        for site in self._pending:
            self._add(self._waiting.pop(site, None))
        self._pending = []
        return self._totals

    def _add(self, update: Update | None) -> None:
        if update is None:
            return
        weight = update.header.weight
        for name, tensor in update.tensors.items():
            _add_weighted(self._totals[name].reshape(-1), weight, tensor.reshape(-1))
            forget_part(tensor)  # once more: the kernel maps pages around each one that is read, also behind it
        self.weight += weight
        self.count += 1


def _add_weighted(total: NDArray[np.float64], weight: float, tensor: NDArray[Any]) -> None:
    """Adds weight · tensor to total, block by block; of a mapped tensor, pages are given back as they were read."""
    for start in range(0, total.size, _BLOCK):
        part = tensor[start : start + _BLOCK]
        total[start : start + _BLOCK] += np.multiply(part, weight, dtype=np.float64)
        forget_part(part)
