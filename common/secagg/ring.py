"""Fixed point: real numbers as elements of a ring, so that masks cancel exactly and sums have no order.

Rules:
  * A coordinate of an update is scaled so that no sum over the roster can wrap: of R bits, ⌈log2 n⌉ are left to the
    sum, and n·(2^(b−1) − 1) < 2^(R−1) with b = R − ⌈log2 n⌉. A site's bound stands at 2^(b−1) − 2: the last step is
    left to rounding, that of floating point included.
  * Rounding is stochastic: ⌊v + u⌋ with u uniform in [0, 1), so that the sum is not biased (Gupta et al., ICML 2015,
    section 3.1). The error of one site's coordinate is one step of the scale, and that of floating point.
  * Scalars (weights, counts, losses, metric sums) lie in a 64-bit lane, each with a bound of its own, rounded to the
    nearest; a whole number is exact.
  * Two's complement: a negative number −x is 2^R − x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Elements = NDArray[np.unsignedinteger[Any]]
Bits = Literal[32, 64]

#: Elements that are computed at once: they and what they are computed of stay in a processor's cache.
CHUNK = 1 << 16
_DTYPES: dict[int, tuple[np.dtype[Any], np.dtype[Any]]] = {
    32: (np.dtype("<u4"), np.dtype("<i4")),
    64: (np.dtype("<u8"), np.dtype("<i8")),
}
_RANDOM = 2.0**-32


class RingError(ValueError):
    """A number that has no place in the ring: it is not finite, or beyond its bound."""


@dataclass(frozen=True)
class Ring:
    """How the coordinates of an update are written.

    Attributes:
        bits: R, 32 or 64.
        sites: n, the sites of the roster.
        bound: C, the largest absolute value of one site's coordinate.
    """

    bits: Bits
    sites: int
    bound: float

    def __post_init__(self) -> None:
        if self.sites < 1 or not 0 < self.bound < math.inf:
            raise RingError("a ring needs a site and a finite bound above 0")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the elements: unsigned, little-endian."""
        return _DTYPES[self.bits][0]

    @property
    def scale(self) -> float:
        """Steps per unit: (2^(b−1) − 2) / C."""
        return largest(self.bits, self.sites) / self.bound

    def write(
        self,
        values: NDArray[Any],
        weight: float,
        random: NDArray[np.uint32],
        out: Elements,
        scratch: Floats | None = None,
    ) -> None:
        """Writes weight · values to `out`, rounded by `random` (one uniform 32-bit number each); all of one length.

        `scratch` (2 × that length) spares a caller of many pieces the memory that each would take and give back.
        Whether |weight · value| keeps to the bound is checked by the caller, who has the whole update.
        """
        scaled, draw = np.empty((2, values.size)) if scratch is None else scratch
        np.multiply(values, weight * self.scale, out=scaled, dtype=np.float64)
        np.multiply(random, _RANDOM, out=draw, dtype=np.float64)
        np.add(scaled, draw, out=scaled)
        out.view(_DTYPES[self.bits][1])[...] = np.floor(scaled, out=scaled)

    def read(self, total: Elements) -> Floats:
        """The sum that ring elements stand for."""
        found: Floats = np.multiply(total.view(_DTYPES[self.bits][1]), 1 / self.scale, dtype=np.float64)
        return found


def largest(bits: int, sites: int) -> int:
    """2^(b−1) − 2, the step at which a site's bound stands; for 64 bits less, as far as a float can tell."""
    left = bits - (sites - 1).bit_length()
    # A float64 has 53 bits: of a larger power eight floats are left above. Scale, weight, product and draw each round.
    return (1 << (left - 1)) - (1 << max(1, left - 51))


@dataclass(frozen=True)
class Scalar:
    """A named number or vector in the 64-bit lane.

    Attributes:
        name: what it is.
        length: how many numbers.
        bound: their largest absolute value at one site.
    """

    name: str
    length: int
    bound: float

    def fraction_bits(self, sites: int) -> int:
        """Bits right of the point, so that the sum over `sites` cannot wrap."""
        whole = max(1, math.ceil(self.bound)).bit_length()
        return 62 - whole - (sites - 1).bit_length()


def write_scalars(lane: Sequence[Scalar], values: Mapping[str, Floats], sites: int) -> NDArray[np.uint64]:
    """The 64-bit lane; raises RingError for a number that is not finite or beyond its bound."""
    parts = []
    for scalar in lane:
        numbers = np.asarray(values[scalar.name], np.float64).reshape(-1)
        if numbers.size != scalar.length or not bool((np.abs(numbers) <= scalar.bound).all()):
            raise RingError(f"{scalar.name} is not {scalar.length} numbers of at most {scalar.bound:g}")
        steps = np.rint(np.ldexp(numbers, scalar.fraction_bits(sites)))
        parts.append(steps.astype(np.int64).view(np.uint64))
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def read_scalars(lane: Iterable[Scalar], total: NDArray[np.uint64], sites: int) -> dict[str, Floats]:
    """The sums by name."""
    found, start = {}, 0
    for scalar in lane:
        steps = total[start : start + scalar.length].view(np.int64)
        found[scalar.name] = np.ldexp(steps.astype(np.float64), -scalar.fraction_bits(sites))
        start += scalar.length
    return found


def mean_error(ring: Ring, weight_cap: float, weights: float) -> float:
    """The largest error of a coordinate of the weighted mean: W_max·n/Σw · (C/(2^(b−1) − 2) + 2^−50·C).

    The first term is a step, of stochastic rounding; the second is floating point, with 64 bits the larger of the two.

    Args:
        ring: how updates are written.
        weight_cap: W_max, the weight that counts as 1.
        weights: Σw over the sites of the sum.
    """
    return weight_cap * ring.sites / weights * (1 / ring.scale + math.ldexp(ring.bound, -50))
