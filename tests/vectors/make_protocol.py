"""Writes secure-aggregation-protocol.json beside this file. Imports nothing of Locum.

Of the `cryptography` package it takes signatures, ML-KEM-768, X25519 and AES-GCM. HKDF (RFC 5869), HPKE's key schedule
(RFC 9180) and X-Wing's combiner are written here; AES in counter mode, Shamir's shares and fixed point are those of
make_primitives.py.

    python tests/vectors/make_protocol.py
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import runpy
from fractions import Fraction
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

Entry = dict[str, Any]

_PRIMITIVES = runpy.run_path(str(Path(__file__).with_name("make_primitives.py")))
drawn, key_stream, packed = _PRIMITIVES["_drawn"], _PRIMITIVES["_stream"], _PRIMITIVES["_packed"]
share_of, largest_of = _PRIMITIVES["_share"], _PRIMITIVES["_largest"]
SUITE = "locum-secagg-1"


def canonical(value: object) -> str:
    """RFC 8785, for what occurs here: ASCII strings and whole numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(value: object) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


# --- keys


def hkdf(key: bytes, salt: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869 with SHA-256."""
    extracted = hmac.digest(salt or bytes(32), key, "sha256")
    made, block = b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        made += block
    return made[:length]


def derived(key: bytes, label: str, salt: bytes = b"") -> bytes:
    return hkdf(key, salt, b"locum secagg " + label.encode())


def _check_hkdf() -> None:
    """RFC 5869, A.1 and A.3."""
    found = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42).hex()
    if found != "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865":
        raise SystemExit("this HKDF is not that of the standard")


def public_of(private: bytes) -> bytes:
    kem = MLKEM768PrivateKey.from_seed_bytes(private[:64]).public_key().public_bytes_raw()
    return kem + X25519PrivateKey.from_private_bytes(private[64:]).public_key().public_bytes_raw()


def site_key(name: str) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(drawn(f"site key {name}", 40), "big"), ec.SECP384R1())


LOG_KEY = ed25519.Ed25519PrivateKey.from_private_bytes(drawn("log key"))


def run_private(name: str, what: str) -> bytes:
    return bytes(drawn(f"run key {what} {name}", 96))


# --- statements


def signed_bytes(kind: str, body: Entry) -> bytes:
    return f"locum secagg {kind}\n{canonical(body)}".encode()


def envelope(kind: str, body: Entry, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    """ECDSA with the nonce of RFC 6979, so that everybody can make the same signature; any nonce is accepted."""
    content = signed_bytes(kind, body)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(content)
    else:
        signature = key.sign(content, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))
    return canonical({"kind": f"secagg {kind}", "body": body, "signature": base64url(signature)})


RUN, PLAN, MODEL = "run-1", bytes(drawn("plan")).hex(), bytes(drawn("model")).hex()


def run_keys_of(name: str) -> Entry:
    return {
        "suite": SUITE,
        "run": RUN,
        "plan": PLAN,
        "site": name,
        "pairs": base64url(public_of(run_private(name, "pairs"))),
        "models": base64url(public_of(run_private(name, "models"))),
    }


def threshold_of(sites: int) -> int:
    return math.floor(Fraction(2, 3) * sites) + 1


AGGREGATOR = bytes(drawn("aggregator", 96))


def roster_of(names: list[str]) -> Entry:
    members = []
    for name in sorted(names):
        statement = envelope("keys", run_keys_of(name), site_key(name))
        members.append(
            {
                "site": name,
                "certificate": bytes(drawn(f"certificate {name}")).hex(),
                "keys": hashlib.sha256(statement.encode()).hexdigest(),
            }
        )
    return {
        "suite": SUITE,
        "run": RUN,
        "plan": PLAN,
        "answers": base64url(public_of(AGGREGATOR)),
        "threshold": threshold_of(len(names)),
        "members": members,
    }


def context_of(roster: Entry, step: int, **changes: object) -> Entry:
    about = {"purpose": "train", "round": step, "attempt": 1, "model": MODEL}
    return {"suite": SUITE, "roster": digest(roster), "step": step, **about, **changes}


#: A capital letter comes before every small one, and a digit before both.
THREE, FOUR = ["Harbour", "north-2", "riverside"], ["1st", "B", "a", "a_b"]


def rosters() -> list[Entry]:
    made = []
    for names in (THREE, FOUR):
        roster = roster_of(names)
        made.append(
            {
                "roster": roster,
                "canonical": canonical(roster),
                "digest": digest(roster),
                "places": {member["site"]: place for place, member in enumerate(roster["members"], start=1)},
            }
        )
    return made


def thresholds() -> list[Entry]:
    return [
        {
            "sites": sites,
            "threshold": threshold_of(sites),
            "together": min(2 * threshold_of(sites) - sites - 1, threshold_of(sites) - 2),
        }
        for sites in range(3, 101)
    ]


def contexts() -> list[Entry]:
    roster = roster_of(THREE)
    made = []
    for context, name in (
        (context_of(roster, 1), "train 1 1"),
        (context_of(roster, 9, round=4, attempt=3), "train 4 3"),
        (context_of(roster, 10, purpose="validation", round=4), f"validation {MODEL}"),
        (context_of(roster, 2**53 - 1, purpose="test", round=0), f"test {MODEL}"),
    ):
        made.append({"context": context, "canonical": canonical(context), "digest": digest(context), "sum": name})
    return made


def statements() -> list[Entry]:
    roster = roster_of(THREE)
    name, peer = THREE[:2]
    sealed = base64url(bytes(drawn("sealed", 1168)))
    pair = {"suite": SUITE, "roster": digest(roster), "sender": name, "receiver": peer, "sealed": sealed}
    header = {
        "suite": SUITE,
        "context": digest(context_of(roster, 1)),
        "site": name,
        "body": bytes(drawn("body")).hex(),
    }
    made = []
    for kind, body, key in (
        ("keys", run_keys_of(name), site_key(name)),
        ("roster", roster, LOG_KEY),
        ("pair", pair, site_key(name)),
        ("context", context_of(roster, 1), LOG_KEY),
        ("upload", header, site_key(name)),
    ):
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        made.append(
            {
                "kind": f"secagg {kind}",
                "body": body,
                "signed_sha256": hashlib.sha256(signed_bytes(kind, body)).hexdigest(),
                "public_key": public,
                "envelope": envelope(kind, body, key),
            }
        )
    return made


# --- sealing

#: Sealed once, with randomness that nobody has kept; what is below opens it.
SEALED = (
    "1Xxsy7KmC3V7NXdA87/tgC3KIksi6RJtKraiUbbKuIn5GaTzj7ykAX42D0z/cPEvhuSz/7LHeLxnTJ9yLvYdFLvwn3sWmCDpZkI3Oq+YFgyOZr"
    "o+FNohd2PtCKhDTDHuFzO6NAdCJxAIlgc82vYqI8m0vFYAmBWes5BuVVkZD5fTiYyaIiCrW00XIDHw7fPrfRCm0tLhRrBf/mgCDbqDzdWrwHyI"
    "LA9id0qBmNF38iWSdgZXsx+0ilAvq3fvR+YOHqVPxvJOEMhvQYP6CBl5APldiGEiDaQKo6fF8GoJ4bkcgfcokUl+nirWdz4Iy5wUhDe6y6/F3A"
    "T4Fd+wcPUUXlQ9+bAwX1cvRLp71wPNaoOQHcFFcYkcVmUIzc1DHpcvdeh/TgODEouTr6ZOvjuiAb78HPFQNxBUKyplDZJous4hIiiQG/vfyGOO"
    "hi3K3Jtp5numXyJmwNGinT0Am1EZTXDtomAyyUmJepge38qpoWIZYMuCiUw/W8iaaH7nypnmQIMlOnWJjigPGaG3qZW0efuUXaMIuDEatP1RzS"
    "yMIDyXc0JUncJtS7RbOZya2J+KfHFVW+9cMJpgc8f0qvAOVdeH4eioXU3PZNZKOU9bVrWjmxaD/n4gcBUi+Roycx/XFcl3y5/3O+7Jj7UTRLt7"
    "J7VSc1LGOPh1ns+jEznQ1hpEDl2AKVHRggX5xwvekv+pJuFNbVrGXy/qrfB7K0TECWgVN+t2JuZRDvmKYxedZE23sJERRgRC0eygpmY25RBITZ"
    "n2SQF4dDmOD4CJ+jXCJGJ7BCgJRBlSS8RiR7UFs867J0FAN+BGXWuzDAfG6GFxIBd3VL9ijYD6UwYr+1NNI6ieLb6HTVeUEix8hIA4t2TSKete"
    "/y39xcKbsycWgUawSqhqxB6LNPVWgvEosmKXvkbUXZ7QGDJDIj36j3fgPV86Rj9tZqtiN7DhhPPAteKLsjb6pCWtBMH6FebvWR7srOSy56g/FF"
    "oSc2NQNtjejykf26F+6jj1I0Rqddfjo1gKfIUn/V29lgmP/pc5InhM1R9CPUn49ifY+JiRPysE6BtTIUh/PYOgn3dI9GeiAEoqX/wgGszpZxmW"
    "3WsP2EY0YuVpeKzL1lznyvc56nBv/X843g8qksujlLQb3bz2EgclNL/Dko8wACLDtfv81ts2Vb24Sy+DYStbI02xAMktrMoAZUMCbGqbCYIe83"
    "uuT/+REjuOcis0gLqz2x5l5JRyotk8J+gQpfum8ckza3O74JNYcfpvNsPvRC/Cja0TGS1tuXEzcmJFAoy9zoH3RhT9Gs57Luq+HwpVuJY3idok"
    "2SRmzcoSR73f4tCkj/U3Ms4rSDz4JiJ/2N40PMEk9QdzXqeI6lsPBV7H0G7wv6mmAjeXVVPoghg6ygs8ehxWM0B/fBP7baHo7jx8CKRBIW+oEo"
    "6Qb8wTHFxv0mfDw/Nw26u/h2xILXyCFv8Nql5iKOdAonnYam7CCD71oTgMyypjGmqlU20uzbBfXteulp37it1dSp0vSEj8PTT9eeu4zlNRWK1M"
    "FG+L/lQvJk0PfJLMmw=="
)
PURPOSE, CONTENT = "locum secagg vector", bytes(range(32))
_SUITE_ID = b"HPKE" + (0x647A).to_bytes(2, "big") + (1).to_bytes(2, "big") + (2).to_bytes(2, "big")


def shared_secret(private: bytes, encapsulated: bytes) -> bytes:
    """X-Wing's decapsulation (draft-connolly-cfrg-xwing-kem): ciphertext of ML-KEM-768, then of X25519."""
    of_kem, of_curve = encapsulated[:1088], encapsulated[1088:]
    curve = X25519PrivateKey.from_private_bytes(private[64:])
    first = MLKEM768PrivateKey.from_seed_bytes(private[:64]).decapsulate(of_kem)
    second = curve.exchange(X25519PublicKey.from_public_bytes(of_curve))
    own = curve.public_key().public_bytes_raw()
    return hashlib.sha3_256(first + second + of_curve + own + b"\\.//^\\").digest()


def _extract(salt: bytes, label: bytes, key: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + _SUITE_ID + label + key, "sha256")


def _expand(key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + _SUITE_ID + label + info
    return hmac.digest(key, labelled + b"\x01", "sha256")[:length]


def opened(private: bytes, purpose: bytes, sealed: bytes) -> bytes:
    """RFC 9180, section 5.1.1 and 5.2: base mode, one message, no associated data."""
    secret = shared_secret(private, sealed[:1120])
    about = b"\x00" + _extract(b"", b"psk_id_hash", b"") + _extract(b"", b"info_hash", purpose)
    extracted = _extract(secret, b"secret", b"")
    key, nonce = _expand(extracted, b"key", about, 32), _expand(extracted, b"base_nonce", about, 12)
    return AESGCM(key).decrypt(nonce, sealed[1120:], b"")


def seals() -> list[Entry]:
    sealed = base64.b64decode(SEALED)
    if opened(AGGREGATOR, PURPOSE.encode(), sealed) != CONTENT:
        raise SystemExit("what was sealed does not open")
    return [
        {
            "private": AGGREGATOR.hex(),
            "public": public_of(AGGREGATOR).hex(),
            "purpose": PURPOSE,
            "sealed": sealed.hex(),
            "shared_secret": shared_secret(AGGREGATOR, sealed[:1120]).hex(),
            "content": CONTENT.hex(),
        }
    ]


def purposes() -> list[Entry]:
    roster = roster_of(THREE)
    context, of = digest(context_of(roster, 1)), digest(roster)
    sender, receiver, _ = THREE
    return [
        {"of": "pair", "roster": roster, "sender": sender, "receiver": receiver,
         "purpose": f"locum secagg pair {of} {sender} {receiver}"},
        {"of": "model", "roster": roster, "model": MODEL, "purpose": f"locum secagg model {of} {MODEL}"},
        {"of": "answer", "context": context_of(roster, 1), "survivors": THREE, "site": sender,
         "purpose": f"locum secagg answer {context} {digest(THREE)} {sender}"},
    ]  # fmt: skip


# --- derived keys


def half(name: str, peer: str) -> bytes:
    """What `name` has drawn for `peer`."""
    return bytes(drawn(f"half {name} {peer}"))


def pair_secret(roster: Entry, one: str, other: str) -> bytes:
    first, second = sorted((one, other))
    return derived(half(first, second) + half(second, first), "pair", bytes.fromhex(digest(roster)))


def ratcheted(chain: bytes, steps: int) -> bytes:
    for _ in range(steps):
        chain = derived(chain, "ratchet")
    return chain


def pair_secrets() -> list[Entry]:
    made = []
    for names, site, peer in ((THREE, "Harbour", "north-2"), (THREE, "north-2", "Harbour"), (FOUR, "a", "B")):
        roster = roster_of(names)
        found = {"ours": half(site, peer).hex(), "theirs": half(peer, site).hex()}
        made.append({"roster": roster, "site": site, "peer": peer, **found,
                     "secret": pair_secret(roster, site, peer).hex()})  # fmt: skip
    return made


def ratchets() -> list[Entry]:
    chain = pair_secret(roster_of(THREE), *THREE[:2])
    return [{"chain": chain.hex(), "steps": steps, "after": ratcheted(chain, steps).hex()} for steps in (1, 2, 1000)]


def seeds() -> list[Entry]:
    made = []
    for names, site, peer, step in ((THREE, "Harbour", "north-2", 1), (FOUR, "a", "B", 7)):
        roster = roster_of(names)
        context = context_of(roster, step)
        chain, salt = ratcheted(pair_secret(roster, site, peer), step - 1), bytes.fromhex(digest(context))
        seed = derived(chain, "mask", salt)
        made.append(
            {
                "context": context,
                "chain": chain.hex(),
                "seed": seed.hex(),
                "commitment": hashlib.sha256(seed).hexdigest(),
                "boxes": {sender: derived(chain, f"shares {sender}", salt).hex() for sender in (site, peer)},
            }
        )
    return made


def boxed(key: bytes, content: bytes) -> bytes:
    return AESGCM(key).encrypt(bytes(12), content, b"")


def boxes() -> list[Entry]:
    made = []
    for number, length in enumerate((0, 33, 3 * 33, 20 * 33)):
        key, content = bytes(drawn(f"box {number}")), bytes(drawn(f"box content {number}", length))
        made.append({"key": key.hex(), "content": content.hex(), "box": boxed(key, content).hex()})
    return made


# --- models


def models() -> list[Entry]:
    """The content's byte k is k mod 251."""
    key = bytes(drawn("model key"))
    pieces = []
    for offset, count in ((0, 48), (1021, 32), (2**20 - 16, 32), (2**24 + 5, 16)):
        plain = bytes(at % 251 for at in range(offset, offset + count))
        mixed = bytes(a ^ b for a, b in zip(plain, key_stream(key, 0, offset, count), strict=True))
        pieces.append({"offset": offset, "content": plain.hex(), "sealed": mixed.hex()})
    return [{"key": key.hex(), "name": derived(key, "name").hex(), "pieces": pieces}]


# --- a whole sum

LANE: list[Entry] = [{"name": "weight", "length": 1, "bound": 1.0}, {"name": "loss", "length": 2, "bound": 1000.0}]


class Sum:
    """Names ascending; those of `gone` were at the set-up, and gave nothing."""

    def __init__(self, names: list[str], gone: set[str], *, bits: int, step: int, bound: float) -> None:
        self.names, self.bits, self.step, self.bound = names, bits, step, bound
        self.survivors = [name for name in names if name not in gone]
        self.roster = roster_of(names)
        self.context = context_of(self.roster, step, round=2, attempt=2)
        self.salt = bytes.fromhex(digest(self.context))
        self.scale = largest_of(bits, len(names)) / bound

    # seeds

    def chain(self, one: str, other: str) -> bytes:
        return ratcheted(pair_secret(self.roster, one, other), self.step - 1)

    def seed(self, giver: str, other: str) -> bytes:
        if giver == other:
            return bytes(drawn(f"self mask {giver} {self.step}"))
        return derived(self.chain(giver, other), "mask", self.salt)

    def box_key(self, giver: str, receiver: str) -> bytes:
        if giver == receiver:
            return bytes(drawn(f"self box {giver} {self.step}"))
        return derived(self.chain(giver, receiver), f"shares {giver}", self.salt)

    def coefficients(self, giver: str, other: str) -> list[int]:
        wide = [drawn(f"coefficient {giver} {other} {number}") for number in range(1, self.roster["threshold"])]
        return [int.from_bytes(number, "big") for number in wide]

    def row(self, giver: str, receiver: str) -> bytes:
        """The receiver's shares of all of the giver's seeds, in the roster's order."""
        place = self.names.index(receiver) + 1
        told = [
            share_of(int.from_bytes(self.seed(giver, other), "big"), self.coefficients(giver, other), place)
            for other in self.names
        ]
        return bytes.fromhex("".join(told))

    # vectors

    def given(self, name: str) -> Entry:
        """Doubles; with 32 bits, none lies where more precise arithmetic would round otherwise."""
        at = self.names.index(name) + 1
        update = {"conv.weight": [at / 8, -at / 16, 0.0, 1e-3, -1e-3, self.bound / 2], "bias": [-self.bound / at, 0.3]}
        return {"update": update, "weight": at / 4, "scalars": {"weight": [at / 4], "loss": [at * 0.7, -1.25]}}

    def steps(self, name: str) -> list[int]:
        """The update in the ring: tensors by name ascending, each rounded by the next draws of one stream."""
        given = self.given(name)
        values = [value for tensor in sorted(given["update"]) for value in given["update"][tensor]]
        stream = key_stream(self.rounding(name), 0, 0, 4 * len(values))
        draws = [int.from_bytes(stream[4 * at :][:4], "little") for at in range(len(values))]
        found = [
            math.floor(value * (given["weight"] * self.scale) + draw * 2.0**-32)
            for value, draw in zip(values, draws, strict=True)
        ]
        scale = Fraction(largest_of(self.bits, len(self.names))) / Fraction(self.bound) * Fraction(given["weight"])
        exact = [
            math.floor(Fraction(value) * scale + Fraction(draw, 2**32))
            for value, draw in zip(values, draws, strict=True)
        ]
        if self.bits == 32 and found != exact:
            raise SystemExit("an element depends on how precisely it is computed")
        return found

    def rounding(self, name: str) -> bytes:
        return bytes(drawn(f"rounding {name}"))

    def fractions(self) -> list[int]:
        """Bits right of the point, for each number of the lane."""
        found = []
        for scalar in LANE:
            whole = math.floor(math.log2(math.ceil(scalar["bound"]))) + 1
            found += [62 - whole - math.ceil(math.log2(len(self.names)))] * scalar["length"]
        return found

    def scalars(self, name: str) -> list[int]:
        given = self.given(name)["scalars"]
        values = [value for scalar in LANE for value in given[scalar["name"]]]
        return [round(Fraction(value) * 2**bits) for value, bits in zip(values, self.fractions(), strict=True)]

    def masked(self, name: str, numbers: list[int], lane: int, bits: int) -> list[int]:
        """Plus the own mask and those shared with later places, minus those shared with earlier ones."""
        size, place = bits // 8, self.names.index(name)
        found = list(numbers)
        for at, other in enumerate(self.names):
            stream = key_stream(self.seed(name, other), lane, 0, size * len(numbers))
            sign = 1 if at >= place else -1
            found = [
                number + sign * int.from_bytes(stream[size * index :][:size], "little")
                for index, number in enumerate(found)
            ]
        return [number % 2**bits for number in found]

    def upload(self, name: str) -> Entry:
        boxes = [boxed(self.box_key(name, receiver), self.row(name, receiver)).hex() for receiver in self.names]
        return {
            "scalars": packed(self.masked(name, self.scalars(name), 0, 64), 64),
            "update": packed(self.masked(name, self.steps(name), 1, self.bits), self.bits),
            "boxes": boxes,
            "commitments": [hashlib.sha256(self.seed(name, other)).hexdigest() for other in self.names],
        }

    # what is asked

    def wanted(self, giver: str) -> list[str]:
        return [giver, *(name for name in self.names if name not in self.survivors)]

    def told(self, name: str) -> str:
        """The shares, by giver in the roster's order, of the seeds that are wanted of each."""
        found = ""
        for giver in self.survivors:
            row = self.row(giver, name)
            found += "".join(row[33 * self.names.index(other) :][:33].hex() for other in self.wanted(giver))
        return found

    def entry(self) -> Entry:
        scalars = [sum(column) for column in zip(*(self.scalars(name) for name in self.survivors), strict=True)]
        update = [sum(column) for column in zip(*(self.steps(name) for name in self.survivors), strict=True)]
        folded = {
            lane: [sum(column) for column in zip(*found, strict=True)]
            for lane, found in (
                ("scalars", [self.masked(name, self.scalars(name), 0, 64) for name in self.survivors]),
                ("update", [self.masked(name, self.steps(name), 1, self.bits) for name in self.survivors]),
            )
        }
        self._check(folded, {"scalars": scalars, "update": update})
        return {
            "roster": self.roster,
            "context": self.context,
            "private": AGGREGATOR.hex(),
            "bits": self.bits,
            "bound": self.bound,
            "lane": LANE,
            "halves": {
                name: {peer: half(name, peer).hex() for peer in self.names if peer != name} for name in self.names
            },
            "self_seeds": {name: self.seed(name, name).hex() for name in self.survivors},
            "self_boxes": {name: self.box_key(name, name).hex() for name in self.survivors},
            "coefficients": {
                name: {other: [f"{draw:066x}" for draw in self.coefficients(name, other)] for other in self.names}
                for name in self.survivors
            },
            "rounding": {name: self.rounding(name).hex() for name in self.survivors},
            "given": {name: self.given(name) for name in self.survivors},
            "elements": {
                name: {"scalars": packed(self.scalars(name), 64), "update": packed(self.steps(name), self.bits)}
                for name in self.survivors
            },
            "uploads": {name: self.upload(name) for name in self.survivors},
            "folded": {"scalars": packed(folded["scalars"], 64), "update": packed(folded["update"], self.bits)},
            "survivors": self.survivors,
            "told": {name: self.told(name) for name in self.survivors},
            "seeds": {
                name: {other: self.seed(name, other).hex() for other in self.wanted(name)} for name in self.survivors
            },
            "total": {"scalars": packed(scalars, 64), "update": packed(update, self.bits)},
            "read": {
                "scalars": [float(total) * 2.0**-bits for total, bits in zip(scalars, self.fractions(), strict=True)],
                "update": [total * (1 / self.scale) for total in update],
            },
        }

    def _check(self, folded: dict[str, list[int]], plain: dict[str, list[int]]) -> None:
        """Takes the masks off as the aggregator does, and finds the sum."""
        for lane, bits, index in (("scalars", 64, 0), ("update", self.bits, 1)):
            found, size = list(folded[lane]), bits // 8
            for giver in self.survivors:
                for other in self.wanted(giver):
                    stream = key_stream(self.seed(giver, other), index, 0, size * len(found))
                    sign = -1 if self.names.index(other) >= self.names.index(giver) else 1
                    found = [
                        number + sign * int.from_bytes(stream[size * at :][:size], "little")
                        for at, number in enumerate(found)
                    ]
            if any((one - other) % 2**bits for one, other in zip(found, plain[lane], strict=True)):
                raise SystemExit("the masks do not cancel")


def sums() -> list[Entry]:
    return [
        Sum(THREE, set(), bits=32, step=1, bound=1.5).entry(),
        Sum(FOUR, {"B"}, bits=64, step=3, bound=1.0).entry(),
    ]


def vectors() -> dict[str, list[Entry]]:
    """Everything that the file holds."""
    _check_hkdf()
    return {
        "thresholds": thresholds(),
        "rosters": rosters(),
        "contexts": contexts(),
        "statements": statements(),
        "seals": seals(),
        "purposes": purposes(),
        "pair_secrets": pair_secrets(),
        "ratchets": ratchets(),
        "seeds": seeds(),
        "boxes": boxes(),
        "models": models(),
        "sums": sums(),
    }


if __name__ == "__main__":
    text = json.dumps(vectors(), indent=1) + "\n"
    Path(__file__).with_name("secure-aggregation-protocol.json").write_text(text, encoding="ascii")
