"""Writes secure-aggregation-primitives.json beside this file. Imports nothing of Locum, and only the standard library.

AES-256 is written here from FIPS 197, and checked against NIST SP 800-38A before anything is written.

    python tests/vectors/make_primitives.py
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

PRIME = 2**256 + 297
RANDOM_STEP = 2.0**-32


def _xtime(byte: int) -> int:
    return (byte << 1) ^ (0x11B if byte & 0x80 else 0)


def _times(a: int, b: int) -> int:
    """In GF(2^8), FIPS 197 section 4.2."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a, b = _xtime(a), b >> 1
    return product


def _substitute(byte: int) -> int:
    """The S-box, FIPS 197 section 5.1.1: the inverse, then an affine map."""
    inverse = next((other for other in range(256) if _times(byte, other) == 1), 0)
    turned = [((inverse << shift) | (inverse >> (8 - shift))) & 0xFF for shift in range(5)]
    return turned[0] ^ turned[1] ^ turned[2] ^ turned[3] ^ turned[4] ^ 0x63


S_BOX = [_substitute(byte) for byte in range(256)]


def _round_keys(key: bytes) -> list[list[int]]:
    """FIPS 197 section 5.2, for a key of 8 words: 15 round keys of 16 bytes."""
    words = [list(key[start : start + 4]) for start in range(0, 32, 4)]
    constant = 1
    for index in range(8, 60):
        word = words[-1]
        if index % 8 == 0:
            word = [S_BOX[byte] for byte in word[1:] + word[:1]]
            word[0] ^= constant
            constant = _xtime(constant)
        elif index % 8 == 4:
            word = [S_BOX[byte] for byte in word]
        words.append([a ^ b for a, b in zip(words[index - 8], word, strict=True)])
    return [[byte for word in words[start : start + 4] for byte in word] for start in range(0, 60, 4)]


def _mix(column: list[int]) -> list[int]:
    a, b, c, d = column
    rows = ((a, b, c, d), (b, c, d, a), (c, d, a, b), (d, a, b, c))
    return [_times(w, 2) ^ _times(x, 3) ^ y ^ z for w, x, y, z in rows]


def aes_256(key: bytes, block: bytes) -> bytes:
    """FIPS 197 section 5.1."""
    first, *rest = _round_keys(key)
    state = [a ^ b for a, b in zip(block, first, strict=True)]
    for index, round_key in enumerate(rest, start=1):
        state = [S_BOX[state[(place + 4 * (place % 4)) % 16]] for place in range(16)]
        if index < 14:
            state = [byte for start in range(0, 16, 4) for byte in _mix(state[start : start + 4])]
        state = [a ^ b for a, b in zip(state, round_key, strict=True)]
    return bytes(state)


def _check_aes() -> None:
    """NIST SP 800-38A, F.5.5 CTR-AES256.Encrypt: four counter blocks and what they are encrypted to."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = 0xF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF
    outputs = (
        "0bdf7df1591716335e9a8b15c860c502",
        "5a6e699d536119065433863c8f657b94",
        "1bc12c9c01610d5d0d8bd6a3378eca62",
        "2956e1c8693536b1bee99c73a31576b6",
    )
    for index, output in enumerate(outputs):
        if aes_256(key, (counter + index).to_bytes(16, "big")).hex() != output:
            raise SystemExit("this AES is not that of the standard")


def _drawn(label: str, count: int = 32) -> bytes:
    """Bytes without a meaning that everybody can draw again."""
    return b"".join(sha256(f"{label} {index}".encode()).digest() for index in range(-(-count // 32)))[:count]


def _stream(seed: bytes, lane: int, offset: int, count: int) -> bytes:
    blocks = range(offset // 16, -(-(offset + count) // 16))
    made = b"".join(aes_256(seed, lane.to_bytes(8, "big") + block.to_bytes(8, "big")) for block in blocks)
    return made[offset % 16 :][:count]


SEEDS = (bytes(range(32)), _drawn("seed a"), b"\xff" * 32)


def key_streams() -> list[Entry]:
    # The first blocks, the first carries of the counter, and both sides of every half MiB that we make at once.
    places = [(0, 64), (5, 11), (255 * 16, 32), (512 * 1024 - 16, 32), (65535 * 16, 32)]
    return [
        {"seed": seed.hex(), "lane": lane, "offset": offset, "stream": _stream(seed, lane, offset, count).hex()}
        for seed in SEEDS[:2]
        for lane in (0, 1)
        for offset, count in places
    ] + [{"seed": SEEDS[2].hex(), "lane": 2**63, "offset": 0, "stream": _stream(SEEDS[2], 2**63, 0, 32).hex()}]


def _packed(numbers: list[int], bits: int) -> str:
    return b"".join((number % 2**bits).to_bytes(bits // 8, "little") for number in numbers).hex()


def masks() -> list[Entry]:
    made = []
    for bits, lane in ((32, 0), (64, 1)):
        size = bits // 8
        vector = [0, 1, 2**bits - 1, 2 ** (bits - 1), 12345]
        streams = [_stream(seed, lane, 0, size * len(vector)) for seed in SEEDS]
        signed = list(zip((1, 1, -1), streams, strict=True))
        masked = [
            number + sum(sign * int.from_bytes(stream[at * size :][:size], "little") for sign, stream in signed)
            for at, number in enumerate(vector)
        ]
        made.append(
            {
                "bits": bits,
                "lane": lane,
                "add": [seed.hex() for seed in SEEDS[:2]],
                "subtract": [SEEDS[2].hex()],
                "vector": _packed(vector, bits),
                "masked": _packed(masked, bits),
            }
        )
    return made


def _largest(bits: int, sites: int) -> int:
    left = bits - math.ceil(math.log2(sites))
    return 2 ** (left - 1) - max(2, 2 ** max(0, left - 51))


def quantisations() -> list[Entry]:
    made = []
    for bits, sites, bound, weight in (
        (32, 3, 1.0, 1.0),
        (32, 20, 2.5, 0.3),
        (32, 200, 0.01, 1.0),
        (64, 4, 1.0, 0.75),
        (32, 16, 1.0, 1.0),
    ):
        shares = [0.0, 1.0, -1.0, 0.5, -0.5, 1e-9, -1e-9, 0.123456789, -0.987654321, 1.0, -1.0]
        values = [share * bound for share in shares]
        random = [0xFFFFFFFF, 0, 0, 1 << 31, 1 << 31, 0xFFFFFFFF, 1, 0x01234567, 0x89ABCDEF, 0xFFFFFFFF, 0xFFFFFFFF]
        scale = _largest(bits, sites) / bound
        steps = [
            math.floor(value * (weight * scale) + word * RANDOM_STEP)
            for value, word in zip(values, random, strict=True)
        ]
        for value, word, step in zip(values, random, steps, strict=True):
            exact = Fraction(value) * Fraction(weight) * Fraction(_largest(bits, sites)) / Fraction(bound)
            if abs(exact + Fraction(word, 2**32) - Fraction(1, 2) - step) > Fraction(1, 2) + abs(exact) / 2**50:
                raise SystemExit("floating point went astray")
        made.append(
            {
                "bits": bits,
                "sites": sites,
                "bound": bound,
                "weight": weight,
                "scale": scale,
                "values": values,
                "random": _packed(random, 32),
                "elements": _packed(steps, bits),
                "read": [step * (1 / scale) for step in steps],
            }
        )
    return made


def scalars() -> list[Entry]:
    lane = [
        {"name": "weight", "length": 1, "bound": 1.0},
        {"name": "cases", "length": 2, "bound": 100000.0},
        {"name": "loss", "length": 1, "bound": 50.5},
    ]
    theirs = [[1.0, 812.0, 100000.0, 0.7310585786300049], [0.3, 3.0, -7.0, -50.5], [0.1, 0.0, 1.0, 1e-12]]
    made = []
    for sites in (3, 20, 200):
        fractions = []
        for scalar in lane:
            whole = math.floor(math.log2(math.ceil(scalar["bound"]))) + 1
            fractions += [62 - whole - math.ceil(math.log2(sites))] * scalar["length"]
        # round() of a fraction goes to the nearest, and from the middle to the even one.
        steps = [
            [round(Fraction(number) * 2**bits) for number, bits in zip(numbers, fractions, strict=True)]
            for numbers in theirs
        ]
        total = [sum(column) for column in zip(*steps, strict=True)]
        made.append(
            {
                "sites": sites,
                "lane": lane,
                "fraction_bits": fractions,
                "values": theirs,
                "elements": [_packed(numbers, 64) for numbers in steps],
                "total": _packed(total, 64),
                "read": [float(total) * 2.0**-bits for total, bits in zip(total, fractions, strict=True)],
            }
        )
    return made


def _share(secret: int, draws: list[int], place: int) -> str:
    powers = [coefficient * place**power for power, coefficient in enumerate([secret, *draws])]
    return (sum(powers) % PRIME).to_bytes(33, "big").hex()


def _lagrange(places: list[int], place: int) -> int:
    others = [other for other in places if other != place]
    whole = Fraction(math.prod(others), math.prod(other - place for other in others))
    return whole.numerator * pow(whole.denominator, -1, PRIME) % PRIME


def sharings() -> list[Entry]:
    made = []
    for secret, draws, holders, groups in (
        (SEEDS[0], [int.from_bytes(_drawn("draw 1")), int.from_bytes(_drawn("draw 2"))], 3, [[1, 2, 3]]),
        (SEEDS[1], [2**256 + 296, 0, 2**256], 5, [[1, 2, 3, 4], [1, 2, 4, 5], [2, 3, 4, 5]]),
        (b"\xff" * 32, [int.from_bytes(_drawn(f"draw {index}")) for index in range(13)], 20, [list(range(7, 21))]),
        (bytes(32), [], 2, [[1], [2]]),
    ):
        made.append(
            {
                "secret": secret.hex(),
                "threshold": len(draws) + 1,
                "holders": holders,
                "coefficients": [draw.to_bytes(33, "big").hex() for draw in draws],
                "shares": [_share(int.from_bytes(secret), draws, place) for place in range(1, holders + 1)],
                "recoveries": [
                    {
                        "places": places,
                        "lagrange": [_lagrange(places, place).to_bytes(33, "big").hex() for place in places],
                    }
                    for places in groups
                ],
            }
        )
    return made


def refused_sharings() -> list[Entry]:
    good = {"1": _share(7, [11], 1), "2": _share(7, [11], 2)}
    return [
        {"why": "the secret would be 2^256, which 32 bytes do not hold", "shares": {"1": f"{2**256:066x}"}},
        {"why": "a share is the prime, and no element", "shares": {**good, "2": f"{PRIME:066x}"}},
        {"why": "a share has 32 bytes", "shares": {**good, "2": good["2"][2:]}},
        {"why": "a share has 34 bytes", "shares": {**good, "2": "00" + good["2"]}},
        {"why": "places count from 1", "shares": {**good, "0": good["2"]}},
        {"why": "there are no shares", "shares": {}},
    ]


def vectors() -> dict[str, list[Entry]]:
    """Everything that the file holds."""
    _check_aes()
    return {
        "key_streams": key_streams(),
        "masks": masks(),
        "quantisations": quantisations(),
        "scalars": scalars(),
        "sharings": sharings(),
        "refused_sharings": refused_sharings(),
    }


if __name__ == "__main__":
    text = json.dumps(vectors(), indent=1) + "\n"
    Path(__file__).with_name("secure-aggregation-primitives.json").write_text(text, encoding="ascii")
