"""Known answers that were computed without our code; tests/vectors/README.md says what they mean."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from locum.common import canonical
from locum.common.identity import PublicKey, certificate_pem, new_key
from locum.common.secagg import LEAST_SITES, MOST_SITES, keys, model, site
from locum.common.secagg.aggregator import SecureSum
from locum.common.secagg.masks import Masks, Stream
from locum.common.secagg.ring import CHUNK, Ring, Scalar, read_scalars, write_scalars
from locum.common.secagg.roster import _KINDS, Context, Roster, Statement, threshold_of, verified
from locum.common.secagg.shares import SHARE_BYTES, ShareError, coefficients, combine, split
from locum.common.secagg.site import Masking, Ready, Request
from locum.common.secagg.upload import BOXES, COMMITMENTS, SCALARS, UPDATE, Given, Layout, masked
from locum.common.tensor_files import in_memory
from tests.common.secagg.federation import authority, body_of

Entry = dict[str, Any]

VECTORS = Path(__file__).parents[2] / "vectors"
SCRIPTS = {
    "make_primitives.py": "secure-aggregation-primitives.json",
    "make_protocol.py": "secure-aggregation-protocol.json",
}
FILES = {script: json.loads((VECTORS / name).read_text(encoding="ascii")) for script, name in SCRIPTS.items()}
ANSWERS = {name: entries for found in FILES.values() for name, entries in found.items()}
EACH = {name: pytest.mark.parametrize("entry", entries) for name, entries in ANSWERS.items()}


def _elements(text: str, bits: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytes.fromhex(text), f"<u{bits // 8}").copy()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_answers_are_those_of_the_script_beside_them(script: str) -> None:
    assert runpy.run_path(str(VECTORS / script))["vectors"]() == FILES[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_knows_nothing_of_our_code(script: str) -> None:
    assert "import locum" not in (text := (VECTORS / script).read_text())
    assert "from locum" not in text


def test_every_kind_of_answer_is_explained() -> None:
    explained = (VECTORS / "README.md").read_text(encoding="utf-8")
    assert [line[4:-1] for line in explained.splitlines() if line.startswith("## `")] == list(ANSWERS)


# --- primitives


@EACH["key_streams"]
def test_key_streams(entry: Entry) -> None:
    stream, left = Stream(bytes.fromhex(entry["seed"]), entry["lane"]), entry["offset"]
    while left:
        passed = min(left, 8 * CHUNK)
        stream.fill(np.empty(passed, np.uint8))
        left -= passed
    out = np.empty(len(entry["stream"]) // 2, np.uint8)
    stream.fill(out)
    assert out.tobytes().hex() == entry["stream"]


@EACH["masks"]
def test_masks(entry: Entry) -> None:
    add, subtract = ([bytes.fromhex(seed) for seed in entry[sign]] for sign in ("add", "subtract"))
    vector = _elements(entry["vector"], entry["bits"])
    Masks(entry["lane"], add=add, subtract=subtract).apply(vector)
    assert vector.tobytes().hex() == entry["masked"]


@EACH["quantisations"]
def test_quantisations(entry: Entry) -> None:
    ring = Ring(entry["bits"], entry["sites"], entry["bound"])
    out = np.empty(len(entry["values"]), ring.dtype)
    ring.write(np.array(entry["values"]), entry["weight"], _elements(entry["random"], 32), out)
    assert ring.scale == entry["scale"]
    assert out.tobytes().hex() == entry["elements"]
    assert ring.read(out).tolist() == entry["read"]


@EACH["scalars"]
def test_scalars(entry: Entry) -> None:
    lane = [Scalar(**scalar) for scalar in entry["lane"]]
    ends = np.cumsum([scalar.length for scalar in lane])[:-1]
    total = np.zeros(sum(scalar.length for scalar in lane), np.uint64)
    for numbers, elements in zip(entry["values"], entry["elements"], strict=True):
        parts = np.split(np.array(numbers), ends)
        values = {scalar.name: part for scalar, part in zip(lane, parts, strict=True)}
        written = write_scalars(lane, values, entry["sites"])
        assert written.tobytes().hex() == elements
        total += written
    assert total.tobytes().hex() == entry["total"]
    assert np.concatenate(list(read_scalars(lane, total, entry["sites"]).values())).tolist() == entry["read"]


@EACH["sharings"]
def test_sharings(entry: Entry) -> None:
    secret, shares = bytes.fromhex(entry["secret"]), [bytes.fromhex(share) for share in entry["shares"]]
    draws = iter([int(draw, 16) for draw in entry["coefficients"]])
    assert split(secret, entry["threshold"], entry["holders"], lambda _: next(draws)) == shares
    for recovery in entry["recoveries"]:
        places = recovery["places"]
        assert [found.to_bytes(SHARE_BYTES).hex() for found in coefficients(places)] == recovery["lagrange"]
        assert combine({place: shares[place - 1] for place in places}) == secret


@EACH["refused_sharings"]
def test_refused_sharings(entry: Entry) -> None:
    with pytest.raises(ShareError):
        combine({int(place): bytes.fromhex(share) for place, share in entry["shares"].items()})


# --- the protocol


def test_thresholds() -> None:
    found = {entry["sites"]: entry for entry in ANSWERS["thresholds"]}
    assert {sites: entry["threshold"] for sites, entry in found.items()} == {
        sites: threshold_of(sites) for sites in range(LEAST_SITES, MOST_SITES + 1)
    }
    for sites, entry in found.items():
        assert entry["together"] == min(2 * entry["threshold"] - sites - 1, entry["threshold"] - 2)


@EACH["rosters"]
def test_rosters(entry: Entry) -> None:
    roster = Roster.model_validate(entry["roster"])
    assert canonical.canonical_json(roster.model_dump(mode="json")).decode() == entry["canonical"]
    assert (roster.digest, roster.places) == (entry["digest"], entry["places"])


@EACH["contexts"]
def test_contexts(entry: Entry) -> None:
    context = Context.model_validate(entry["context"])
    assert canonical.canonical_json(context.model_dump(mode="json")).decode() == entry["canonical"]
    assert (context.digest, context.sum) == (entry["digest"], entry["sum"])


@EACH["statements"]
def test_statements(entry: Entry) -> None:
    kind: type[Statement] = next(kind for kind, name in _KINDS.items() if name == entry["kind"])
    key: PublicKey = load_pem_public_key(entry["public_key"].encode())  # type: ignore[assignment]
    assert verified(entry["envelope"], kind, key).model_dump(mode="json") == entry["body"]
    signed = f"locum {entry['kind']}\n".encode() + canonical.canonical_json(entry["body"])
    assert canonical.sha256_hex(signed) == entry["signed_sha256"]


@EACH["seals"]
def test_seals(entry: Entry) -> None:
    private, public, sealed = (bytes.fromhex(entry[name]) for name in ("private", "public", "sealed"))
    content, purpose = bytes.fromhex(entry["content"]), entry["purpose"].encode()
    assert keys.public_of(private) == public
    assert keys.unseal(private, purpose, sealed) == content
    script = runpy.run_path(str(VECTORS / "make_protocol.py"))
    assert script["opened"](private, purpose, keys.seal(public, purpose, content)) == content


@EACH["purposes"]
def test_purposes(entry: Entry) -> None:
    if entry["of"] == "answer":
        found = site.answer_purpose(Context.model_validate(entry["context"]), entry["survivors"], entry["site"])
    elif entry["of"] == "model":
        found = site.model_purpose(Roster.model_validate(entry["roster"]), entry["model"])
    else:
        found = site._pair_purpose(Roster.model_validate(entry["roster"]), entry["sender"], entry["receiver"])
    assert found.decode() == entry["purpose"]


@EACH["pair_secrets"]
def test_pair_secrets(entry: Entry) -> None:
    roster, ours, theirs = (
        Roster.model_validate(entry["roster"]),
        *(bytes.fromhex(entry[n]) for n in ("ours", "theirs")),
    )
    assert site.pair_secret(roster, entry["site"], entry["peer"], ours=ours, theirs=theirs).hex() == entry["secret"]
    assert site.pair_secret(roster, entry["peer"], entry["site"], ours=theirs, theirs=ours).hex() == entry["secret"]


@EACH["ratchets"]
def test_ratchets(entry: Entry) -> None:
    assert site._ratcheted(bytes.fromhex(entry["chain"]), entry["steps"]).hex() == entry["after"]


@EACH["seeds"]
def test_seeds(entry: Entry) -> None:
    chain, salt = bytes.fromhex(entry["chain"]), bytes.fromhex(Context.model_validate(entry["context"]).digest)
    seed = keys.derive(chain, "mask", salt)
    assert (seed.hex(), site.commitment(seed).hex()) == (entry["seed"], entry["commitment"])
    assert {name: keys.derive(chain, f"shares {name}", salt).hex() for name in entry["boxes"]} == entry["boxes"]


@EACH["boxes"]
def test_boxes(entry: Entry) -> None:
    key, content, box = (bytes.fromhex(entry[name]) for name in ("key", "content", "box"))
    assert keys.close_box(key, content) == box
    assert keys.open_box(key, box) == content


@EACH["models"]
def test_models(entry: Entry, tmp_path: Path) -> None:
    key, last = bytes.fromhex(entry["key"]), entry["pieces"][-1]
    assert model.name_of(key) == entry["name"]
    content = np.resize(np.arange(251, dtype=np.uint8), last["offset"] + len(last["content"]) // 2).tobytes()
    (tmp_path / "model").write_bytes(content)
    model.seal_file(tmp_path / "model", tmp_path / "sealed", key)
    sealed = (tmp_path / "sealed").read_bytes()
    assert model.seal_bytes(content, key) == sealed
    for piece in entry["pieces"]:
        part = slice(piece["offset"], piece["offset"] + len(piece["content"]) // 2)
        assert (content[part].hex(), sealed[part].hex()) == (piece["content"], piece["sealed"])


# --- a whole sum


class _Sum:
    """An entry of `sums` as Locum sees it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.roster, self.context = Roster.model_validate(entry["roster"]), Context.model_validate(entry["context"])
        self.lane = tuple(Scalar(**scalar) for scalar in entry["lane"])
        ring = Ring(entry["bits"], len(self.roster.members), entry["bound"])
        size = sum(len(values) for values in entry["given"][entry["survivors"][0]]["update"].values())
        self.layout = Layout(self.roster, ring, size, self.lane)
        root = authority()
        self.keys: dict[str, ec.EllipticCurvePrivateKey] = {name: new_key() for name in self.roster.places}
        self.certificates: dict[str, x509.Certificate] = {
            name: root.issue_site(name, key.public_key()) for name, key in self.keys.items()
        }

    def ready(self, name: str) -> Ready:
        """A site after its set-up."""
        halves = {
            one: {peer: bytes.fromhex(text) for peer, text in of.items()} for one, of in self.entry["halves"].items()
        }
        chains = {
            peer: site.pair_secret(self.roster, name, peer, ours=half, theirs=halves[peer][name])
            for peer, half in halves[name].items()
        }
        certificates = {one: _pem(certificate) for one, certificate in self.certificates.items()}
        return Ready(site=name, roster=self.roster, certificates=certificates, models=bytes(96), chains=chains)

    def masking(self, name: str) -> Masking:
        """As :func:`site.mask` makes it, with the entry's own seed, key and coefficients in place of drawn ones."""
        spent, made = site.mask(self.ready(name), self.context)
        entry, places = self.entry, self.roster.places
        own = bytes.fromhex(entry["self_seeds"][name])
        expected = [bytes.fromhex(text) for text in entry["uploads"][name]["commitments"]]
        here = places[name] - 1
        peers = [index for index in range(len(places)) if index != here]
        assert [made.commitments[index] for index in peers] == [expected[index] for index in peers]
        assert site.commitment(own) == expected[here]
        seeds = {site.commitment(seed): seed for seed in (*made.add, *made.subtract)} | {expected[here]: own}
        by_name = {other: seeds[expected[place - 1]] for other, place in places.items()}
        split_up = {
            other: split(seed, self.roster.threshold, len(places), self._draws(name, other))
            for other, seed in by_name.items()
        }
        boxes = tuple(
            keys.close_box(self._box_key(name, receiver), b"".join(split_up[o][place - 1] for o in places))
            for receiver, place in places.items()
        )
        assert spent.step == self.context.step
        return Masking(
            add=tuple(by_name[other] for other, place in places.items() if place > here),
            subtract=tuple(by_name[other] for other, place in places.items() if place <= here),
            boxes=boxes,
            commitments=tuple(expected),
        )

    def _draws(self, giver: str, other: str) -> Any:
        draws = iter(int(text, 16) for text in self.entry["coefficients"][giver][other])
        return lambda _: next(draws)

    def _box_key(self, giver: str, receiver: str) -> bytes:
        if giver == receiver:
            return bytes.fromhex(self.entry["self_boxes"][giver])
        return site.mask(self.ready(receiver), self.context)[0].boxes[giver]

    def answering(self, name: str) -> Ready:
        """A site that has given to the sum."""
        boxes = {giver: self._box_key(giver, name) for giver in self.entry["survivors"]}
        return site.mask(self.ready(name), self.context)[0].model_copy(update={"boxes": boxes})

    def tensors(self, name: str) -> dict[str, Any]:
        """The entry's upload."""
        found = self.entry["uploads"][name]
        return {
            SCALARS: _elements(found["scalars"], 64),
            UPDATE: _elements(found["update"], self.entry["bits"]),
            BOXES: np.stack([_elements(box, 8) for box in found["boxes"]]),
            COMMITMENTS: np.stack([_elements(digest, 8) for digest in found["commitments"]]),
        }

    def folded(self) -> SecureSum:
        """The sum of the entry's uploads."""
        total = SecureSum(self.context, self.layout, self.certificates, bytes.fromhex(self.entry["private"]))
        for name in self.entry["survivors"]:
            tensors = self.tensors(name)
            body = body_of(tensors)
            total.fold(name, site.header(self.ready(name), self.context, body, self.keys[name]), body, tensors)
        return total


@EACH["sums"]
def test_the_uploads_of_a_sum(entry: Entry) -> None:
    found = _Sum(entry)
    for name in entry["survivors"]:
        told = entry["given"][name]
        update = {tensor: np.array(values) for tensor, values in told["update"].items()}
        given = Given(update, told["weight"], {scalar: np.array(values) for scalar, values in told["scalars"].items()})
        rounding = bytes.fromhex(entry["rounding"][name])
        empty = Masking(add=(), subtract=(), boxes=(b"",), commitments=(b"",))
        plain = in_memory(masked(found.layout, given, empty, Stream(rounding)))
        assert {lane: plain[lane].tobytes().hex() for lane in (SCALARS, UPDATE)} == entry["elements"][name]
        tensors = in_memory(masked(found.layout, given, found.masking(name), Stream(rounding)))
        assert {lane: array.tobytes() for lane, array in tensors.items()} == {
            lane: array.tobytes() for lane, array in found.tensors(name).items()
        }


@EACH["sums"]
def test_the_answers_of_a_sum_and_what_they_unmask(entry: Entry) -> None:
    found = _Sum(entry)
    total = found.folded()
    assert {SCALARS: total.scalars.tobytes().hex(), UPDATE: total.update.tobytes().hex()} == entry["folded"]
    for name in entry["survivors"]:
        boxes = dict(zip(total.survivors, (row.tobytes() for row in total.boxes_for(name)), strict=True))
        request = Request(total.context, total.survivors, total.headers, boxes)
        _, sealed = site.answer(found.answering(name), request, least=3, before=None)
        purpose = site.answer_purpose(total.context, total.survivors, name)
        assert keys.unseal(total.private, purpose, sealed).hex() == entry["told"][name]
        total.take(name, sealed)
    seeds, liars = total._seeds()
    assert (liars, {pair: seed.hex() for pair, seed in seeds.items()}) == (
        [],
        {(giver, other): seed for giver, of in entry["seeds"].items() for other, seed in of.items()},
    )
    assert total.unmask(3) == []
    assert {SCALARS: total.scalars.tobytes().hex(), UPDATE: total.update.tobytes().hex()} == entry["total"]
    assert found.layout.ring.read(total.update).tolist() == entry["read"]["update"]
    sums = read_scalars(found.lane, total.scalars, len(found.roster.members))
    assert np.concatenate([sums[scalar.name] for scalar in found.lane]).tolist() == entry["read"]["scalars"]


def _pem(certificate: x509.Certificate) -> str:
    return certificate_pem(certificate).decode()
