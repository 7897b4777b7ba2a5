"""Site noise: what is promised is kept, by the accountant, by the sum of whoever survives, and by the ring."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from secrets import token_bytes

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from scipy import special

from locum.common.secagg import calibration
from locum.common.secagg.calibration import (
    HEADROOM,
    CapacityError,
    Promise,
    calibrated,
    epsilon,
    honest,
    least_variance,
)
from locum.common.secagg.masks import SEED_BYTES, Stream
from locum.common.secagg.ring import CHUNK, Bits, RingError, largest
from locum.common.secagg.roster import threshold_of, tolerated
from locum.common.secagg.upload import Layout
from tests.common.secagg.federation import Federation, given

PROMISE = Promise(epsilon=4.0, delta=1e-6, sums=20)


# --- the accountant


@pytest.mark.parametrize(("noise", "sums"), [(0.8, 1), (2.0, 10), (8.0, 100), (40.0, 1000)])
@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_fine_noise_costs_what_gaussian_noise_does(noise: float, sums: int, delta: float) -> None:
    l2 = 1e7
    found = epsilon((noise * l2) ** 2, delta, sums=sums, l1=1e3 * l2, l2=l2)
    accountant = RdpAccountant([float(order) for order in calibration._ORDERS])
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise), sums))
    assert found == pytest.approx(accountant.get_epsilon(delta), rel=1e-5)
    exact = pld.from_gaussian_mechanism(noise / math.sqrt(sums)).get_epsilon_for_delta(delta)
    assert exact <= found < 1.25 * exact


def _logs(variance: float, shift: int) -> Callable[[], tuple[dict[int, float], dict[int, float]]]:
    """Log probabilities of noise, and of noise that is shifted."""
    reach = int(12 * math.sqrt(variance)) + 40 + shift
    numbers = np.arange(-reach, reach + 1)
    logs = np.log(special.ive(np.abs(numbers), variance))
    return lambda: (dict(zip(numbers, logs, strict=True)), dict(zip(numbers + shift, logs, strict=True)))


def _exact(variance: float, shifts: tuple[int, ...], delta: float, sums: int) -> float:
    """ε from the distribution of the privacy loss, coordinate by coordinate."""
    found = None
    for shift in shifts:
        noise, shifted = _logs(variance, shift)()
        one = pld.from_two_probability_mass_functions(
            shifted, noise, pessimistic_estimate=False, value_discretization_interval=1e-4, symmetric=True
        ).self_compose(sums)
        found = one if found is None else found.compose(one)
    assert found is not None
    return float(found.get_epsilon_for_delta(delta))


@pytest.mark.parametrize("variance", [30.0, 200.0, 3000.0])
@pytest.mark.parametrize("shifts", [(1,), (7,), (3, 4), (1, 1, 1, 1, 2)])
@pytest.mark.parametrize("sums", [1, 5])
def test_the_accountant_bounds_the_privacy_loss_that_is_computed_number_by_number(
    variance: float, shifts: tuple[int, ...], sums: int
) -> None:
    l1, l2 = float(sum(shifts)), math.sqrt(sum(shift**2 for shift in shifts))
    bound = epsilon(variance, 1e-5, sums=sums, l1=l1, l2=l2)
    exact = _exact(variance, shifts, 1e-5, sums)
    assert exact <= bound
    if exact > 0.5:
        assert bound < 1.5 * exact


@pytest.mark.parametrize("sums", [1, 7])
def test_delta_is_bounded_as_its_definition_sums_it(sums: int) -> None:
    # sup over events of P(E) − e^ε·Q(E), for sums of noise: their total is as good as all of them (Skellam is closed).
    variance, shift = 400.0, 6
    l2 = float(shift)
    for delta in (1e-3, 1e-6):
        bound = epsilon(variance, delta, sums=sums, l1=l2, l2=l2)
        reach = int(14 * math.sqrt(sums * variance)) + sums * shift
        numbers = np.arange(-reach, reach + 1)
        noise = special.ive(np.abs(numbers), sums * variance)
        shifted = special.ive(np.abs(numbers - sums * shift), sums * variance)
        assert np.maximum(shifted - math.exp(bound) * noise, 0).sum() <= delta


@pytest.mark.parametrize("wanted", [0.05, 1.0, 8.0, 20.0])
def test_the_variance_found_is_enough_and_less_is_not(wanted: float) -> None:
    about = {"sums": 30, "l1": 1e6, "l2": 1e4}
    found = least_variance(wanted, 1e-6, **about)
    assert epsilon(found, 1e-6, **about) <= wanted < epsilon(found * (1 - 1e-9), 1e-6, **about)


def test_more_is_paid_for_more_sums_less_delta_and_coarser_steps() -> None:
    base = least_variance(2.0, 1e-6, sums=10, l1=1e4, l2=1e3)
    assert least_variance(2.0, 1e-6, sums=11, l1=1e4, l2=1e3) > base
    assert least_variance(2.0, 1e-7, sums=10, l1=1e4, l2=1e3) > base
    assert least_variance(2.0, 1e-6, sums=10, l1=1e6, l2=1e3) > base


# --- the honest survivors


@pytest.mark.parametrize(("sites", "least"), [(3, 2), (4, 2), (5, 2), (7, 3), (10, 4), (20, 7), (100, 34)])
def test_the_noise_of_so_many_sites_is_counted_on(sites: int, least: int) -> None:
    assert honest(sites) == least


@pytest.mark.parametrize("sites", [3, 4, 5, 6, 7, 10, 13, 20, 34, 100])
def test_a_sum_of_any_survivors_holds_the_noise_beyond_what_those_who_work_together_know(sites: int) -> None:
    size = 1_000_000
    found = calibrated(PROMISE, clip=2.0, bits=32, sites=sites, size=size)
    l2 = found.ring.scale * 2.0 + math.sqrt(size)
    for survivors in range(threshold_of(sites), sites + 1):
        for together in range(tolerated(sites) + 1):
            unknown = (survivors - together) * found.variance
            assert epsilon(unknown, PROMISE.delta, sums=20, l1=math.sqrt(size) * l2, l2=l2) <= PROMISE.epsilon
    fewer = (honest(sites) - 1) * found.variance
    assert epsilon(fewer, PROMISE.delta, sums=20, l1=math.sqrt(size) * l2, l2=l2) > PROMISE.epsilon


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("names", ["abc", "abcde"])
def test_a_sum_of_each_set_of_survivors_has_the_noise_of_each(names: str, bits: Bits) -> None:
    size = 5000
    federation = Federation(list(names), drawn=lambda _name: Stream(token_bytes(SEED_BYTES))).set_up()
    found = calibrated(PROMISE, clip=1.0, bits=bits, sites=len(names), size=size)
    layout = Layout(federation.roster, found.ring, size, federation.layout().lane, found.variance)
    update = given(np.random.default_rng(0).normal(0, 1 / math.sqrt(size), size))
    least = threshold_of(len(names))
    sets = [chosen for count in range(least, len(names) + 1) for chosen in combinations(names, count)]
    for survivors in sets:
        total = federation.copy().unmasked(layout, dict.fromkeys(survivors, update))
        exact = len(survivors) * update.update["w"]
        noise = (found.ring.read(total.update) - exact) * found.ring.scale
        expected = len(survivors) * found.variance
        assert abs(noise.var() / expected - 1) < 6 * math.sqrt(2 / size)
        assert abs(noise.mean()) < 6 * math.sqrt(expected / size)
        assert noise.var() > 0.8 * honest(len(names)) * found.variance
        assert found.deviation(len(survivors)) == pytest.approx(
            noise.std() / found.ring.scale / len(survivors), rel=0.1
        )


def test_noise_is_new_each_time() -> None:
    names, size = ["a", "b", "c"], 2000
    federation = Federation(names, drawn=lambda _name: Stream(token_bytes(SEED_BYTES))).set_up()
    found = calibrated(PROMISE, clip=1.0, bits=32, sites=3, size=size)
    layout = Layout(federation.roster, found.ring, size, federation.layout().lane, found.variance)
    zeros = given(np.zeros(size))
    first, second = (
        found.ring.read(federation.copy().unmasked(layout, dict.fromkeys(names, zeros)).update) for _ in range(2)
    )
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(size)


# --- the ring


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("sites", [3, 4, 5, 16, 17, 100])
@pytest.mark.parametrize("promise", [PROMISE, Promise(0.5, 1e-8, 500), Promise(20.0, 1e-5, 1)])
def test_the_ring_holds_every_update_and_twelve_deviations_of_the_whole_noise(
    bits: Bits, sites: int, promise: Promise
) -> None:
    found = calibrated(promise, clip=3.0, bits=bits, sites=sites, size=100_000)
    updates = sites * found.ring.scale * 3.0
    assert updates + HEADROOM * math.sqrt(sites * found.variance) <= sites * largest(bits, sites) * (1 + 1e-9)
    assert sites * (largest(bits, sites) + 1) < 2 ** (bits - 1)
    if bits == 32:  # and it is used: a scale a tenth finer would not do
        assert 1.1 * (updates + HEADROOM * math.sqrt(sites * found.variance)) > sites * largest(bits, sites)


def test_a_sum_of_updates_at_the_clip_with_noise_does_not_wrap() -> None:
    names, size = list("abcd"), 2 * CHUNK
    federation = Federation(names, drawn=lambda _name: Stream(token_bytes(SEED_BYTES))).set_up()
    found = calibrated(PROMISE, clip=1.0, bits=32, sites=4, size=size)
    layout = Layout(federation.roster, found.ring, size, federation.layout().lane, found.variance)
    # Not an update that a site may give, whose norm is 1 in all: each coordinate is at the bound.
    total = federation.unmasked(layout, {name: given(np.ones(size)) for name in names})
    mean = found.ring.read(total.update) / 4
    assert np.abs(mean - 1).max() < 8 * found.deviation(4)
    assert abs(mean.mean() - 1) < 6 * found.deviation(4) / math.sqrt(size)


def test_rounding_by_chance_is_within_the_sensitivity_that_is_counted_on() -> None:
    size = 100_000
    found = calibrated(PROMISE, clip=1.0, bits=32, sites=3, size=size)
    update = np.random.default_rng(0).normal(size=size)
    update *= 1.0 / np.linalg.norm(update)
    elements, draws = np.empty(size, np.uint32), np.random.default_rng(1).integers(0, 2**32, size, np.uint32)
    found.ring.write(update, 1.0, draws, elements)
    assert np.linalg.norm(elements.view(np.int32).astype(float)) <= found.ring.scale + math.sqrt(size)


@pytest.mark.parametrize(
    ("promise", "size"), [(Promise(0.01, 1e-8, 5000), 10_000_000), (Promise(0.01, 1e-9, 100_000), 10_000)]
)
def test_noise_that_32_bits_cannot_hold_is_refused_and_64_hold_it(promise: Promise, size: int) -> None:
    with pytest.raises(CapacityError, match="32 bits cannot hold the noise of 3 sites"):
        calibrated(promise, clip=1.0, bits=32, sites=3, size=size)
    assert calibrated(promise, clip=1.0, bits=64, sites=3, size=size).variance > 0


@pytest.mark.parametrize("promise", [Promise(1e-6, 1e-12, 1), Promise(80.0, 1e-9, 1), Promise(800.0, 1e-9, 1)])
@pytest.mark.parametrize("bits", [32, 64])
def test_a_promise_that_cannot_be_accounted_for_is_refused(promise: Promise, bits: Bits) -> None:
    with pytest.raises(RingError):
        calibrated(promise, clip=1.0, bits=bits, sites=3, size=1000)
