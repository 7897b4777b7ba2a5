"""Noise: whole numbers of Skellam's distribution, drawn from a key stream.

Skellam(μ) is the difference of two Poisson numbers of mean μ/2 each (J. R. Stat. Soc. 109:296, 1946): its mean is 0,
its variance μ, and P(k) = e^−μ · I_k(μ). A sum of independent ones is one again, its variance the sum of theirs.

Rules:
  * The numbers are cut into 2^12 blocks of equally many, ±16σ at least. A block is drawn by its size times its largest
    probability (alias method: Walker 1977, Vose 1991), a number within it evenly, and the number is kept with its
    probability over the block's largest; else all is drawn again (von Neumann 1951).
  * Random bits are compared with real numbers. 52 or 64 bits decide nearly always; where they do not, 64 more, and
    decimal arithmetic of 50 digits. So floating point has no say in what is drawn: it comes within 2^−96 of the
    distribution (total variation), each number.
  * Probabilities come from the expansion of I_k for large order or argument (DLMF 10.41.3, in terms of
    w = √(k² + μ²)), whose error is below 2^−100 from μ = 2^12 on; a smaller μ is refused.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.secagg.masks import Stream

Whole = NDArray[np.int64]
Words = NDArray[np.uint64]

#: Below it the expansion is not exact enough.
LEAST_VARIANCE = 2.0**12
#: The most by which the probability of any event may differ from Skellam's, for each number drawn.
DISTANCE = 2.0**-96

_BITS = 12
_BLOCKS, _HALF = 1 << _BITS, 1 << (_BITS - 1)
#: Bits of a word that are left when its column is taken away; a column's mass has 64 bits more.
_FRACTION = 64 - _BITS
_COLUMN = 1 << (_FRACTION + 64)
_DIGITS = 50
_TERMS = 8
#: Numbers that are drawn at once: they and what they are made of stay in a processor's cache.
_PIECE = 1 << 15
#: What floating point may be wrong by in a probability of keeping a number is less than a hundredth of this.
_DOUBT = 2.0**-36


class Skellam:
    """The distribution of one variance; raises ValueError below `LEAST_VARIANCE`.

    Args:
        variance: μ, at most 2^106, so that every number drawn has 64 bits.
    """

    def __init__(self, variance: float) -> None:
        if not LEAST_VARIANCE <= variance <= 2.0**106:
            raise ValueError(f"a variance of {variance:g} cannot be drawn exactly")
        self.variance = variance
        self._width = 1 << max(0, math.ceil(math.log2(math.sqrt(variance) / (_BLOCKS >> 5))))
        blocks = np.arange(_BLOCKS)
        masses = [_density(int(k), variance) for k in self._nearest(blocks)]
        self._cut, self._finer, self._alias = _columns(masses)
        least = np.exp(_log_density(self._farthest(blocks), variance) - _log_density(self._nearest(blocks), variance))
        self._surely = np.floor((least - _DOUBT).clip(0) * 2.0**64).astype(np.uint64)

    def fill(self, out: Whole, stream: Stream) -> None:
        """Draws as many numbers as `out` has."""
        for start in range(0, out.size, _PIECE):
            self._draw(out[start : start + _PIECE], stream)

    def _draw(self, out: Whole, stream: Stream) -> None:
        wrong = self._attempt(out, stream)
        while wrong.size:
            again = np.empty(wrong.size, np.int64)
            still = self._attempt(again, stream)
            out[wrong] = again
            wrong = wrong[still]

    def _attempt(self, out: Whole, stream: Stream) -> NDArray[np.intp]:
        """Draws numbers; returns the places of those that are not to be kept."""
        blocks = self._block(out.size, stream)
        np.subtract(blocks, _HALF, out=out)
        if self._width == 1:
            return np.empty(0, np.intp)
        within = _words(out.size, stream)
        within &= np.uint64(self._width - 1)
        out *= self._width
        out += within.view(np.int64)
        level = _words(out.size, stream)
        open_ = np.flatnonzero(level >= self._surely[blocks])
        return open_[~self._kept(out[open_], blocks[open_], level[open_], stream)]

    def _block(self, count: int, stream: Stream) -> NDArray[np.intp]:
        words = _words(count, stream)
        column = (words >> np.uint64(_FRACTION)).view(np.int64)
        words &= np.uint64((1 << _FRACTION) - 1)
        cut = self._cut[column]
        other = words > cut
        ties = np.flatnonzero(words == cut)
        if ties.size:
            other[ties] = _words(ties.size, stream) >= self._finer[column[ties]]
        return np.where(other, self._alias[column], column)

    def _kept(self, numbers: Whole, blocks: NDArray[np.intp], level: Words, stream: Stream) -> NDArray[np.bool_]:
        """Whether numbers are kept: with p(k) over the largest probability of their block."""
        near = self._nearest(blocks)
        odds = np.exp(_log_density(numbers, self.variance) - _log_density(near, self.variance))
        drawn = level * 2.0**-64
        kept: NDArray[np.bool_] = drawn < odds
        for i in np.flatnonzero(np.abs(drawn - odds) < _DOUBT):
            more = int(level[i]) << 64 | int(_words(1, stream)[0])
            kept[i] = self._exactly_kept(int(numbers[i]), int(near[i]), more)
        return kept

    def _exactly_kept(self, number: int, near: int, level: int) -> bool:
        """The same for one number and 128 random bits."""
        with localcontext(prec=_DIGITS):
            return level * _density(near, self.variance) < (1 << 128) * _density(number, self.variance)

    def _nearest(self, blocks: NDArray[np.intp]) -> Whole:
        """The number of a block that is nearest to 0, which is the likeliest."""
        return np.where(blocks < _HALF, (blocks - _HALF + 1) * self._width - 1, (blocks - _HALF) * self._width)

    def _farthest(self, blocks: NDArray[np.intp]) -> Whole:
        return np.where(blocks < _HALF, (blocks - _HALF) * self._width, (blocks - _HALF + 1) * self._width - 1)


@lru_cache(maxsize=8)
def of(variance: float) -> Skellam:
    """The distribution of a variance; its tables take some tenths of a second and are kept."""
    return Skellam(variance)


def _words(count: int, stream: Stream) -> Words:
    found = np.empty(count, "<u8")
    stream.fill(found)
    return found


def _columns(masses: list[Decimal]) -> tuple[Words, Words, NDArray[np.int64]]:
    """The alias table of masses: of each column what is its own, in 52 bits and 64 more, and whose the rest is."""
    with localcontext(prec=_DIGITS):
        unit = (_BLOCKS * _COLUMN) / sum(masses, Decimal(0))
        left = [int(mass * unit) for mass in masses]
    left[_HALF] += _BLOCKS * _COLUMN - sum(left)
    alias = list(range(_BLOCKS))
    own = [_COLUMN] * _BLOCKS
    small = [i for i, mass in enumerate(left) if mass < _COLUMN]
    large = [i for i, mass in enumerate(left) if mass >= _COLUMN]
    while small:
        low, high = small.pop(), large[-1]
        own[low], alias[low] = left[low], high
        left[high] -= _COLUMN - left[low]
        if left[high] < _COLUMN:
            small.append(large.pop())
    cut = np.array([mass >> 64 for mass in own], np.uint64)
    return cut, np.array([mass & (2**64 - 1) for mass in own], np.uint64), np.array(alias, np.int64)


def _log_density(numbers: Whole, variance: float) -> NDArray[np.float64]:
    """Log P(k) but for a constant, in floating point: for differences within a block."""
    k = numbers.astype(np.float64)
    w = np.hypot(k, variance)
    exponent = k * k / (w + variance) - k * np.arcsinh(k / variance) - np.log(w / variance) / 2
    found: NDArray[np.float64] = exponent + (3 - 5 * (k / w) ** 2) / (24 * w)
    return found


def _density(number: int, variance: float) -> Decimal:
    """P(k) but for a factor that is the same for all k, to 2^−100."""
    with localcontext(prec=_DIGITS):
        k, mu = Decimal(number), Decimal(variance)
        w = (k * k + mu * mu).sqrt()
        exponent = k * k / (w + mu) - k * ((k + w) / mu).ln()
        series = _polynomial([_polynomial(row, (k / w) ** 2) for row in _debye()], 1 / w)
        return exponent.exp() * (mu / w).sqrt() * series


def _polynomial(coefficients: list[Decimal], x: Decimal) -> Decimal:
    found = Decimal(0)
    for coefficient in reversed(coefficients):
        found = found * x + coefficient
    return found


@lru_cache(maxsize=1)
def _debye() -> list[list[Decimal]]:
    """The coefficients of U_j(p) = p^j · Σ_i c_ji·p^2i, j = 0, 1, … (DLMF 10.41.9)."""
    rows = [[Fraction(1)]]
    for j in range(_TERMS):
        row = [Fraction(0)] * (j + 2)
        for i, c in enumerate(rows[-1]):
            power = j + 2 * i
            row[i] += c * (Fraction(power, 2) + Fraction(1, 8 * (power + 1)))
            row[i + 1] -= c * (Fraction(power, 2) + Fraction(5, 8 * (power + 3)))
        rows.append(row)
    with localcontext(prec=_DIGITS):
        return [[Decimal(c.numerator) / c.denominator for c in row] for row in rows]


def add(elements: NDArray[np.unsignedinteger[Any]], numbers: Whole) -> None:
    """Adds numbers to elements of a ring in place."""
    elements += numbers.view(np.uint64).astype(elements.dtype, copy=False)
