from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from locum.site_client.privacy.noise import NoiseSource

_MANY = 1_000_000


def test_noise_is_gaussian_of_the_deviation_asked_for() -> None:
    noise = NoiseSource().gaussian(_MANY, 2.5)
    assert noise.dtype == np.float32
    assert stats.kstest(noise / 2.5, "norm").pvalue > 1e-6
    assert noise.std() == pytest.approx(2.5, rel=5 / math.sqrt(2 * _MANY))
    assert abs(noise.mean()) < 5 * 2.5 / math.sqrt(_MANY)


def test_noise_reaches_as_far_as_gaussian_noise_does() -> None:
    noise = np.abs(NoiseSource().gaussian(4 * _MANY, 1.0))
    for far in (3.0, 4.0, 4.5):
        expected = 4 * _MANY * 2 * stats.norm.sf(far)
        assert np.count_nonzero(noise > far) == pytest.approx(expected, abs=6 * math.sqrt(expected))


def test_numbers_of_a_source_are_independent() -> None:
    """The two of a pair, neighbours, and those of the next piece; their squares too, for one radius makes a pair."""
    noise = NoiseSource().gaussian(_MANY, 1.0).astype(np.float64)
    for lag in (1, 2, 4096, 8192, 16384):
        for of in (noise, noise**2 - 1):
            correlation = np.corrcoef(of[:-lag], of[lag:])[0, 1]
            assert abs(correlation) < 6 / math.sqrt(_MANY)


def test_no_two_sources_give_the_same_and_a_seed_does() -> None:
    assert not np.array_equal(NoiseSource().gaussian(100, 1.0), NoiseSource().gaussian(100, 1.0))
    seed = os.urandom(32)
    first, second = NoiseSource(seed), NoiseSource(seed)
    assert np.array_equal(first.gaussian((7, 9), 1.0), second.gaussian((7, 9), 1.0))
    assert not np.array_equal(first.gaussian(100, 1.0), second.gaussian((7, 9), 1.0).ravel()[:1])


def test_noise_does_not_come_from_the_generators_of_libraries() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is what must not matter
    first, state = NoiseSource().gaussian(100, 1.0), torch.get_rng_state()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert not np.array_equal(first, NoiseSource().gaussian(100, 1.0))
    assert torch.equal(state, torch.get_rng_state())


def test_the_sum_lies_on_a_grid_that_does_not_depend_on_what_is_in_it() -> None:
    rng = np.random.default_rng(1)
    grid = 2.0 ** math.floor(math.log2(0.7 * 2**-20))
    for total in (np.zeros(50_000), rng.standard_normal(50_000) / 3, np.full(50_000, 1 / 3)):
        noised = NoiseSource().noised(total.astype(np.float32), 0.7).astype(np.float64)
        assert np.array_equal(noised, np.rint(noised / grid) * grid)


def test_noise_is_added_to_what_is_there_and_the_given_array_stays() -> None:
    total = np.linspace(-5, 5, 200_000, dtype=np.float32).reshape(1000, 200)
    before = total.copy()
    left = NoiseSource().noised(total, 0.01) - total
    assert left.shape == total.shape
    assert left.std() == pytest.approx(0.01, rel=0.02)
    assert np.array_equal(total, before)


@pytest.mark.parametrize("std", [0.0, -1.0, math.inf, math.nan])
def test_no_noise_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        NoiseSource().gaussian(3, std)


def test_the_source_has_a_name_for_the_report() -> None:
    assert NoiseSource.name == "AES-256-CTR, Box–Muller, seeded by the operating system"
