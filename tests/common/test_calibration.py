"""Calibration from sums: the tables and numbers that scikit-learn computes from the cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from locum.common.build import metric_of
from locum.common.calibration import BINS, error_of, reliability
from locum.common.metrics import Outcomes, Value, join

EMPTY = np.zeros((0, 0))


def outcomes(seed: int, *, count: int = 80, classes: int = 2) -> Outcomes:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    raw = rng.normal(size=(count, classes)) + np.eye(classes)[labels]
    scores = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    return Outcomes(tuple(map(str, range(count))), labels.astype(np.int64), scores, EMPTY, EMPTY)


def table_of(value: Value) -> list[list[float]]:
    assert isinstance(value, list)
    return value


@given(st.integers(0, 10_000))
def test_the_reliability_table_is_that_of_scikit_learn(seed: int) -> None:
    found = outcomes(seed)
    bins = [row for row in reliability(table_of(metric_of("calibration").exact(found, 2))) if row.cases]
    shares, chances = calibration_curve(found.labels, found.scores[:, 1], n_bins=BINS)
    assert [row.share for row in bins] == pytest.approx(list(shares))
    assert [row.chance for row in bins] == pytest.approx(list(chances))
    assert all(row.low <= (row.chance or 0) <= row.high for row in bins)


@given(st.integers(0, 10_000))
def test_the_brier_score_of_two_classes_is_that_of_scikit_learn(seed: int) -> None:
    found = outcomes(seed)
    assert metric_of("Brier").exact(found, 2) == pytest.approx(brier_score_loss(found.labels, found.scores[:, 1]))


def test_the_brier_score_of_more_classes_adds_up_their_squares() -> None:
    found = outcomes(3, classes=4)
    expected = ((found.scores - np.eye(4)[found.labels]) ** 2).sum(axis=1).mean()
    assert metric_of("Brier").exact(found, 4) == pytest.approx(expected)


def test_with_more_classes_the_bins_are_of_the_most_probable_one() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.75, 0.2, 0.05], [0.1, 0.0, 0.9]])
    found = Outcomes(("a", "b", "c"), np.array([0, 1, 2]), scores, EMPTY, EMPTY)
    table = table_of(metric_of("calibration").exact(found, 3))
    assert table[7] == pytest.approx([2, 1.45, 1])
    assert table[9] == pytest.approx([1, 0.9, 1])
    assert metric_of("ECE").exact(found, 3) == pytest.approx((abs(1.45 - 1) + abs(0.9 - 1)) / 3)


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["calibration", "ECE", "Brier"]))
def test_sums_over_sites_give_the_calibration_of_all_cases_together(seed: int, sites: int, name: str) -> None:
    metric = metric_of(name)
    parts = [outcomes(seed + site, count=10 + site) for site in range(sites)]
    summed = metric.value(np.sum([metric.sums(part, 2) for part in parts], axis=0), 2)
    assert np.allclose(summed, metric.exact(join(parts), 2), atol=1e-12)


def test_the_error_is_that_of_the_table_and_a_perfect_model_has_none() -> None:
    found = outcomes(1)
    table = table_of(metric_of("calibration").exact(found, 2))
    assert error_of(table) == pytest.approx(metric_of("ECE").exact(found, 2))
    labels = np.arange(20) % 2
    perfect = Outcomes(found.patients[:20], labels, np.eye(2)[labels], EMPTY, EMPTY)
    assert metric_of("ECE").exact(perfect, 2) == 0
    assert metric_of("Brier").exact(perfect, 2) == 0


def test_a_share_of_few_cases_has_a_wide_interval_and_an_empty_bin_none() -> None:
    rows = reliability([[2.0, 0.1, 1.0], [0.0, 0.0, 0.0]])
    assert rows[0].interval is not None
    assert rows[0].interval[1] - rows[0].interval[0] > 0.7
    assert (rows[1].share, rows[1].chance, rows[1].interval) == (None, None, None)


def test_a_table_with_noise_has_no_share_that_is_none() -> None:
    rows = reliability([[5.2, 2.1, 7.9], [-1.3, 0.2, 0.4], [4.0, 3.0, -0.5]])
    assert [row.interval for row in rows] == [None, None, None]
    assert rows[1].share is None
    assert error_of([[-1.0, 0.2, 0.4]]) is None
