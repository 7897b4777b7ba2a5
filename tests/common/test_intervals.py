"""Intervals from sums: equal to those from the cases, and right about as often as they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t

from locum.common.build import metric_of
from locum.common.intervals import Moments, auc_error, logit, student, wilson
from locum.common.metrics import Outcomes

EMPTY = np.zeros((0, 0))


def classified(labels: np.ndarray, scores: np.ndarray) -> Outcomes:
    return Outcomes(tuple(map(str, range(len(labels)))), labels.astype(np.int64), scores, EMPTY, EMPTY)


def of_chance(labels: np.ndarray, chance: np.ndarray) -> Outcomes:
    return classified(labels, np.stack([1 - chance, chance], axis=1))


def segmented(dice: np.ndarray) -> Outcomes:
    return Outcomes(tuple(map(str, range(len(dice)))), np.zeros(0, np.int64), EMPTY, dice, dice)


@given(st.integers(0, 400), st.integers(1, 400))
def test_the_interval_of_a_share_is_wilsons(successes: int, more: int) -> None:
    total = successes + more
    found = wilson(successes, total)
    expected = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


def delong(positive: np.ndarray, negative: np.ndarray) -> float:
    """The standard error by all pairs, as DeLong et al. write it."""
    pairs = (positive[:, None] > negative[None, :]) + 0.5 * (positive[:, None] == negative[None, :])
    of_positive, of_negative = pairs.mean(axis=1), pairs.mean(axis=0)
    return float(np.sqrt(of_positive.var(ddof=1) / len(positive) + of_negative.var(ddof=1) / len(negative)))


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(2, 30), st.integers(2, 40))
def test_the_error_of_an_auc_is_delongs_also_where_scores_tie(seed: int, a: int, b: int, values: int) -> None:
    rng = np.random.default_rng(seed)
    positive, negative = rng.integers(values, size=a), rng.integers(values, size=b)
    histograms = [np.bincount(x, minlength=values).astype(float) for x in (negative, positive)]
    assert auc_error(*histograms) == pytest.approx(delong(positive, negative), abs=1e-9)


def test_the_interval_of_an_auc_from_sums_is_about_the_bootstraps() -> None:
    rng = np.random.default_rng(5)
    labels = (np.arange(300) % 3 == 0).astype(np.int64)
    chance = norm.cdf(rng.normal(size=300) + 1.2 * labels - 0.8)
    found, metric = of_chance(labels, chance), metric_of("AUC")
    assert metric.interval is not None
    draws = [rng.integers(300, size=300) for _ in range(400)]
    low, high = np.percentile([metric.exact(found.take(rows), 2) for rows in draws], [2.5, 97.5])
    assert metric.interval(metric.sums(found, 2), 2) == pytest.approx((low, high), abs=0.02)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=60).filter(lambda values: np.ptp(values) > 0.01))
def test_the_interval_of_one_mean_is_students(values: list[float]) -> None:
    x, n = np.array(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * float(x.std(ddof=1)) / n**0.5
    found = student([Moments(n, float(x.sum()), float((x**2).sum()))], least=-9)
    assert found == pytest.approx((x.mean() - half, x.mean() + half), abs=0.01 * half)


@pytest.mark.parametrize("name", ["AUC", "accuracy", "Dice", "surface_distance", "Brier"])
def test_too_few_cases_have_no_interval(name: str) -> None:
    metric = metric_of(name)
    assert metric.interval is not None
    nothing = Outcomes((), np.zeros(0, np.int64), EMPTY, EMPTY, EMPTY)
    assert metric.interval(metric.sums(nothing, 2), 2) is None
    two = segmented(np.array([[0.5], [0.7]])) if name in {"Dice", "surface_distance"} else None
    two = two or of_chance(np.array([0, 1]), np.array([0.2, 0.9]))
    if name != "accuracy":
        assert metric.interval(metric.sums(two, 2), 2) is None


def test_what_does_not_vary_has_no_interval() -> None:
    assert logit(1.0, 0.0) is None
    assert student([Moments(5, 5.0, 5.0)]) is None


# --- how often they hold the truth

Draw = Callable[[np.random.Generator], Outcomes]
N = 60


def _auc(rng: np.random.Generator) -> Outcomes:
    """Two normal classes 1.5 apart: the area is Φ(1.5 / √2)."""
    labels = (np.arange(N) < N // 3).astype(np.int64)
    return of_chance(labels, norm.cdf(rng.normal(size=N) + 1.5 * labels - 0.75))


def _accuracy(rng: np.random.Generator) -> Outcomes:
    labels = rng.integers(2, size=N)
    return classified(labels, np.eye(2)[np.where(rng.uniform(size=N) < 0.9, labels, 1 - labels)])


def _dice(rng: np.random.Generator) -> Outcomes:
    return segmented(rng.beta(8, 2, size=(20, 1)))


def _brier(rng: np.random.Generator) -> Outcomes:
    """A calibrated model: E[(p − y)²] = E[p(1 − p)] = 1/6 of a uniform p."""
    chance = rng.uniform(size=N)
    return of_chance((rng.uniform(size=N) < chance).astype(np.int64), chance)


TRUTHS: dict[str, tuple[Draw, float]] = {
    "AUC": (_auc, float(norm.cdf(1.5 / 2**0.5))),
    "accuracy": (_accuracy, 0.9),
    "Dice": (_dice, 0.8),
    "Brier": (_brier, 1 / 6),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_an_interval_holds_the_truth_in_about_95_of_100_studies(name: str) -> None:
    draw, truth = TRUTHS[name]
    metric, rng, held, studies = metric_of(name), np.random.default_rng(20), 0, 600
    assert metric.interval is not None
    for _ in range(studies):
        interval = metric.interval(metric.sums(draw(rng), 2), 2)
        assert interval is not None
        held += interval[0] <= truth <= interval[1]
    # Within three standard errors of 95 %: 2.7 points.
    assert 0.923 <= held / studies <= 0.977


def test_the_interval_of_a_mean_over_classes_that_vary_apart_is_wide_enough() -> None:
    metric, rng, held = metric_of("Dice"), np.random.default_rng(3), 0
    assert metric.interval is not None
    for _ in range(300):
        interval = metric.interval(metric.sums(segmented(rng.beta(8, 2, size=(20, 3))), 4), 4)
        assert interval is not None
        held += interval[0] <= 0.8 <= interval[1]
    assert held / 300 >= 0.95


def _three(rng: np.random.Generator, cases: int) -> Outcomes:
    labels = np.arange(cases) % 3
    raw = np.exp(rng.normal(size=(cases, 3)) + np.eye(3)[labels])
    return classified(labels, raw / raw.sum(axis=1, keepdims=True))


def test_the_interval_of_a_mean_of_areas_is_wide_enough() -> None:
    metric, rng, held = metric_of("AUC"), np.random.default_rng(4), 0
    truth = metric.exact(_three(rng, 120_000), 3)
    assert metric.interval is not None
    assert isinstance(truth, float)
    for _ in range(300):
        interval = metric.interval(metric.sums(_three(rng, N), 3), 3)
        assert interval is not None
        held += interval[0] <= truth <= interval[1]
    assert held / 300 >= 0.95


def test_sums_do_not_know_that_two_cases_are_of_one_patient() -> None:
    """The limit that the card tells: an interval of the same cases twice is narrower, and should not be."""
    found, metric = _auc(np.random.default_rng(1)), metric_of("AUC")
    assert metric.interval is not None
    once, twice = (metric.interval(times * metric.sums(found, 2), 2) for times in (1, 2))
    assert once is not None
    assert twice is not None
    assert twice[1] - twice[0] < 0.8 * (once[1] - once[0])


@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from(["AUC", "accuracy", "Brier"]))
@settings(deadline=None)
def test_the_interval_of_added_sums_is_that_of_all_cases_and_holds_the_value(seed: int, sites: int, name: str) -> None:
    rng, metric = np.random.default_rng(seed), metric_of(name)
    parts = [_auc(rng) for _ in range(sites)]
    whole = of_chance(
        np.concatenate([part.labels for part in parts]), np.concatenate([part.scores[:, 1] for part in parts])
    )
    added = np.sum([metric.sums(part, 2) for part in parts], axis=0)
    assert metric.interval is not None
    found, value = metric.interval(added, 2), metric.value(added, 2)
    assert found == pytest.approx(metric.interval(metric.sums(whole, 2), 2))
    assert found is not None
    assert isinstance(value, float)
    assert 0 <= found[0] <= value <= found[1] <= 1
