"""Masks: the key stream of AES-256 in counter mode (NIST SP 800-38A, section 6.5), added to a vector in a ring.

A seed has 2^64 streams, told apart by the upper half of the first counter block; each lane of a vector takes one, from
its beginning on, as little-endian integers. Streams are made and added piece by piece, so that working memory is two
pieces whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from locum.common.secagg.ring import CHUNK

SEED_BYTES = 32
_PIECE = 8 * CHUNK
_ZEROS = bytes(_PIECE)
#: Bytes of one counter's block.
_BLOCK = 16


class Stream:
    """The key stream of a seed.

    Args:
        seed: 32 bytes.
        index: which of the seed's 2^64 streams; it is the upper half of the first counter block.
        start: the byte of the stream to begin at.
    """

    def __init__(self, seed: bytes, index: int = 0, start: int = 0) -> None:
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes")
        block, within = divmod(start, _BLOCK)
        counter = index.to_bytes(8, "big") + block.to_bytes(8, "big")
        self._cipher = Cipher(algorithms.AES(seed), modes.CTR(counter)).encryptor()
        self._cipher.update(bytes(within))

    def fill(self, out: NDArray[Any]) -> None:
        """The next bytes, as many as the contiguous array `out` has; it has at most 2^16 elements of 8 bytes."""
        if out.nbytes > _PIECE:
            raise ValueError(f"a piece of a stream has at most {_PIECE} bytes")
        self._cipher.update_into(memoryview(_ZEROS)[: out.nbytes], out.data.cast("B"))

    def mix(self, data: memoryview, out: memoryview) -> None:
        """`out` = `data` XOR the next bytes: encrypts, and decrypts."""
        self._cipher.update_into(data, out)


class Masks:
    """Streams that are added to a lane of a vector, and streams that are taken away from it.

    Args:
        lane: which stream of each seed.
        add: seeds of streams to add.
        subtract: seeds of streams to take away.
    """

    def __init__(self, lane: int, *, add: Iterable[bytes] = (), subtract: Iterable[bytes] = ()) -> None:
        self._signed = [
            *((np.add, Stream(seed, lane)) for seed in add),
            *((np.subtract, Stream(seed, lane)) for seed in subtract),
        ]
        self._buffer = np.empty(_PIECE, np.uint8)

    def apply(self, part: NDArray[Any]) -> None:
        """Masks the next elements of the lane in place; contiguous, of an unsigned type."""
        if not part.flags.c_contiguous:  # its flat form would be a copy, and `part` would stay unmasked
            raise ValueError("what is to be masked is not contiguous")
        flat = part.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            piece = flat[start : start + CHUNK]
            key = self._buffer[: piece.nbytes].view(piece.dtype)
            for operation, stream in self._signed:
                stream.fill(key)
                operation(piece, key, out=piece)
