"""Gaussian noise from a generator that has a name and a seed nobody knows.

Rules:
  * Bits are the key stream of AES-256 in counter mode, its key from the operating system; never torch's or NumPy's
    generators, whose state can be computed from what they gave.
  * Noise is made by Box–Muller: the radius from 52 bits in float64, so that a value lies up to 8.5 standard deviations
    out; the angle from 32 bits in float32.
  * Noise is added in float64, and the sum is rounded to a grid of at most std · 2^-20. A value of floating-point noise
    can betray what it was added to by its last bits (Mironov, CCS 2012; Jin et al., IEEE S&P 2022); the grid drops
    those bits. It is a mitigation and no proof: the guarantee is that of the real-valued mechanism.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from locum.common.secagg.masks import SEED_BYTES, Stream

Floats32 = NDArray[np.float32]

#: Pairs of numbers that are made at once: all of a piece's arrays fit a core's cache.
_PAIRS = 1 << 13
#: The exponent bits of a float64 in [1, 2).
_ONE = np.uint64(0x3FF0_0000_0000_0000)
_TURN = np.float32(2 * math.pi / 2**32)
_GRID = 2.0**-20


class NoiseSource:
    """Gaussian noise; one source gives no number twice.

    Args:
        seed: 32 bytes, for tests that need the same noise again; the operating system's otherwise.
    """

    name = "AES-256-CTR, Box–Muller, seeded by the operating system"

    def __init__(self, seed: bytes | None = None) -> None:
        self._stream = Stream(os.urandom(SEED_BYTES) if seed is None else seed)
        self._bits, self._turns = np.empty(_PAIRS, np.uint64), np.empty(_PAIRS, np.uint32)
        self._radius, self._angle = np.empty(_PAIRS), np.empty(_PAIRS, np.float32)
        self._normal = np.empty(2 * _PAIRS)

    def gaussian(self, shape: int | Sequence[int], std: float) -> Floats32:
        """Independent Gaussian numbers of mean 0 and standard deviation `std`."""
        return self.noised(np.zeros(shape, np.float32), std)

    def noised(self, total: Floats32, std: float) -> Floats32:
        """`total` plus independent Gaussian noise, on the grid; raises ValueError for a `std` that is no noise."""
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"noise has a standard deviation above 0, not {std}")
        grid = 2.0 ** math.floor(math.log2(std * _GRID))
        given, out = total.reshape(-1), np.empty(total.size, np.float32)
        for start in range(0, given.size, 2 * _PAIRS):
            part = given[start : start + 2 * _PAIRS]
            normal = self._standard()[: part.size]
            normal *= std
            normal += part
            normal *= 1 / grid
            np.rint(normal, out=normal)
            normal *= grid
            out[start : start + part.size] = normal
        return out.reshape(total.shape)

    def _standard(self) -> NDArray[np.float64]:
        """The next piece of standard Gaussian numbers; its array is used again (Box & Muller 1958)."""
        self._stream.fill(self._bits)
        self._stream.fill(self._turns)
        self._bits >>= np.uint64(12)
        self._bits |= _ONE
        np.subtract(2.0, self._bits.view(np.float64), out=self._radius)  # in (0, 1]
        np.log(self._radius, out=self._radius)
        self._radius *= -2
        np.sqrt(self._radius, out=self._radius)
        # Two arguments of 32 bits would give a float64, whose sine costs ten times as much.
        np.multiply(self._turns, _TURN, out=self._angle, dtype=np.float32, casting="unsafe")
        np.multiply(self._radius, np.cos(self._angle), out=self._normal[:_PAIRS])
        np.multiply(self._radius, np.sin(self._angle, out=self._angle), out=self._normal[_PAIRS:])
        return self._normal
