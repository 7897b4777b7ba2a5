"""Shamir's shares: enough of them tell the secret, fewer tell nothing, and what is no share is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.common.secagg.shares import PRIME, SHARE_BYTES, ShareError, coefficients, combine, number, split

SECRET = bytes(range(32))

secrets = st.sampled_from([bytes(32), b"\xff" * 32]) | st.binary(min_size=32, max_size=32)
elements = st.sampled_from([0, 1, 2**256, PRIME - 1]) | st.integers(0, PRIME - 1)
circles = st.integers(1, 12).flatmap(lambda holders: st.tuples(st.integers(1, holders), st.just(holders)))


def _by_place(shares: Sequence[bytes]) -> dict[int, bytes]:
    return dict(enumerate(shares, start=1))


def _drawing(draws: Sequence[int]) -> Callable[[int], int]:
    """These numbers, one after the other, in place of random ones."""
    left = iter(draws)

    def draw(below: int) -> int:
        assert below == PRIME
        return next(left)

    return draw


def _polynomial(points: Mapping[int, int]) -> list[int]:
    """The coefficients, lowest first, of the one polynomial through the points: Newton's divided differences."""
    places, table = list(points), list(points.values())
    for order in range(1, len(places)):
        for row in range(len(places) - 1, order - 1, -1):
            below = pow(places[row] - places[row - order], -1, PRIME)
            table[row] = (table[row] - table[row - 1]) * below % PRIME
    found = [0] * len(places)
    for place, value in zip(reversed(places), reversed(table), strict=True):
        found = [(low - place * high) % PRIME for low, high in zip([0, *found[:-1]], found, strict=True)]
        found[0] = (found[0] + value) % PRIME
    return found


def test_the_modulus_is_a_prime_in_which_every_seed_is_an_element() -> None:
    assert PRIME == 2**256 + 297
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11, 13, 17, 19, 23))
    assert PRIME.bit_length() <= 8 * SHARE_BYTES


@settings(deadline=None)
@given(secrets, circles, st.randoms(use_true_random=False))
def test_any_threshold_of_shares_tells_the_secret(secret: bytes, circle: tuple[int, int], random: Random) -> None:
    threshold, holders = circle
    shares = _by_place(split(secret, threshold, holders))
    for count in range(threshold, holders + 1):
        some = random.sample(sorted(shares), count)
        assert combine({place: shares[place] for place in some}) == secret


def test_every_choice_of_holders_will_do() -> None:
    shares = _by_place(split(SECRET, 4, 7))
    for some in combinations(shares, 4):
        assert combine({place: shares[place] for place in some}) == SECRET


def test_a_large_roster_recovers_its_secret() -> None:
    shares = _by_place(split(SECRET, 120, 200))
    assert combine({place: shares[place] for place in range(81, 201)}) == SECRET


@settings(deadline=None)
@given(secrets, secrets, st.lists(elements, min_size=1, max_size=7), st.randoms(use_true_random=False))
def test_fewer_shares_fit_every_secret(secret: bytes, other: bytes, draws: list[int], random: Random) -> None:
    """One polynomial, no more and no fewer, goes through t − 1 shares and any other secret at 0.

    The draws are uniform and each of them leads to other shares, so t − 1 shares are as likely under one secret as
    under another.
    """
    threshold, holders = len(draws) + 1, len(draws) + 3
    shares = _by_place(split(secret, threshold, holders, _drawing(draws)))
    seen = random.sample(sorted(shares), threshold - 1)
    known = {place: int.from_bytes(shares[place]) for place in seen}
    consistent = _polynomial({0: int.from_bytes(other), **known})
    alike = _by_place(split(other, threshold, holders, _drawing(consistent[1:])))
    assert consistent[0] == int.from_bytes(other)
    assert {place: alike[place] for place in seen} == {place: shares[place] for place in seen}
    assert (alike == shares) == (secret == other)


@settings(deadline=None)
@given(secrets, st.lists(elements, min_size=1, max_size=5))
def test_a_share_is_the_value_of_the_polynomial_at_its_place(secret: bytes, draws: list[int]) -> None:
    shares = split(secret, len(draws) + 1, len(draws) + 2, _drawing(draws))
    for place, share in _by_place(shares).items():
        powers = [coefficient * place**power for power, coefficient in enumerate([int.from_bytes(secret), *draws])]
        assert share == (sum(powers) % PRIME).to_bytes(33, "big")


@given(st.lists(st.integers(1, 200), min_size=1, max_size=9, unique=True), st.data())
def test_the_coefficients_read_any_polynomial_at_nought(places: list[int], data: st.DataObject) -> None:
    polynomial = data.draw(st.lists(elements, min_size=1, max_size=len(places)))
    values = [sum(c * place**power for power, c in enumerate(polynomial)) for place in places]
    assert sum(c * value for c, value in zip(coefficients(places), values, strict=True)) % PRIME == polynomial[0]


def test_two_sharings_of_a_secret_have_nothing_in_common() -> None:
    one, two = split(SECRET, 3, 5), split(SECRET, 3, 5)
    assert not set(one) & set(two)
    assert len(set(one)) == 5


def test_too_few_shares_do_not_tell_the_secret() -> None:
    for threshold in range(2, 8):
        shares = _by_place(split(SECRET, threshold, 8))
        assert _told({place: shares[place] for place in range(1, threshold)}) != SECRET


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), elements)
def test_a_wrong_share_never_passes_for_the_right_one(threshold: int, wrong: int, value: int) -> None:
    shares = _by_place(split(SECRET, threshold, 7))
    some = {place: shares[place] for place in sorted(shares, key=lambda place: (place != wrong, place))[:threshold]}
    if number(some[wrong]) != value:
        assert _told({**some, wrong: value.to_bytes(SHARE_BYTES)}) != SECRET


def test_shares_at_swapped_places_do_not_tell_the_secret() -> None:
    one, two, three, *_ = split(SECRET, 3, 5)
    assert _told({1: two, 2: one, 3: three}) != SECRET


def _told(shares: Mapping[int, bytes]) -> bytes | None:
    try:
        return combine(shares)
    except ShareError:
        return None


@given(st.integers(2**256, PRIME - 1))
def test_shares_of_what_no_seed_can_be_are_refused(value: int) -> None:
    with pytest.raises(ShareError, match="not of one secret"):
        combine({1: value.to_bytes(SHARE_BYTES)})


@pytest.mark.parametrize(
    "share",
    [
        b"",
        bytes(SHARE_BYTES - 1),
        bytes(SHARE_BYTES + 1),
        PRIME.to_bytes(SHARE_BYTES),
        b"\xff" * SHARE_BYTES,
        (PRIME - 1).to_bytes(SHARE_BYTES, "little"),
    ],
)
def test_what_is_no_share_is_refused(share: bytes) -> None:
    good = split(SECRET, 2, 2)
    with pytest.raises(ShareError, match="no share"):
        number(share)
    with pytest.raises(ShareError, match="no share"):
        combine({1: good[0], 2: share})


@pytest.mark.parametrize("place", [0, -1])
def test_a_share_at_no_place_is_refused(place: int) -> None:
    """At 0 lies the secret itself: whoever could hand in a share there would choose it."""
    good = split(SECRET, 2, 2)
    with pytest.raises(ShareError, match="no place"):
        combine({1: good[0], place: good[1]})


def test_no_shares_tell_no_secret() -> None:
    with pytest.raises(ShareError):
        combine({})


@pytest.mark.parametrize(
    ("secret", "threshold", "holders"),
    [
        (bytes(31), 2, 3),
        (bytes(33), 2, 3),
        (b"", 2, 3),
        (SECRET, 0, 3),
        (SECRET, 4, 3),
        (SECRET, -1, 3),
        (SECRET, 1, 0),
    ],
)
def test_a_sharing_that_cannot_be_undone_is_refused(secret: bytes, threshold: int, holders: int) -> None:
    with pytest.raises(ShareError):
        split(secret, threshold, holders)
