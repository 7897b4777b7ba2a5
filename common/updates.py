"""What an update must be before anybody folds it in. Site and coordinator check it with the same function.

An update is the change to the shared tensors of the network: exact names, shapes and dtypes, all finite, and an L2 norm
over all tensors of at most the plan's bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.tensor_files import forget_part

Arrays = Mapping[str, NDArray[Any]]

#: Elements whose squares are held at once.
_BLOCK = 1 << 16


def l2_norm(tensors: Arrays) -> float:
    """The L2 norm over all tensors together, in float64; infinite or NaN if an element is.

    Memory is a few blocks for contiguous tensors of any size; pages of a mapped one are given back as they were read.
    """
    # Not a dot product: BLAS would start its own threads, which fight with those of the sites.
    total = sum(map(_squares, tensors.values()), 0.0)
    return math.sqrt(total) if total >= 0 else total


def _squares(array: NDArray[Any]) -> float:
    found = _square_sum(array.ravel(order="K"))
    forget_part(array)  # once more: the kernel maps pages around each one that is read, also behind it
    return found


def _square_sum(flat: NDArray[Any]) -> float:
    """Σ x², to the bit what NumPy's pairwise sum over all squares is: halves are taken where NumPy takes them."""
    if flat.size <= _BLOCK:
        part = float(np.square(flat, dtype=np.float64).sum())
        forget_part(flat)
        return part
    half = flat.size // 2
    half -= half % 8
    return _square_sum(flat[:half]) + _square_sum(flat[half:])


def update_problem(update: Arrays, model: Arrays, norm_bound: float) -> str | None:
    """Why `update` cannot be folded into `model`, in words without any value of the data; None if it can."""
    return _form_problem(update, model) or _value_problem(update, norm_bound)


def _form_problem(update: Arrays, model: Arrays) -> str | None:
    missing, extra = sorted(set(model) - set(update)), sorted(set(update) - set(model))
    if missing:
        return f"{len(missing)} tensors are missing, the first is {missing[0]!r}"
    if extra:
        return f"{len(extra)} tensors do not belong to the network, the first is {extra[0]!r}"
    for name, reference in model.items():
        if update[name].shape != reference.shape:
            return f"tensor {name!r} has shape {list(update[name].shape)}, the network has {list(reference.shape)}"
        if update[name].dtype != reference.dtype:
            return f"tensor {name!r} has dtype {update[name].dtype}, the network has {reference.dtype}"
    return None


def _value_problem(update: Arrays, norm_bound: float) -> str | None:
    norm = l2_norm(update)
    if not math.isfinite(norm):
        return "a value is not finite"
    if norm > norm_bound:
        return f"its norm {norm:.4g} is above the bound {norm_bound:g}"
    return None
