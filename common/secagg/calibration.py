"""How much Skellam noise each site adds to its update, and how an update is then scaled, so that a promise is kept.

The promise is (ε, δ) for one site, over all sums of a run together: what comes of them is nearly as likely as if that
site had given nothing but its noise (zero-out adjacency). Names are those of Agarwal, Kairouz & Liu, "The Skellam
Mechanism for Differentially Private Federated Learning", NeurIPS 2021.

Rules:
  * The noise that counts is that of the honest sites of the smallest sum that is ever unmasked: t − c of them, for the
    threshold t and the c sites that may work together with the aggregator and know their own. Each adds
    Skellam(μ/(t − c)).
  * Sensitivity is that of the rounded update: at most Δ2 = s·C + √d, for a step of stochastic rounding in each of d
    coordinates (scale s, clip C); Δ1 ≤ min(√d·Δ2, Δ2²), for they are whole numbers.
  * A sum of whole numbers that wraps is made from the sum that does not, by arithmetic that everybody can do: wrapping
    costs accuracy, never privacy. The scale leaves room for `HEADROOM` standard deviations, of which a coordinate goes
    beyond with a probability below 2^−90.
  * What the drawn numbers may differ from Skellam's is taken off δ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from locum.common.secagg.ring import Bits, Ring, RingError, largest
from locum.common.secagg.roster import threshold_of, tolerated
from locum.common.secagg.skellam import DISTANCE, LEAST_VARIANCE

#: Standard deviations of the whole noise of a sum for which a ring leaves room.
HEADROOM = 12.0
#: Steps in a clip, at most: a float32 tells fewer.
_MOST_STEPS = 2.0**40
#: Steps in a clip over √d, at least: rounding then makes the noise larger by an eighth at most.
_LEAST_STEPS = 8.0
#: What floating point may add to the norm of a clipped update.
_SLACK = 1e-9
#: Whole orders α of Rényi divergence: all up to 128, then 16 to a doubling.
_ORDERS = np.unique(np.concatenate([np.arange(2.0, 129), np.floor(2.0 ** np.arange(7, 20, 1 / 16))]))
_HALVINGS = 60


class CapacityError(RingError):
    """A promise that no scale of the ring keeps."""


@dataclass(frozen=True)
class Promise:
    """What is promised to each site.

    Attributes:
        epsilon: ε.
        delta: δ.
        sums: sums to which it gives at most.
    """

    epsilon: float
    delta: float
    sums: int


@dataclass(frozen=True)
class Calibration:
    """What each site does.

    Attributes:
        ring: how its update is written: with room for the noise.
        variance: of the noise that it adds to each coordinate, in steps².
    """

    ring: Ring
    variance: float

    def deviation(self, sites: int) -> float:
        """The standard deviation of a coordinate of the mean over so many sites, in units of the update."""
        return math.sqrt(self.variance / sites) / self.ring.scale


def honest(sites: int) -> int:
    """Sites of a roster of n whose noise is in every sum and known to nobody else: t − c."""
    return threshold_of(sites) - tolerated(sites)


@lru_cache(maxsize=256)
def calibrated(promise: Promise, *, clip: float, bits: Bits, sites: int, size: int) -> Calibration:
    """The finest scale at which the ring holds the sum with its noise.

    Args:
        promise: what is to be kept.
        clip: C, the largest L2 norm of an update.
        bits: of the ring.
        sites: n, of the roster.
        size: d, coordinates of an update.

    Raises:
        CapacityError: no scale keeps the promise.
    """
    room = float(largest(bits, sites))
    delta = promise.delta - (1 + math.exp(min(promise.epsilon, 700.0))) * promise.sums * sites * size * DISTANCE
    if delta <= 0:
        raise CapacityError("the noise cannot be drawn so exactly that this epsilon and delta hold")

    def variance(steps: float) -> float:
        l2 = steps * (1 + _SLACK) + math.sqrt(size)
        l1 = min(math.sqrt(size) * l2, l2 * l2)
        return least_variance(promise.epsilon, delta, sums=promise.sums, l1=l1, l2=l2) / honest(sites)

    def fits(steps: float) -> bool:
        return steps + HEADROOM * math.sqrt(variance(steps) / sites) <= room

    steps = _largest_of(fits, min(room, _MOST_STEPS))
    found = variance(steps)
    if not fits(steps) or steps < _LEAST_STEPS * math.sqrt(size) or found < LEAST_VARIANCE:
        raise CapacityError(f"{bits} bits cannot hold the noise of {sites} sites for {size} coordinates")
    return Calibration(Ring(bits, sites, clip * room / steps), found)


def _largest_of(fits: Callable[[float], bool], most: float) -> float:
    """The largest number from 1 to `most` that fits, to a part in 2^50; 1 if none does."""
    if fits(most):
        return most
    low, high = 0.0, math.log(most)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(math.exp(middle)) else (low, middle)
    return math.exp(low)


# --- accounting


def renyi(variance: float, *, l1: float, l2: float) -> NDArray[np.float64]:
    """ε(α) of one sum at each whole order α (Theorem 3.5).

    αΔ2²/2μ + min(((2α − 1)Δ2² + 6Δ1)/4μ², 3Δ1/2μ)
    """
    discrete = np.minimum(
        ((2 * _ORDERS - 1) * l2**2 + 6 * l1) / (4 * variance**2),
        3 * l1 / (2 * variance),
    )
    found: NDArray[np.float64] = _ORDERS * l2**2 / (2 * variance) + discrete
    return found


def epsilon(variance: float, delta: float, *, sums: int, l1: float, l2: float) -> float:
    """The ε of several sums together, from Rényi divergence (Canonne, Kamath & Steinke, NeurIPS 2020, Proposition 12).

    Args:
        variance: μ of the noise in each sum that nobody knows, in steps².
        delta: δ.
        sums: how many.
        l1: Δ1, in steps.
        l2: Δ2, in steps.
    """
    divergence = sums * renyi(variance, l1=l1, l2=l2)
    found = divergence + np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    return max(0.0, float(found.min()))


def least_variance(wanted: float, delta: float, *, sums: int, l1: float, l2: float) -> float:
    """The least μ, to a part in 10^12 and rounded up, at which `epsilon` is at most `wanted`; raises CapacityError."""
    if epsilon(math.inf, delta, sums=sums, l1=l1, l2=l2) >= wanted:
        raise CapacityError(f"an epsilon of {wanted:g} is below what can be accounted for")
    low = high = l2 * l2
    while epsilon(high, delta, sums=sums, l1=l1, l2=l2) > wanted:
        low, high = high, 4 * high
    while epsilon(low, delta, sums=sums, l1=l1, l2=l2) <= wanted:
        low /= 4
    while high > low * (1 + 1e-12):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        enough = epsilon(middle, delta, sums=sums, l1=l1, l2=l2) <= wanted
        low, high = (low, middle) if enough else (middle, high)
    return high
