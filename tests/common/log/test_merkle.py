"""The tree: vectors of certificate transparency's reference code, the text of RFC 6962, another implementation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from locum.common.log.merkle import (
    EMPTY_ROOT,
    Frontier,
    Hashes,
    ProofError,
    check_consistency,
    check_inclusion,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    peaks,
    root,
)

LEAVES = [
    bytes.fromhex(leaf)
    for leaf in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
#: (index, size) → proof
INCLUSION = {
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
#: (old, new) → proof
CONSISTENCY = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
MOST = 70


def over(leaves: Sequence[bytes]) -> Hashes:
    """The hashes of the complete subtrees of some leaves, and of no other."""

    @cache
    def hashes(level: int, index: int) -> bytes:
        if level == 0:
            return leaf_hash(leaves[index])
        return node_hash(hashes(level - 1, 2 * index), hashes(level - 1, 2 * index + 1))

    return hashes


NUMBERED = over([str(number).encode() for number in range(MOST)])
sizes = st.integers(1, MOST)
Text = tuple[bytes, ...]


# --- RFC 6962, section 2.1, word by word


def mth(leaves: Text) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = _k(len(leaves))
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def path(m: int, leaves: Text) -> list[bytes]:
    if len(leaves) == 1:
        return []
    k = _k(len(leaves))
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


def subproof(m: int, leaves: Text, *, complete: bool) -> list[bytes]:
    n = len(leaves)
    if m == n:
        return [] if complete else [mth(leaves)]
    k = _k(n)
    if m <= k:
        return [*subproof(m, leaves[:k], complete=complete), mth(leaves[k:])]
    return [*subproof(m - k, leaves[k:], complete=False), mth(leaves[:k])]


def _k(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


# --- the vectors


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_the_reference_code(size: int) -> None:
    assert root(over(LEAVES), size).hex() == ROOTS[size - 1]


def test_a_log_without_entries_has_the_hash_of_nothing() -> None:
    assert root(over([]), 0) == EMPTY_ROOT == Frontier().root()
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(("index", "size"), INCLUSION)
def test_proofs_of_inclusion_are_those_of_the_reference_code(index: int, size: int) -> None:
    proof = inclusion_proof(over(LEAVES), index, size)
    assert [part.hex() for part in proof] == INCLUSION[index, size]
    check_inclusion(leaf_hash(LEAVES[index]), index, size, proof, bytes.fromhex(ROOTS[size - 1]))


@pytest.mark.parametrize(("old", "new"), CONSISTENCY)
def test_proofs_of_consistency_are_those_of_the_reference_code(old: int, new: int) -> None:
    proof = consistency_proof(over(LEAVES), old, new)
    assert [part.hex() for part in proof] == CONSISTENCY[old, new]
    check_consistency(old, new, proof, bytes.fromhex(ROOTS[old - 1]), bytes.fromhex(ROOTS[new - 1]))


# --- the text of the RFC, and another implementation


@pytest.mark.parametrize("size", range(1, MOST + 1))
def test_every_root_and_proof_is_that_of_the_text_and_holds(size: int) -> None:
    leaves = tuple(str(number).encode() for number in range(size))
    top = root(NUMBERED, size)
    assert top == mth(leaves)
    for index in range(size):
        proof = inclusion_proof(NUMBERED, index, size)
        assert proof == path(index, leaves)
        check_inclusion(leaf_hash(leaves[index]), index, size, proof, top)
    for old in range(1, size + 1):
        proof = consistency_proof(NUMBERED, old, size)
        assert proof == subproof(old, leaves, complete=True)
        check_consistency(old, size, proof, root(NUMBERED, old), top)
    check_consistency(0, size, consistency_proof(NUMBERED, 0, size), EMPTY_ROOT, top)


@pytest.mark.parametrize("seed", range(8))
def test_roots_are_those_of_another_implementation(seed: int) -> None:
    draw = random.Random(seed)
    leaves = [draw.randbytes(draw.randrange(0, 200)) for _ in range(draw.randrange(1, 1500))]
    theirs, frontier = InmemoryTree(algorithm="sha256"), Frontier()
    for leaf in leaves:
        theirs.append_entry(leaf)
        frontier.add(leaf_hash(leaf))
    hashes = over(leaves)
    for size in {1, len(leaves), *(draw.randrange(1, len(leaves) + 1) for _ in range(20))}:
        assert root(hashes, size) == theirs.get_state(size)
    assert frontier.root() == theirs.get_state()


@given(sizes)
def test_a_log_that_passes_by_has_the_same_root_and_hashes(size: int) -> None:
    frontier = Frontier()
    for number in range(size):
        completed = frontier.add(leaf_hash(str(number).encode()))
        last = number
        for level, hashed in enumerate(completed):
            assert hashed == NUMBERED(level, last >> level)
    assert frontier.size == size
    assert frontier.root() == root(NUMBERED, size)
    assert frontier.peaks == peaks(NUMBERED, size)
    assert Frontier(size, frontier.peaks).root() == frontier.copy().root() == frontier.root()


def test_a_copy_of_a_frontier_goes_its_own_way() -> None:
    frontier = Frontier()
    frontier.add(leaf_hash(b"0"))
    copy = frontier.copy()
    copy.add(leaf_hash(b"1"))
    assert (frontier.size, frontier.root()) == (1, leaf_hash(b"0"))


# --- what is refused


@st.composite
def inclusions(draw: st.DrawFn) -> tuple[int, int, list[bytes]]:
    size = draw(sizes)
    index = draw(st.integers(0, size - 1))
    return index, size, inclusion_proof(NUMBERED, index, size)


@st.composite
def consistencies(draw: st.DrawFn) -> tuple[int, int, list[bytes]]:
    new = draw(sizes)
    old = draw(st.integers(0, new))
    return old, new, consistency_proof(NUMBERED, old, new)


def _flipped(content: bytes, bit: int) -> bytes:
    bit %= len(content) * 8
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def _leaf(index: int) -> bytes:
    return leaf_hash(str(index).encode())


def _refused(check: Callable[[], None]) -> None:
    with pytest.raises(ProofError):
        check()


@settings(deadline=None)
@given(inclusions(), st.integers(0, 255), st.integers(0, MOST))
def test_a_changed_proof_leaf_or_root_is_no_inclusion(drawn: tuple[int, int, list[bytes]], bit: int, at: int) -> None:
    index, size, proof = drawn
    top, leaf = root(NUMBERED, size), _leaf(index)
    _refused(lambda: check_inclusion(_flipped(leaf, bit), index, size, proof, top))
    _refused(lambda: check_inclusion(leaf, index, size, proof, _flipped(top, bit)))
    _refused(lambda: check_inclusion(leaf, index, size, [*proof, top], top))
    _refused(lambda: check_inclusion(leaf, index, size, [top, *proof], top))
    if proof:
        at %= len(proof)
        _refused(
            lambda: check_inclusion(leaf, index, size, [*proof[:at], _flipped(proof[at], bit), *proof[at + 1 :]], top)
        )
        _refused(lambda: check_inclusion(leaf, index, size, proof[:at] + proof[at + 1 :], top))
        _refused(lambda: check_inclusion(leaf, index, size, [*proof[:at], proof[at][:-1], *proof[at + 1 :]], top))
    for other in range(size):
        if other != index:
            _refused(lambda other=other: check_inclusion(leaf, other, size, proof, top))


@settings(deadline=None)
@given(consistencies(), st.integers(0, 255), st.integers(0, MOST))
def test_a_changed_proof_or_root_is_no_consistency(drawn: tuple[int, int, list[bytes]], bit: int, at: int) -> None:
    old, new, proof = drawn
    before, after = root(NUMBERED, old), root(NUMBERED, new)
    _refused(lambda: check_consistency(old, new, proof, _flipped(before, bit), after))
    if old:  # of nothing, every log is a continuation
        _refused(lambda: check_consistency(old, new, proof, before, _flipped(after, bit)))
    _refused(lambda: check_consistency(old, new, [*proof, after], before, after))
    _refused(lambda: check_consistency(old, new, [before, *proof], before, after))
    if proof:
        at %= len(proof)
        changed = [*proof[:at], _flipped(proof[at], bit), *proof[at + 1 :]]
        _refused(lambda: check_consistency(old, new, changed, before, after))
        _refused(lambda: check_consistency(old, new, proof[:at] + proof[at + 1 :], before, after))


@given(st.integers(2, MOST), st.data())
def test_a_log_whose_past_was_changed_cannot_be_shown_to_continue_the_old_one(new: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, new))
    edited = data.draw(st.integers(0, old - 1))
    leaves = [str(number).encode() for number in range(new)]
    leaves[edited] += b" edited"
    forged = over(leaves)
    proof = consistency_proof(forged, old, new)
    _refused(lambda: check_consistency(old, new, proof, root(NUMBERED, old), root(forged, new)))


@pytest.mark.parametrize(("index", "size"), [(0, 0), (3, 3), (-1, 3), (0, -1)])
def test_an_entry_outside_the_log_has_no_proof(index: int, size: int) -> None:
    with pytest.raises(IndexError):
        inclusion_proof(NUMBERED, index, size)
    _refused(lambda: check_inclusion(_leaf(0), index, size, [], EMPTY_ROOT))


@pytest.mark.parametrize(("old", "new"), [(4, 3), (-1, 3), (0, -1)])
def test_a_log_does_not_continue_a_longer_one(old: int, new: int) -> None:
    with pytest.raises(IndexError):
        consistency_proof(NUMBERED, old, new)
    _refused(lambda: check_consistency(old, new, [], EMPTY_ROOT, EMPTY_ROOT))


def test_a_node_is_no_leaf() -> None:
    left, right = _leaf(0), _leaf(1)
    assert leaf_hash(left + right) != node_hash(left, right)
    assert leaf_hash(b"\x01" + left + right) != node_hash(left, right)
