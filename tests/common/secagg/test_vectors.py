"""Known answers that were computed without our code; tests/vectors/README.md says what they mean."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from locum.common.secagg.masks import Masks, Stream
from locum.common.secagg.ring import CHUNK, Ring, Scalar, read_scalars, write_scalars
from locum.common.secagg.shares import SHARE_BYTES, ShareError, coefficients, combine, split

Entry = dict[str, Any]

VECTORS = Path(__file__).parents[2] / "vectors"
ANSWERS = json.loads((VECTORS / "secure-aggregation-primitives.json").read_text(encoding="ascii"))
EACH = {name: pytest.mark.parametrize("entry", entries) for name, entries in ANSWERS.items()}


def _elements(text: str, bits: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytes.fromhex(text), f"<u{bits // 8}").copy()


def test_the_answers_are_those_of_the_script_beside_them() -> None:
    assert runpy.run_path(str(VECTORS / "make_primitives.py"))["vectors"]() == ANSWERS


def test_the_script_knows_nothing_of_our_code() -> None:
    assert "import locum" not in (text := (VECTORS / "make_primitives.py").read_text())
    assert "from locum" not in text


def test_every_kind_of_answer_is_explained() -> None:
    explained = (VECTORS / "README.md").read_text(encoding="utf-8")
    assert [line[4:-1] for line in explained.splitlines() if line.startswith("## `")] == list(ANSWERS)


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
