from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from locum.common.build import metric_of
from locum.common.errors import Code, SiteFailure
from locum.common.metrics import Outcomes
from locum.site_client.operations import OPERATIONS
from locum.site_client.privacy.measures import noised_sums
from locum.site_client.privacy.noise import NoiseSource
from locum.site_client.session import open_session
from locum.site_client.settings import Settings
from tests.plans import initial
from tests.site_client.asking import segmentation_plan
from tests.site_client.privacy.private_plans import private

_EMPTY = np.zeros((0, 0))


def _classified(patients: list[str], labels: list[int], chances: list[float]) -> Outcomes:
    scores = np.stack([1 - np.array(chances), np.array(chances)], axis=1)
    return Outcomes(tuple(patients), np.array(labels), scores, _EMPTY, _EMPTY)


def _outcomes(count: int, seed: int = 1) -> Outcomes:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    chances = np.clip(0.5 + 0.25 * (2 * labels - 1) + 0.4 * rng.standard_normal(count), 0.01, 0.99)
    return _classified([f"p{i}" for i in range(count)], labels.tolist(), chances.tolist())


def test_a_patient_counts_once_however_many_cases() -> None:
    of = private(evaluation={"metrics": ["confusion"]})
    found = _classified(["a"] * 50 + ["b"], [1] * 51, [0.9] * 50 + [0.1])
    sums = noised_sums(of, found, multiplier=1e-6, noise=NoiseSource())
    assert sums["confusion"] == pytest.approx([0, 0, 1, 1], abs=1e-3)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", ["AUC", "accuracy", "confusion", "calibration", "ECE", "Brier"])
def test_no_case_has_sums_longer_than_the_bound(name: str, classes: int) -> None:
    metric, rng = metric_of(name), np.random.default_rng(0)
    assert metric.bound is not None
    longest = 0.0
    for scores in [*rng.dirichlet([0.1] * classes, 300), *np.eye(classes)]:
        for label in range(classes):
            one = Outcomes(("p",), np.array([label]), scores[None], _EMPTY, _EMPTY)
            longest = max(longest, float(np.linalg.norm(metric.sums(one, classes))))
    assert 0.9 * metric.bound(classes) < longest <= metric.bound(classes) + 1e-12


def test_no_case_has_a_dice_longer_than_the_bound() -> None:
    metric = metric_of("Dice")
    assert metric.bound is not None
    one = Outcomes(("p",), np.zeros(0, np.int64), _EMPTY, np.ones((1, 3)), np.ones((1, 3)))
    assert np.linalg.norm(metric.sums(one, 4)) == pytest.approx(metric.bound(4))


def test_noise_has_the_scale_of_the_joint_bound() -> None:
    of = private(evaluation={"metrics": ["accuracy", "Brier", "calibration"]})
    found = _outcomes(300)
    joint = math.sqrt(1 + 3 + 3)
    exact = metric_of("accuracy").sums(found, 2)
    assert exact.min() > 15  # far from zero, where nothing is cut
    tries = [noised_sums(of, found, multiplier=1.0, noise=NoiseSource())["accuracy"] - exact for _ in range(60)]
    assert np.std(tries) == pytest.approx(joint, rel=5 / math.sqrt(2 * 240))


def test_nothing_is_told_below_zero() -> None:
    of = private()
    sums = noised_sums(of, _outcomes(5), multiplier=20.0, noise=NoiseSource())
    assert min(array.min() for array in sums.values()) == 0.0


def test_an_area_survives_noise_because_bins_are_merged() -> None:
    of, found = private(evaluation={"metrics": ["AUC"]}), _outcomes(400)
    sums = noised_sums(of, found, multiplier=1.5, noise=NoiseSource())["AUC"]
    assert len(sums) == metric_of("AUC").length(2)
    assert np.count_nonzero(sums) <= 4 * 32
    assert metric_of("AUC").value(sums, 2) == pytest.approx(metric_of("AUC").exact(found, 2), abs=0.2)
    clean = noised_sums(of, found, multiplier=1e-6, noise=NoiseSource())["AUC"]
    assert metric_of("AUC").value(clean, 2) == pytest.approx(metric_of("AUC").exact(found, 2), abs=0.02)


def test_only_released_metrics_are_made_and_pay() -> None:
    release = {"training_loss": False, "metrics": ["accuracy"]}
    of, found = private(evaluation={"metrics": ["accuracy", "Brier"]}, release=release), _outcomes(300)
    tries = [noised_sums(of, found, multiplier=1.5, noise=NoiseSource()) for _ in range(80)]
    assert all(set(sums) == {"accuracy"} for sums in tries)
    assert np.std([sums["accuracy"] for sums in tries], axis=0).mean() == pytest.approx(1.5, rel=0.25)


def test_a_metric_without_bound_is_refused() -> None:
    of = segmentation_plan(
        protection={"secure_aggregation": "off", "differential_privacy": {
            "epsilon": 2.0, "delta": 1e-3, "clip": 1.0, "metrics_epsilon": 1.0}},
        release={"training_loss": False},
    )  # fmt: skip
    with pytest.raises(SiteFailure, match="no bound") as refused:
        noised_sums(of, _outcomes(1), multiplier=1.0, noise=NoiseSource())
    assert refused.value.code is Code.PRIVACY_REFUSED


def test_a_site_tells_patients_and_noised_sums(settings: Settings) -> None:
    of = private(contract__split={"train": 0.6, "validation": 0.2, "test": 0.2})
    session = open_session(settings, of)
    told, sums = OPERATIONS["evaluate"](session, {"round": 0, "fold": "test", "private": {"noise": 1.0}}, initial(of))
    assert told == {"cases": len({case.patient for case in session.cases["test"]})}
    assert set(sums) == {"AUC", "accuracy"}


def test_where_nothing_is_released_nothing_is_made_and_no_noise_is_needed(settings: Settings) -> None:
    of = private(release={"training_loss": False, "metrics": []})
    _, sums = OPERATIONS["evaluate"](open_session(settings, of), {"round": 0, "fold": "train"}, initial(of))
    assert sums == {}


@pytest.mark.parametrize("released", [["AUC", "accuracy"], []])
def test_no_model_makes_a_failure_of_what_an_image_shows(released: list[str], settings: Settings) -> None:
    of = private(release={"training_loss": False, "metrics": released})
    model = {name: np.full_like(array, np.inf) for name, array in initial(of).items()}
    request = {"round": 0, "fold": "train", **({"private": {"noise": 1.0}} if released else {})}
    _, sums = OPERATIONS["evaluate"](open_session(settings, of), request, model)
    assert set(sums) == set(released)
    assert all(np.isfinite(array).all() for array in sums.values())


def test_where_nothing_is_released_no_image_is_looked_at(settings: Settings) -> None:
    of = private(release={"training_loss": False, "metrics": []})
    session = open_session(settings, of)
    told, _ = OPERATIONS["evaluate"](session, {"round": 0, "fold": "train"}, initial(of))
    assert told == {"cases": len({case.patient for case in session.cases["train"]})}
    session.cases = {**session.cases, "test": tuple(replace(c, image=Path("/gone")) for c in session.cases["train"])}
    assert OPERATIONS["evaluate"](session, {"round": 0, "fold": "test"}, initial(of))[0] == told
    session.cases = {**session.cases, "test": ()}
    with pytest.raises(SiteFailure) as nobody:
        OPERATIONS["evaluate"](session, {"round": 0, "fold": "test"}, initial(of))
    assert nobody.value.code is Code.NO_DATA
