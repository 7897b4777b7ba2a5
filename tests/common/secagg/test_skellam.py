"""Noise: it has Skellam's distribution, to the last bits, and comes from the key stream alone."""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from locum.common.secagg import skellam
from locum.common.secagg.masks import SEED_BYTES, Stream
from locum.common.secagg.ring import CHUNK
from locum.common.secagg.skellam import LEAST_VARIANCE, Skellam

#: Blocks of one number, of two, of eight, and of more than a float can tell apart.
VARIANCES = [LEAST_VARIANCE, 20_000.5, 1e6, 3.7e14, 2.0**100]


def drawn(variance: float, count: int, seed: int = 0) -> NDArray[np.int64]:
    found, stream = np.empty(count, np.int64), Stream(seed.to_bytes(SEED_BYTES, "big"))
    for start in range(0, count, CHUNK):
        skellam.of(variance).fill(found[start : start + CHUNK], stream)
    return found


@pytest.mark.parametrize("variance", [LEAST_VARIANCE, 20_000.5, 100_000.0])
def test_numbers_are_as_frequent_as_the_distribution_says(variance: float) -> None:
    count, edges = 40 * CHUNK, np.arange(-8.0, 8.25, 0.25) * np.sqrt(variance)
    found = np.histogram(drawn(variance, count), [-np.inf, *edges, np.inf])[0]
    below = stats.skellam.cdf(np.ceil(edges) - 1, variance / 2, variance / 2)
    expected = count * np.diff([0, *below, 1])
    usual = expected > 20
    statistic = ((found - expected)[usual] ** 2 / expected[usual]).sum()
    assert stats.chi2.sf(statistic, usual.sum() - 1) > 1e-4
    assert found[~usual].sum() <= 20 + 3 * expected[~usual].sum()


@pytest.mark.parametrize("variance", [LEAST_VARIANCE, 20_000.5])
def test_single_numbers_are_as_frequent_as_the_distribution_says(variance: float) -> None:
    # Within a block numbers are kept by their odds: a mistake there would not show in coarse cells.
    count = 40 * CHUNK
    found = drawn(variance, count, seed=1)
    numbers = np.arange(-2 * int(np.sqrt(variance)), 2 * int(np.sqrt(variance)) + 1)
    counted = np.bincount(found[np.abs(found) <= numbers[-1]] - numbers[0], minlength=numbers.size)
    expected = count * special.ive(np.abs(numbers), variance)
    statistic = ((counted - expected) ** 2 / expected).sum() + (
        (count - counted.sum()) - (count - expected.sum())
    ) ** 2 / (count - expected.sum())
    assert stats.chi2.sf(statistic, numbers.size) > 1e-4


@pytest.mark.parametrize("variance", VARIANCES)
def test_mean_variance_and_kurtosis_are_those_of_the_distribution(variance: float) -> None:
    count = 16 * CHUNK
    found = drawn(variance, count, seed=2) / np.sqrt(variance)
    assert abs(found.mean()) < 5 / np.sqrt(count)
    assert abs(found.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs(stats.kurtosis(found) - 1 / variance) < 5 * np.sqrt(24 / count)


@pytest.mark.parametrize("variance", VARIANCES[:4])
def test_probabilities_keep_the_recurrence_of_bessel_functions(variance: float) -> None:
    # I_{k−1} − I_{k+1} = 2k/μ · I_k (DLMF 10.29.1); of its solutions only I_k becomes small as k grows.
    deviation = int(np.sqrt(variance))
    with localcontext(prec=60):
        for k in (1, deviation // 3, deviation, 4 * deviation, 10 * deviation):
            before, here, after = (skellam._density(k + step, variance) for step in (-1, 0, 1))
            assert abs(before - after - 2 * k / Decimal(variance) * here) < here * Decimal(2) ** -100


@pytest.mark.parametrize("variance", VARIANCES[:3])
def test_probabilities_are_those_of_scipy(variance: float) -> None:
    numbers = np.array([0, 1, 7, int(np.sqrt(variance)), 5 * int(np.sqrt(variance))])
    exact = np.array([float(skellam._density(int(k), variance) / skellam._density(0, variance)) for k in numbers])
    floating = np.exp(skellam._log_density(numbers, variance) - skellam._log_density(np.zeros(1), variance))
    assert exact == pytest.approx(special.ive(numbers, variance) / special.ive(0, variance), rel=1e-11)
    assert floating == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_table_of_blocks_is_exact_to_more_than_a_hundred_bits(variance: float) -> None:
    found = Skellam(variance)
    blocks = np.arange(skellam._BLOCKS)
    masses = [0] * skellam._BLOCKS
    for column, (cut, finer, alias) in enumerate(zip(found._cut, found._finer, found._alias, strict=True)):
        own = (int(cut) << 64) | int(finer)
        masses[column] += own
        masses[int(alias)] += skellam._COLUMN - own
    assert sum(masses) == skellam._BLOCKS * skellam._COLUMN
    with localcontext(prec=60):
        wanted = [skellam._density(int(k), variance) for k in found._nearest(blocks)]
        whole = sum(wanted, Decimal(0))
        apart = sum(abs(m / Decimal(sum(masses)) - w / whole) for m, w in zip(masses, wanted, strict=True)) / 2
    assert apart < Decimal(2) ** -100


@pytest.mark.parametrize("variance", VARIANCES)
def test_blocks_reach_beyond_sixteen_standard_deviations(variance: float) -> None:
    found = Skellam(variance)
    outermost = found._farthest(np.array([0, skellam._BLOCKS - 1]))
    assert outermost[0] == -outermost[1] - 1
    assert outermost[1] + 1 >= 16 * np.sqrt(variance)
    # What is left out is rarer than a tenth of what may differ (Chernoff's bound, by Bernstein's form).
    reach = float(outermost[1] + 1)
    assert 2 * np.exp(-(reach**2) / (2 * (variance + reach / 3))) < skellam.DISTANCE / 10


@pytest.mark.parametrize("variance", VARIANCES[1:])
def test_what_is_kept_without_a_look_is_below_the_least_odds_of_its_block(variance: float) -> None:
    found = Skellam(variance)
    for block in np.arange(0, skellam._BLOCKS, 37):
        near, far = found._nearest(block), found._farthest(block)
        with localcontext(prec=60):
            least = skellam._density(int(far), variance) / skellam._density(int(near), variance)
            assert int(found._surely[block]) <= least * 2**64


def test_exact_arithmetic_decides_as_floating_point_where_that_can_tell() -> None:
    found = Skellam(1e6)
    for number, near in ((5, 0), (-6, -1), (2047, 2040), (-4000, -3993)):
        odds = special.ive(abs(number), 1e6) / special.ive(abs(near), 1e6)
        for factor, kept in ((1 - 1e-9, True), (1 + 1e-9, False)):
            assert found._exactly_kept(number, near, int(odds * factor * 2**64) << 64) is kept


class Scripted(Stream):
    """A stream of chosen words."""

    def __init__(self, *words: int) -> None:
        super().__init__(bytes(SEED_BYTES))
        self.words = list(words)

    def fill(self, out: NDArray[np.uint64]) -> None:
        out[...] = [self.words.pop(0) for _ in out]


def test_a_tie_is_decided_by_the_next_word() -> None:
    found = Skellam(LEAST_VARIANCE)
    column = int(np.flatnonzero((found._cut > 0) & (found._alias != np.arange(skellam._BLOCKS)))[0])
    word = column << 52 | int(found._cut[column])
    finer, own, other = int(found._finer[column]), column - 2048, int(found._alias[column]) - 2048
    for words, number in (
        ([word - 1], own),
        ([word + 1], other),
        ([word, finer - 1], own),
        ([word, finer], other),
    ):
        out = np.empty(1, np.int64)
        found.fill(out, Scripted(*words))
        assert out[0] == number


def test_a_near_miss_is_decided_by_the_next_word() -> None:
    found = Skellam(1e6)
    block, within = 2048 + 100, 7
    near, far = 800, 807
    with localcontext(prec=60):
        odds = skellam._density(far, 1e6) / skellam._density(near, 1e6) * (1 << 128)
    high, low = divmod(int(odds), 1 << 64)
    for more, kept in ((low - 1, True), (low + 1, False)):
        # The block is its column's own; a number that is not kept is drawn again: block 2048, number 0, kept.
        again = [] if kept else [2048 << 52, 0, 0]
        stream, out = Scripted(block << 52, within, high, more, *again), np.empty(1, np.int64)
        found.fill(out, stream)
        assert (out[0], stream.words) == (far if kept else 0, [])


def test_the_sum_of_noises_is_noise_of_the_summed_variance() -> None:
    parts = [drawn(variance, 16 * CHUNK, seed) for seed, variance in enumerate((5000.0, 7000.0, 8000.5))]
    together = stats.skellam(20_000.5 / 2, 20_000.5 / 2)
    edges = np.arange(-4.0, 4.25, 0.25) * np.sqrt(20_000.5)
    found = np.histogram(sum(parts), [-np.inf, *edges, np.inf])[0]
    expected = 16 * CHUNK * np.diff([0, *together.cdf(np.ceil(edges) - 1), 1])
    assert stats.chi2.sf(((found - expected) ** 2 / expected).sum(), found.size - 1) > 1e-4


def test_the_same_stream_gives_the_same_noise_and_another_another() -> None:
    first, again, other = (drawn(1e6, 1000, seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert np.mean(first == other) < 0.05


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_noise_is_added_in_the_ring(dtype: str) -> None:
    elements = np.array([0, 5, 2**32 - 1], dtype)
    skellam.add(elements, np.array([-1, 2**40 - 3, 1]))
    size = 2 ** (8 * elements.itemsize)
    assert elements.tolist() == [size - 1, (2**40 + 2) % size, 2**32 % size]


@pytest.mark.parametrize("variance", [0.0, 100.0, LEAST_VARIANCE - 1, 2.0**107])
def test_a_variance_that_cannot_be_drawn_exactly_is_refused(variance: float) -> None:
    with pytest.raises(ValueError, match="cannot be drawn exactly"):
        Skellam(variance)
