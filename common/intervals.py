"""95 % intervals from sums over cases, for who has the sums and no case.

Rules:
  * They hold the model fixed, and take cases as independent: where patients have several cases they are too narrow.
  * Where an interval cannot be told (too few cases, no variation) there is none.
  * Of a mean over classes the sums do not tell how its terms vary together: the standard errors are averaged, as if
    they varied as one, so that the interval is never too narrow for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

#: The quantile of the normal distribution at 97.5 %.
_Z = 1.959963984540054


def wilson(successes: float, total: float) -> Interval | None:
    """Of a share of cases: the score interval (Wilson, JASA 1927); None of numbers that are not those of a share."""
    if total <= 0 or not 0 <= successes <= total:
        return None
    share, spread = successes / total, _Z**2 / total
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def auc_error(negative: Floats, positive: Floats) -> float | None:
    """The standard error of the area under a ROC curve, from histograms of scores of the two classes.

    DeLong, DeLong & Clarke-Pearson, Biometrics 1988, by placement values (Sun & Xu, IEEE Signal Processing Letters
    2014): a case's placement is the share of the other class that it is ordered right against, ties counting half.
    None with fewer than two cases of a class.
    """
    cases = np.array([positive.sum(), negative.sum()])
    if cases.min() < 2:
        return None
    of_positive = (np.cumsum(negative) - negative / 2) / cases[1]
    of_negative = 1 - (np.cumsum(positive) - positive / 2) / cases[0]
    area = float(positive @ of_positive) / cases[0]
    variances = positive @ (of_positive - area) ** 2, negative @ (of_negative - area) ** 2
    return math.sqrt(float(np.sum(np.array(variances) / (cases - 1) / cases)))


def logit(value: float, error: float) -> Interval | None:
    """Of an area strictly between 0 and 1, on the logit scale, so that it stays there (Pepe 2003, section 5.2)."""
    if not 0 < value < 1 or error <= 0:
        return None
    centre, half = math.log(value / (1 - value)), _Z * error / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-bound)) for bound in (centre - half, centre + half))
    return low, high


@dataclass(frozen=True)
class Moments:
    """Of values x: how many, their sum, and the sum of their squares."""

    count: float
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """The mean."""
        return self.total / self.count

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        spread = max(0.0, self.squares - self.total * self.mean)
        return math.sqrt(spread / (self.count - 1) / self.count)


def student(means: Sequence[Moments], *, least: float = 0.0, most: float = math.inf) -> Interval | None:
    """Of the mean of several means: Student's t, cut to what a value can be, from `least` to `most`.

    None with fewer than three cases of one of them, or if no value differs.
    """
    if not means or min(each.count for each in means) < 3:
        return None
    centre = math.fsum(each.mean for each in means) / len(means)
    freedom = min(each.count for each in means) - 1
    half = _t(freedom) * math.fsum(each.error for each in means) / len(means)
    return (max(least, centre - half), min(most, centre + half)) if half > 0 else None


def _t(freedom: float) -> float:
    """The quantile of Student's t at 97.5 % (Abramowitz & Stegun 26.7.5; within 1 % from 2 degrees of freedom on)."""
    z, n = _Z, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / n**power for power, term in enumerate(terms, start=1))
