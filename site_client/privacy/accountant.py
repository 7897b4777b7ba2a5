"""What Gaussian noise on randomly drawn patients costs of privacy, by privacy loss distributions (PLD).

The mechanism is the Poisson-subsampled Gaussian: each patient takes part in a step with probability q, independently,
and the sum of what they give, each of L2 norm at most C, gets Gaussian noise of standard deviation σ·C. Distributions
of the privacy loss are composed by convolution (Koskela, Jälkö & Honkela, AISTATS 2020; "connect the dots": Doroshenko
et al., PETS 2022), with dp-accounting. Every rounding is pessimistic: the epsilon told is never too small.

Rules:
  * Neighbouring data differ in one patient, whose part becomes zero (zero-out adjacency). Divisors here are public, so
    this is the adjacency of adding or removing one, and the worse direction counts.
  * No data is looked at, and no torch: settings go in, an epsilon comes out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

#: Less noise than this is never advised: at σ = 0.2 one step with everybody costs an epsilon of 33 already.
LEAST_NOISE = 0.2

_FINE, _COARSE = 1e-4, 1e-3
#: Points of a distribution, at most; beyond, its grid is ten times coarser. Only absurd epsilons (hundreds) get there.
_MOST_POINTS = 4_000_000
#: Mass that one composition may move to the infinite loss.
_TAIL = 1e-15
#: Grid of three significant digits: 900 values in each power of ten.
_STEPS_A_DECADE = 900


@dataclass(frozen=True)
class Mechanism:
    """One Poisson-subsampled Gaussian mechanism, several times.

    Attributes:
        noise: σ, the noise multiplier: the standard deviation as a multiple of the clip.
        rate: q, the probability of a patient to take part in a step; 1.0 where everybody does.
        steps: how many times.
    """

    noise: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0 and 0 <= self.rate <= 1 and self.steps >= 0):
            raise ValueError(f"no mechanism: {self}")


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """The epsilon of all `mechanisms` together at `delta`; 0.0 for none, infinite where one of them has no noise."""
    _check_delta(delta)
    return _epsilon(_merged(mechanisms), delta, _FINE)


@lru_cache(maxsize=1024)
def noise_for(epsilon: float, delta: float, *, rate: float, steps: int) -> float:
    """The least σ, rounded up to three significant digits, with which `steps` steps cost at most `epsilon`.

    Never less than :data:`LEAST_NOISE`. It is searched on a coarse grid, and confirmed on the one that :func:`epsilon`
    uses.
    """
    _check_delta(delta)
    if not epsilon > 0:
        raise ValueError("no noise is enough for an epsilon of zero")

    def enough(interval: float) -> Callable[[int], bool]:
        return lambda index: _epsilon(_merged([Mechanism(_value(index), rate, steps)]), delta, interval) <= epsilon

    near = _least(enough(_COARSE), _index(1.0), stride=_STEPS_A_DECADE // 8)
    return _value(_least(enough(_FINE), near, stride=1))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"a delta is between 0 and 1, not {delta}")


def _merged(mechanisms: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """The same in fewer terms, in an order that does not depend on theirs."""
    steps: Counter[tuple[float, float]] = Counter()
    for one in mechanisms:
        if one.steps and one.rate:
            steps[one.noise, one.rate] += one.steps
    return tuple(Mechanism(*setting, times) for setting, times in sorted(steps.items()))


@lru_cache(maxsize=1024)
def _epsilon(mechanisms: tuple[Mechanism, ...], delta: float, interval: float) -> float:
    if not mechanisms:
        return 0.0
    if any(one.noise == 0 for one in mechanisms):
        return math.inf
    reach = sum(map(_reach, mechanisms))
    while reach / interval > _MOST_POINTS:
        interval *= 10
    total, *others = (_losses(one, interval) for one in mechanisms)
    for other in others:
        total = total.compose(other, tail_mass_truncation=_TAIL)
    return float(total.get_epsilon_for_delta(delta))


def _reach(one: Mechanism) -> float:
    """About how large the loss of a mechanism can get: its mean is at most T·q/(2σ²), by convexity of the KL."""
    scale = math.sqrt(one.steps * one.rate) / one.noise
    return scale**2 / 2 + 10 * scale + 10 / one.noise


def _losses(one: Mechanism, interval: float) -> Any:
    """The privacy loss distribution of a mechanism, all its steps together."""
    if one.rate == 1.0:  # Gaussians compose to a Gaussian
        return _one_step(one.noise / math.sqrt(one.steps), 1.0, interval)
    return _one_step(one.noise, one.rate, interval).self_compose(one.steps, tail_mass_truncation=_TAIL)


@lru_cache(maxsize=4)
def _one_step(noise: float, rate: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as pld  # a second: SciPy

    return pld.from_gaussian_mechanism(noise, value_discretization_interval=interval, sampling_prob=rate)


def _value(index: int) -> float:
    """The value at a place of the grid of three significant digits; 1.0 is at 0."""
    decade, within = divmod(index, _STEPS_A_DECADE)
    return float(f"{100 + within}e{decade - 2}")


def _index(value: float) -> int:
    """The place of a value of the grid."""
    decade = math.floor(math.log10(value) + 1e-9)
    return decade * _STEPS_A_DECADE + round(100 * value / 10.0**decade) - 100


def _least(holds: Callable[[int], bool], near: int, *, stride: int) -> int:
    """The least index from which on `holds` is true, searched from `near`; never below that of `LEAST_NOISE`."""
    floor = _index(LEAST_NOISE)
    if holds(near):
        high, low = near, near - stride
        while low >= floor and holds(low):
            high, stride = low, 2 * stride
            low -= stride
        low = max(low, floor - 1)
    else:
        low, high = near, near + stride
        while not holds(high):
            low, stride = high, 2 * stride
            high += stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
