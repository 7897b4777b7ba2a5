"""Shamir's secret sharing (Communications of the ACM 22(11), 1979): t of n shares tell a secret, fewer tell nothing.

Over the prime field of p = 2^256 + 297, in which every 32-byte string is an element. A share has 33 bytes, big-endian;
that of the holder at place x (from 1) is the polynomial's value at x. Python's integers are not constant-time; what is
computed here happens at the site that owns the secret, or after the secret is to be known.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

PRIME = (1 << 256) + 297
SHARE_BYTES = 33
_SECRET_BYTES = 32


class ShareError(ValueError):
    """Shares that do not make a secret."""


def split(secret: bytes, threshold: int, holders: int, draw: Callable[[int], int] = secrets.randbelow) -> list[bytes]:
    """The shares of the holders at places 1 to `holders`; `draw(p)` gives a uniform number below p.

    Raises ShareError unless the secret has 32 bytes and 1 ≤ threshold ≤ holders.
    """
    if len(secret) != _SECRET_BYTES or not 1 <= threshold <= holders:
        raise ShareError("a secret has 32 bytes, and a threshold is between 1 and the number of holders")
    polynomial = [int.from_bytes(secret), *(draw(PRIME) for _ in range(threshold - 1))]
    return [_value(polynomial, place).to_bytes(SHARE_BYTES) for place in range(1, holders + 1)]


def _value(polynomial: Sequence[int], place: int) -> int:
    """Horner's rule."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * place + coefficient) % PRIME
    return value


def coefficients(places: Sequence[int]) -> list[int]:
    """Lagrange's coefficients at 0 of different places: a secret is Σ coefficient · share."""
    return list(_coefficients(tuple(places)))


@lru_cache(maxsize=16)  # all secrets of a sum are of the same places
def _coefficients(places: tuple[int, ...]) -> tuple[int, ...]:
    found = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above = above * -other % PRIME
                below = below * (place - other) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(found)


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of shares by place; raises ShareError if they make none of 32 bytes."""
    if not shares or min(shares) < 1:
        raise ShareError("there is no share, or one at no place: places count from 1")
    places = sorted(shares)
    weights = coefficients(places)
    secret = sum(weight * number(shares[place]) for weight, place in zip(weights, places, strict=True)) % PRIME
    if secret >> 256:
        raise ShareError("these shares are not of one secret")
    return secret.to_bytes(_SECRET_BYTES)


def number(share: bytes) -> int:
    """A share as an element of the field; raises ShareError if it is none."""
    value = int.from_bytes(share)
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ShareError("this is no share")
    return value
