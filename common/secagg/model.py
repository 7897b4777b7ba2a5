"""A model on its way down: each tensor under AES-256 in counter mode.

The content key is given to each site of the roster, sealed. Whoever carries the model learns the names and shapes of
its tensors, which the plan tells anyway.

The mode hides and does not prove. What proves is the SHA-256 of the model's file: it stands in the signed context of
the sum, and a site compares it before it uses the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.secagg.masks import Stream
from locum.common.secagg.ring import CHUNK
from locum.common.tensor_files import Arrays, Lazy, Tensor, forget_part


def mixed(tensors: Arrays, key: bytes) -> dict[str, Tensor]:
    """The tensors, encrypted; encrypted ones, as they were. The k-th by name has the key's k-th stream."""
    return {
        name: Lazy(tensors[name].dtype, tensors[name].shape, _mixed(tensors[name], Stream(key, index)))
        for index, name in enumerate(sorted(tensors))
    }


def _mixed(tensor: NDArray[Any], stream: Stream) -> Iterator[NDArray[Any]]:
    """Each piece lies where the one before it lay."""
    flat = tensor.reshape(-1)
    out = np.empty(min(CHUNK, flat.size), flat.dtype)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        stream.mix(part.data.cast("B"), out[: part.size].data.cast("B"))
        forget_part(part)
        yield out[: part.size]
    forget_part(flat)  # once more: the kernel maps pages around each one that is read, also behind it
