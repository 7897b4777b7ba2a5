from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from locum.common.plan import Plan
from locum.site_client.privacy.sampling import PoissonSampler, rate_of, steps_of
from tests.site_client.privacy.private_plans import private

_DRAWS = 20_000


def _included(sampler: PoissonSampler, count: int) -> np.ndarray[Any, Any]:
    """Draws × patients: who took part. A patient's cases begin at a hundred times its number."""
    found = np.zeros((_DRAWS, count), bool)
    for draw in range(_DRAWS):
        found[draw, [cases[0] // 100 for cases in sampler.draw()]] = True
    return found


def test_patients_are_drawn_by_themselves_however_many_images_they_have() -> None:
    counts, rate = [1, 50, 1, 2, 1, 7, 1, 1], 0.3
    patients = [[100 * i + j for j in range(count)] for i, count in enumerate(counts)]
    found = _included(PoissonSampler(patients, rate), len(counts))
    allowed = 5 * math.sqrt(rate * (1 - rate) / _DRAWS)
    assert found.mean(axis=0) == pytest.approx(rate, abs=allowed)
    together = np.corrcoef(found.T.astype(float)) - np.eye(len(counts))
    assert np.abs(together).max() < 5 / math.sqrt(_DRAWS)
    after = np.corrcoef(found[:-1, 0], found[1:, 0])[0, 1]
    assert abs(after) < 5 / math.sqrt(_DRAWS)


def test_the_size_of_a_draw_is_binomial() -> None:
    sizes = _included(PoissonSampler([[100 * i] for i in range(20)], 0.2), 20).sum(axis=1)
    observed = np.bincount(sizes, minlength=21)
    expected = _DRAWS * stats.binom.pmf(np.arange(21), 20, 0.2)
    common = expected > 10
    assert (
        stats.chisquare(
            [*observed[common], observed[~common].sum()], [*expected[common], expected[~common].sum()]
        ).pvalue
        > 1e-6
    )
    assert observed[0] > 0  # 0.8 ** 20: one in ninety draws nobody


def test_each_image_of_a_patient_is_as_likely_as_another_and_none_is_drawn_twice() -> None:
    sampler = PoissonSampler([list(range(6))], 1.0, images=2)
    drawn = [sampler.draw()[0] for _ in range(6000)]
    assert all(len(set(cases)) == 2 for cases in drawn)
    counts = np.bincount([case for cases in drawn for case in cases])
    assert counts == pytest.approx(2000, abs=5 * math.sqrt(6000 * 2 / 9))


def test_a_patient_with_few_images_gives_all_of_them() -> None:
    assert PoissonSampler([[4, 5], [6]], 1.0, images=8).draw() == [[4, 5], [6]]


def test_draws_are_not_the_same_again() -> None:
    patients = [[i] for i in range(200)]
    assert PoissonSampler(patients, 0.5).draw() != PoissonSampler(patients, 0.5).draw()


def _of(batch: int, **steps: int) -> Plan:
    return private(training={"input_size": [16, 16, 8], "batch_size": batch, **steps})


def test_rate_and_steps_follow_from_the_plan_and_the_number_of_patients() -> None:
    assert rate_of(_of(4, local_steps=3), 40) == 0.1
    assert rate_of(_of(4, local_steps=3), 3) == 1.0
    assert steps_of(_of(4, local_steps=3), 0.1) == 3
    for batch in (1, 3, 4, 7, 32):
        plan = _of(batch, local_epochs=2)
        for patients in range(1, 500):
            assert steps_of(plan, rate_of(plan, patients)) == 2 * math.ceil(patients / batch)
