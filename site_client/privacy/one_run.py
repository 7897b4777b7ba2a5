"""What canaries show of the noise: a lower bound of epsilon from one run of training, and a test of its detection rate.

A canary is an invented patient whose clipped gradient is C in one coordinate that is its own. A fair coin says whether
it is in. An observer sees what every step releases, more than any coordinator does, and guesses who was in.

The bound is theorem 5.2 of Steinke, Nasr & Jagielski, NeurIPS 2023: of r guesses by an observer of an ε-DP mechanism,
no more are right than of Binomial(r, e^ε/(1 + e^ε)), with a correction for δ. It holds for any mechanism and any
observer, and leaves some of the truth out: with a thousand canaries it cannot exceed 4.

Rules:
  * The observer knows σ and q, and scores a canary by its likelihood ratio: no test is stronger for the noise claimed.
  * The numbers of guesses that are tried are fixed before, and the confidence is shared among them.
  * A bound above the claim, or canaries that are found more often than the noise claimed lets them be, is a fault.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from locum.common.intervals import auc_error
from locum.common.metrics import Floats, area_under_curve
from locum.site_client.privacy.accountant import Mechanism, epsilon
from locum.site_client.privacy.attacks import Estimate

#: Shares of the canaries that are called "in", the likeliest first; each bound has a share of the doubt.
_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
_DOUBT = 0.05
#: Standard errors beyond which more canaries are found than the noise allows: one honest check in thirty thousand.
_TOO_FAR = 4.0
_NORMAL = 1.96
#: Canaries of each side from which the detection rate that noise predicts is estimated.
_MANY = 50_000
_MOST = 16.0


@dataclass(frozen=True)
class Audit:
    """What canaries showed in one round.

    Attributes:
        canaries: how many were ready.
        included: how many the coin let in.
        noise: σ of the round, a multiple of the clip.
        rate: q of the round.
        steps: of the round.
        delta: at which both epsilons are.
        claimed: the accountant's epsilon of the round.
        bound: epsilon is at least this, at 95 % confidence; 0 says nothing.
        auc: how well the observer told who was in.
        predicted: the area that the noise claimed gives.
        failed: why the check failed; empty if it did not.
    """

    canaries: int
    included: int
    noise: float
    rate: float
    steps: int
    delta: float
    claimed: float
    bound: float
    auc: Estimate
    predicted: float
    failed: str


def evidence(seen: Floats, mechanism: Mechanism) -> Floats:
    """The log likelihood ratio of one step for each canary; `seen` is its coordinate as a multiple of the clip."""
    with np.errstate(divide="ignore"):  # where everybody is drawn, none is not
        absent = np.log1p(-mechanism.rate)
    found: Floats = np.logaddexp(absent, math.log(mechanism.rate) + (seen - 0.5) / mechanism.noise**2)
    return found


def audit(scores: Floats, included: NDArray[np.bool_], mechanism: Mechanism, delta: float) -> Audit:
    """Judges the summed evidence of every canary against what a mechanism claims."""
    claimed, bound = epsilon([mechanism], delta), least_epsilon(scores, included, delta)
    predicted = predicted_area(mechanism)
    area, error = _area(scores, included)
    return Audit(
        canaries=len(scores),
        included=int(included.sum()),
        noise=mechanism.noise,
        rate=mechanism.rate,
        steps=mechanism.steps,
        delta=delta,
        claimed=claimed,
        bound=bound,
        auc=Estimate(area, max(0.0, area - _NORMAL * error), min(1.0, area + _NORMAL * error)),
        predicted=predicted,
        failed=_fault(bound, claimed, area - _TOO_FAR * error, predicted),
    )


def _fault(bound: float, claimed: float, least_area: float, predicted: float) -> str:
    if bound > claimed:
        return f"epsilon is at least {bound:.2f}, and {claimed:.2f} is claimed: the noise is not what it should be"
    if least_area > predicted:
        return f"canaries are found too often (area above {least_area:.3f}, {predicted:.3f} is what the noise allows)"
    return ""


def least_epsilon(scores: Floats, included: NDArray[np.bool_], delta: float) -> float:
    """The least epsilon that the guesses leave possible at 95 % confidence; 0 where they say nothing."""
    order = np.argsort(-scores, kind="stable")
    bounds = [0.0]
    for guesses in {max(1, int(share * len(scores))) for share in _SHARES}:
        right = int(included[order[:guesses]].sum())
        bounds.append(_bound(len(scores), guesses, right, delta, _DOUBT / len(_SHARES)))
    return max(bounds)


def _bound(canaries: int, guesses: int, right: int, delta: float, doubt: float) -> float:
    """The epsilon at which so many right guesses have the probability `doubt`."""
    if _chance(canaries, guesses, right, delta, 0.0) > doubt:
        return 0.0
    low, high = 0.0, _MOST
    for _ in range(30):
        middle = (low + high) / 2
        if _chance(canaries, guesses, right, delta, middle) > doubt:
            high = middle
        else:
            low = middle
    return low


def _chance(canaries: int, guesses: int, right: int, delta: float, eps: float) -> float:
    """The most probability that `right` of `guesses` are right if the mechanism is (eps, delta)-DP (theorem 5.2)."""
    from scipy.stats import binom  # a second

    one = 1 / (1 + math.exp(-eps))
    pure = float(binom.sf(right - 1, guesses, one))
    fewer = np.arange(1, right + 1)
    mass = np.cumsum(binom.pmf(right - fewer, guesses, one)) / fewer
    return min(1.0, pure + 2 * canaries * delta * float(mass.max(initial=0.0)))


@lru_cache(maxsize=64)
def predicted_area(mechanism: Mechanism) -> float:
    """The area under the observer's ROC curve that a mechanism gives; by simulation, within 0.005."""
    rng = np.random.default_rng(0)
    scores = np.zeros((2, _MANY))
    for _ in range(mechanism.steps):
        seen = rng.normal(0.0, mechanism.noise, (2, _MANY))
        seen[1] += rng.random(_MANY) < mechanism.rate
        scores += evidence(seen, mechanism)
    return area_under_curve(scores[1], scores[0]) or 0.0


def _area(scores: Floats, included: NDArray[np.bool_]) -> tuple[float, float]:
    """The area under the ROC curve, and its standard error; that of a guess where a side has fewer than two."""
    area = area_under_curve(scores[included], scores[~included])
    place = np.unique(scores, return_inverse=True)[1]
    outside, inside = (np.bincount(place[side], minlength=place.max() + 1) for side in (~included, included))
    error = auc_error(outside.astype(np.float64), inside.astype(np.float64))
    return (area, error) if area is not None and error is not None else (0.5, 0.5)
