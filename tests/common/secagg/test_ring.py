"""Fixed point: no sum wraps, rounding is fair, whole numbers are exact, and what has no place is refused."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from locum.common.secagg.ring import (
    Bits,
    Elements,
    Ring,
    RingError,
    Scalar,
    mean_error,
    read_scalars,
    write_scalars,
)

HIGHEST_WORD = 0xFFFFFFFF
EACH_RING = pytest.mark.parametrize("bits", [32, 64])

rings = st.builds(Ring, st.sampled_from([32, 64]), st.integers(1, 200), st.floats(1e-6, 1e6))
weights = st.sampled_from([1.0, 0.3, 1 / 3, 1e-3]) | st.floats(1e-3, 1)
words = st.sampled_from([0, 1, 1 << 31, HIGHEST_WORD]) | st.integers(0, HIGHEST_WORD)
fractions = st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1)


def _write(ring: Ring, values: NDArray[Any], weight: float, random: NDArray[np.uint32]) -> Elements:
    out: Elements = np.empty(values.size, ring.dtype)
    with np.errstate(invalid="raise", over="raise"):
        ring.write(values, weight, random, out)
    return out


def _steps(ring: Ring, elements: Elements) -> list[int]:
    """As Python's integers, by the definition of two's complement."""
    return [int(element) - (int(element) >> (ring.bits - 1) << ring.bits) for element in elements]


def _one(ring: Ring, value: float, weight: float = 1.0, word: int = 0) -> int:
    return _steps(ring, _write(ring, np.array([value]), weight, np.array([word], np.uint32)))[0]


def _at_the_bound(bound: float, weight: float) -> float:
    """The largest float whose weighted value a caller finds within the bound."""
    value = bound / weight * (1 + 1e-15)
    while weight * value > bound:
        value = math.nextafter(value, 0)
    return value


@EACH_RING
@pytest.mark.parametrize("weight", [1.0, 0.3, 0.7])
def test_no_sum_over_the_roster_can_wrap(bits: Bits, weight: float) -> None:
    bounds = [1.0, 0.1, 3.0, *np.random.default_rng(bits).uniform(0.01, 100, 40).tolist()]
    for sites in range(1, 201):
        for bound in bounds:
            extreme = _at_the_bound(bound, weight)
            ring = Ring(bits, sites, bound)
            values, random = np.array([extreme, extreme, -extreme]), np.array([HIGHEST_WORD, 0, 0], np.uint32)
            assert all(
                sites * abs(step) < 1 << (bits - 1) for step in _steps(ring, _write(ring, values, weight, random))
            )


@EACH_RING
def test_no_bit_is_left_that_a_sum_could_use(bits: Bits) -> None:
    for sites in range(1, 201):
        ring = Ring(bits, sites, 1.0)
        assert sites * ring.scale > 1 << (bits - 2)


@given(rings, weights, words, st.sampled_from([-1, 1]))
def test_a_sum_of_sites_that_are_all_at_the_bound_is_read_with_its_sign(
    ring: Ring, weight: float, word: int, sign: int
) -> None:
    value = sign * _at_the_bound(ring.bound, weight)
    one = _write(ring, np.array([value]), weight, np.array([word], np.uint32))
    total: Elements = np.zeros(1, ring.dtype)
    for _ in range(ring.sites):
        total += one
    assert ring.read(total)[0] == pytest.approx(ring.sites * sign * ring.bound, rel=1e-6)


@given(rings, weights, fractions, words)
def test_the_error_of_a_coordinate_is_one_step(ring: Ring, weight: float, fraction: float, word: int) -> None:
    value = fraction * _at_the_bound(ring.bound, weight)
    exact = Fraction(value) * Fraction(weight) * Fraction(ring.scale)
    floating_point = abs(exact) / 2**51
    assert abs(_one(ring, value, weight, word) - exact) <= 1 + floating_point


@given(rings, weights, st.lists(fractions, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_error_of_a_weighted_mean_keeps_to_what_is_announced(
    ring: Ring, weight_cap: float, found: list[float], random: Any
) -> None:
    ring = Ring(ring.bits, max(ring.sites, len(found)), ring.bound)
    theirs = [random.uniform(0.1, 1) * weight_cap for _ in found]
    total: Elements = np.zeros(1, ring.dtype)
    for fraction, weight in zip(found, theirs, strict=True):
        word = np.array([random.getrandbits(32)], np.uint32)
        total += _write(ring, np.array([fraction * ring.bound]), weight / weight_cap, word)
    exact = sum(Fraction(w) * Fraction(f * ring.bound) for f, w in zip(found, theirs, strict=True)) / Fraction(
        sum(theirs)
    )
    mean = ring.read(total)[0] * weight_cap / sum(theirs)
    assert abs(Fraction(mean) - exact) <= mean_error(ring, weight_cap, sum(theirs))


@EACH_RING
@settings(deadline=None)
@given(whole=st.integers(-(1 << 24), 1 << 24), part=st.floats(0, 1))
def test_rounding_is_unbiased(bits: Bits, whole: int, part: float) -> None:
    ring = Ring(bits, 5, 1.0)
    value = (whole + part) / ring.scale
    every = (np.arange(1 << 12, dtype=np.uint32) << 20) + (1 << 19)  # as if uniform: the middles of 2^12 equal parts
    elements = _write(ring, np.full(every.size, value), 1.0, every)
    mean = Fraction(sum(_steps(ring, elements)), every.size)
    assert abs(mean - Fraction(value) * Fraction(ring.scale)) <= Fraction(1, 1 << 12)


@given(rings, st.integers(1, 1 << 20), words)
def test_rounding_goes_up_exactly_when_the_draw_fills_the_step(ring: Ring, whole: int, word: int) -> None:
    value = (whole + 0.25) / ring.scale
    exact = Fraction(value) * Fraction(ring.scale)
    if abs(exact + Fraction(word, 1 << 32) - (whole + 1)) > Fraction(1, 1 << 24):  # else floating point decides
        assert _one(ring, value, word=word) == math.floor(exact + Fraction(word, 1 << 32))


@given(rings, words)
def test_nothing_is_nothing_whatever_is_drawn(ring: Ring, word: int) -> None:
    assert _one(ring, 0.0, word=word) == 0
    assert _one(ring, -0.0, word=word) == 0


@pytest.mark.parametrize(("bits", "largest"), [(32, (1 << 29) - 2), (64, (1 << 61) - (1 << 11))])
def test_negative_numbers_are_twos_complement_in_little_endian(bits: Bits, largest: int) -> None:
    ring = Ring(bits, 3, largest / 1024)
    assert ring.scale == 1024
    values = np.array([1, -1, -5, ring.bound * 1024, -ring.bound * 1024]) / 1024
    found = _write(ring, values, 1.0, np.zeros(5, np.uint32))
    expected = [1, 2**bits - 1, 2**bits - 5, largest, 2**bits - largest]
    assert found.tobytes() == b"".join(number.to_bytes(bits // 8, "little") for number in expected)
    assert ring.read(found).tolist() == values.tolist()


@EACH_RING
def test_values_of_single_precision_are_taken_as_they_are(bits: Bits) -> None:
    random = np.random.default_rng(0)
    values, drawn = random.uniform(-1, 1, 999).astype(np.float32), random.integers(0, 1 << 32, 999, np.uint32)
    ring = Ring(bits, 7, 1.0)
    assert _write(ring, values, 0.3, drawn).tolist() == _write(ring, values.astype(np.float64), 0.3, drawn).tolist()


@EACH_RING
def test_a_sum_has_no_order(bits: Bits) -> None:
    ring = Ring(bits, 9, 1.0)
    random = np.random.default_rng(1)
    parts = [_write(ring, random.uniform(-1, 1, 77), 1.0, random.integers(0, 1 << 32, 77, np.uint32)) for _ in range(9)]
    forward, backward = (sum(order, np.zeros(77, ring.dtype)) for order in (parts, parts[::-1]))
    assert forward.tobytes() == backward.tobytes()


@pytest.mark.parametrize(("sites", "bound"), [(0, 1.0), (3, 0.0), (3, -1.0), (3, math.inf), (3, math.nan)])
def test_a_ring_without_a_site_or_a_finite_bound_is_refused(sites: int, bound: float) -> None:
    with pytest.raises(RingError):
        Ring(32, sites, bound)


def _sum(lane: list[Scalar], theirs: list[dict[str, list[float]]], sites: int) -> dict[str, list[float]]:
    parts = [write_scalars(lane, {name: np.array(numbers) for name, numbers in own.items()}, sites) for own in theirs]
    total = sum(parts, np.zeros(sum(scalar.length for scalar in lane), np.uint64))
    return {name: numbers.tolist() for name, numbers in read_scalars(lane, total, sites).items()}


@given(st.integers(1, 200), st.integers(1, 1 << 45), st.data())
def test_sums_of_whole_numbers_are_exact(sites: int, bound: int, data: st.DataObject) -> None:
    whole = st.sampled_from([-bound, bound]) | st.integers(-bound, bound)
    numbers = data.draw(st.lists(whole, min_size=1, max_size=min(sites, 8)))
    numbers += [numbers[-1]] * (sites - len(numbers))
    found = _sum([Scalar("cases", 1, bound)], [{"cases": [float(number)]} for number in numbers], sites)
    assert found == {"cases": [float(sum(numbers))]}


@given(st.integers(1, 200), st.floats(1e-3, 1e30), st.sampled_from([-1, 1]))
def test_no_sum_of_scalars_can_wrap(sites: int, bound: float, sign: int) -> None:
    found = _sum([Scalar("loss", 1, bound)], [{"loss": [sign * bound]}] * sites, sites)["loss"][0]
    assert found == pytest.approx(sign * sites * bound, rel=1e-12)


@given(st.integers(1, 200), st.floats(1e-3, 1e9), fractions)
def test_a_scalar_is_rounded_to_the_nearest(sites: int, bound: float, fraction: float) -> None:
    scalar = Scalar("loss", 1, bound)
    found = _sum([scalar], [{"loss": [fraction * bound]}], sites)["loss"][0]
    floating_point = abs(Fraction(fraction * bound)) / 2**52
    half = Fraction(1, 2) / Fraction(2) ** scalar.fraction_bits(sites)
    assert abs(Fraction(found) - Fraction(fraction * bound)) <= half + floating_point


def test_scalars_keep_their_names_order_and_lengths() -> None:
    lane = [Scalar("weight", 1, 1), Scalar("hits", 3, 1000), Scalar("nothing", 0, 1), Scalar("loss", 2, 50)]
    one = {"loss": [0.5, -49.75], "weight": [1.0], "nothing": [], "hits": [1000.0, 0.0, -7.0]}
    two = {"loss": [0.25, -1.0], "weight": [0.5], "nothing": [], "hits": [1.0, 2.0, 3.0]}
    expected = {"weight": [1.5], "hits": [1001.0, 2.0, -4.0], "nothing": [], "loss": [0.75, -50.75]}
    found = _sum(lane, [one, two], 3)
    assert found == expected
    assert list(found) == list(expected)


def test_a_lane_of_nothing_is_empty() -> None:
    assert write_scalars([], {}, 3).tolist() == []


@pytest.mark.parametrize(
    "number", [math.nan, math.inf, -math.inf, math.nextafter(50, 51), -math.nextafter(50, 51), 1e300]
)
def test_a_scalar_that_is_not_finite_or_beyond_its_bound_is_refused(number: float) -> None:
    with pytest.raises(RingError, match="loss"):
        write_scalars([Scalar("loss", 2, 50)], {"loss": np.array([1.0, number])}, 3)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_scalar_of_another_length_is_refused(count: int) -> None:
    with pytest.raises(RingError, match="loss"):
        write_scalars([Scalar("loss", 2, 50)], {"loss": np.zeros(count)}, 3)
