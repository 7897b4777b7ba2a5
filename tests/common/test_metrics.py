from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_roc_auc
from sklearn.metrics import roc_auc_score

from locum.common import names
from locum.common.build import metric_of
from locum.common.metrics import Outcomes, bootstrap, join

EMPTY = np.zeros((0, 0))


def _classified(seed: int, count: int = 60, classes: int = 2, ties: bool = False) -> Outcomes:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    labels[:classes] = range(classes)
    raw = rng.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    scores = np.exp(raw) / np.exp(raw).sum(axis=1, keepdims=True)
    if ties:
        scores = np.round(scores, 1)
    patients = tuple(f"p{number // 2}" for number in range(count))
    return Outcomes(patients, labels.astype(np.int64), scores, EMPTY, EMPTY)


def _segmented(seed: int, count: int = 12) -> Outcomes:
    rng = np.random.default_rng(seed)
    dice, surface = rng.uniform(size=(count, 2)), rng.uniform(0, 5, size=(count, 2))
    dice[rng.uniform(size=dice.shape) < 0.1] = np.nan
    return Outcomes(tuple(map(str, range(count))), np.zeros(0, np.int64), EMPTY, dice, surface)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_scikit_learn_and_of_monai(seed: int, ties: bool) -> None:
    found = _classified(seed, ties=ties)
    ours = metric_of("AUC").exact(found, 2)
    assert ours == pytest.approx(roc_auc_score(found.labels, found.scores[:, 1]), abs=1e-12)
    theirs = compute_roc_auc(torch.from_numpy(found.scores[:, 1]), torch.from_numpy(found.labels))
    assert ours == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_auc_of_several_classes_is_the_mean_of_one_against_the_rest(seed: int) -> None:
    found = _classified(seed, classes=3)
    areas = [roc_auc_score(found.labels == c, found.scores[:, c]) for c in range(3)]
    assert metric_of("AUC").exact(found, 3) == pytest.approx(np.mean(areas))


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from(["AUC", "accuracy", "confusion"]))
@settings(deadline=None)
def test_sums_over_sites_give_the_metric_of_all_cases_together(seed: int, sites: int, name: str) -> None:
    metric = metric_of(name)
    parts = [_classified(seed + site, count=20 + site, classes=3) for site in range(sites)]
    summed = metric.value(np.sum([metric.sums(part, 3) for part in parts], axis=0), 3)
    assert np.allclose(summed, metric.exact(join(parts), 3), atol=0.02 if name == "AUC" else 1e-12)


@given(st.integers(0, 10_000), st.sampled_from(["Dice", "surface_distance"]))
def test_sums_of_segmentations_give_the_mean_over_all_cases(seed: int, name: str) -> None:
    metric = metric_of(name)
    parts = [_segmented(seed), _segmented(seed + 1)]
    values = np.concatenate([part.dice if name == "Dice" else part.surface for part in parts])
    summed = metric.value(sum(metric.sums(part, 3) for part in parts), 3)
    assert summed == pytest.approx(np.nanmean(values, axis=0).mean())


def test_the_histogram_auc_of_two_thousand_cases_is_within_two_thousandths_of_the_exact_one() -> None:
    found = _classified(0, count=2000)
    metric = metric_of("AUC")
    assert metric.value(metric.sums(found, 2), 2) == pytest.approx(metric.exact(found, 2), abs=0.002)


def test_a_metric_that_does_not_exist_is_none_and_not_a_number() -> None:
    one_class = Outcomes(("a", "b"), np.zeros(2, np.int64), np.full((2, 2), 0.5), EMPTY, EMPTY)
    for metric in (metric_of("AUC"),):
        assert metric.exact(one_class, 2) is None
        assert metric.value(metric.sums(one_class, 2), 2) is None
    nothing = Outcomes((), np.zeros(0, np.int64), EMPTY, EMPTY, EMPTY)
    for name in names.METRICS:
        metric = metric_of(name)
        if name != "confusion":
            assert metric.value(metric.sums(nothing, 3), 3) is None
            assert metric.exact(nothing, 3) is None
    assert join([]).patients == ()


def test_the_interval_resamples_patients_and_not_images() -> None:
    found = _classified(1, count=40)
    doubled = join([found, found])
    rng = np.random.default_rng
    assert bootstrap(metric_of("accuracy"), doubled, 2, rng=rng(0)) == pytest.approx(
        bootstrap(metric_of("accuracy"), found, 2, rng=rng(0)), abs=1e-12
    )


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, hits, truth = np.random.default_rng(0), 0, 0.8
    for _ in range(150):
        labels = rng.integers(2, size=80)
        right = rng.uniform(size=80) < truth
        scores = np.eye(2)[np.where(right, labels, 1 - labels)]
        found = Outcomes(tuple(map(str, range(80))), labels, scores, EMPTY, EMPTY)
        interval = bootstrap(metric_of("accuracy"), found, 2, rng=rng, draws=200)
        assert interval is not None
        hits += interval[0] <= truth <= interval[1]
    assert 0.88 <= hits / 150 <= 0.99
