"""A Merkle tree over the entries of a log: roots, and proofs that a stranger can check (RFC 6962, section 2.1).

Rules:
  * A leaf is hashed behind a byte 0, a node behind a byte 1 (section 2.1), so that neither can be taken for the other.
  * Whoever makes proofs asks for the hashes of complete subtrees and nothing else: of any store that has them.
  * Whoever checks a proof uses every hash of it, and refuses one with too few or too many (RFC 9162, sections 2.1.3.2
    and 2.1.4.2). There is one proof for a question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

HASH_BYTES = 32
#: The root of a log without entries: the SHA-256 of nothing.
EMPTY_ROOT = hashlib.sha256().digest()

#: (level, index) → the hash of the complete subtree over the leaves index · 2^level up to (index + 1) · 2^level.
Hashes = Callable[[int, int], bytes]


class ProofError(ValueError):
    """A proof that does not show what it should."""


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0 ‖ entry)."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(1 ‖ left ‖ right)."""
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(size: int) -> int:
    """k: the largest power of two below `size`, which is 2 or more."""
    return 1 << ((size - 1).bit_length() - 1)


# --- proofs: made


def root(hashes: Hashes, size: int) -> bytes:
    """MTH(D[size])."""
    return _subtree(hashes, 0, size) if size else EMPTY_ROOT


def inclusion_proof(hashes: Hashes, index: int, size: int) -> list[bytes]:
    """PATH(index, D[size]): at most ⌈log2 size⌉ hashes, from the leaf up; raises IndexError outside the log."""
    if not 0 <= index < size:
        raise IndexError(f"there is no entry {index} among {size}")
    proof: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            proof.append(_subtree(hashes, middle, end))
            end = middle
        else:
            proof.append(_subtree(hashes, start, middle))
            start = middle
    return proof[::-1]


def consistency_proof(hashes: Hashes, old: int, new: int) -> list[bytes]:
    """PROOF(old, D[new]); none is needed from 0, or between equals; raises IndexError unless 0 ≤ old ≤ new."""
    if not 0 <= old <= new:
        raise IndexError(f"a log of {new} entries does not contain one of {old}")
    if old in {0, new}:
        return []
    proof: list[bytes] = []
    start, end = 0, new
    while end > old:
        middle = start + _split(end - start)
        if old <= middle:
            proof.append(_subtree(hashes, middle, end))
            end = middle
        else:
            proof.append(_subtree(hashes, start, middle))
            start = middle
    # What is left is a subtree of both trees. If it is all of the old one, its hash is the root that was asked about.
    return [*([_subtree(hashes, start, end)] if start else []), *proof[::-1]]


def _subtree(hashes: Hashes, start: int, end: int) -> bytes:
    """MTH(D[start:end]), where `start` is a multiple of the largest power of two below the length."""
    found = b""
    for level, index in reversed(_complete(start, end)):
        found = node_hash(hashes(level, index), found) if found else hashes(level, index)
    return found


def _complete(start: int, end: int) -> list[tuple[int, int]]:
    """The complete subtrees, (level, index), that the leaves [start, end) are made of, the largest first."""
    parts = []
    while start < end:
        level = (end - start).bit_length() - 1
        parts.append((level, start >> level))
        start += 1 << level
    return parts


# --- proofs: checked


def check_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected: bytes) -> None:
    """Raises ProofError unless the leaf with this hash is entry `index` of the log of `size` entries with that root.

    The algorithm of RFC 9162, section 2.1.3.2.
    """
    if not 0 <= index < size:
        raise ProofError(f"there is no entry {index} among {size}")
    _check_form(leaf, expected, *proof)
    place, last, found = index, size - 1, leaf
    for hashed in proof:
        if last == 0:
            raise ProofError("the proof of inclusion is too long")
        if place & 1 or place == last:
            found = node_hash(hashed, found)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            found = node_hash(found, hashed)
        place, last = place >> 1, last >> 1
    if last != 0:
        raise ProofError("the proof of inclusion is too short")
    if found != expected:
        raise ProofError(f"entry {index} is not in the log of {size} entries with this root")


def check_consistency(old: int, new: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes) -> None:
    """Raises ProofError unless the log of `new` entries begins with that of `old`.

    The algorithm of RFC 9162, section 2.1.4.2; from 0, and between equals, the proof is empty.
    """
    if not 0 <= old <= new:
        raise ProofError(f"a log of {new} entries does not contain one of {old}")
    _check_form(old_root, new_root, *proof)
    if old in {0, new}:
        _check_trivial(old, proof, old_root, new_root if old == new else EMPTY_ROOT)
        return
    before, after = _both_roots(old, new, proof, old_root)
    if before != old_root or after != new_root:
        raise ProofError(f"the log of {new} entries does not begin with that of {old}")


def _check_trivial(old: int, proof: Sequence[bytes], old_root: bytes, expected: bytes) -> None:
    if proof:
        raise ProofError("the proof of consistency is too long")
    if old_root != expected:
        raise ProofError(f"there are two logs of {old} entries with different roots")


def _both_roots(old: int, new: int, proof: Sequence[bytes], old_root: bytes) -> tuple[bytes, bytes]:
    """The roots of both logs as the proof has them."""
    path = list(proof) if old & (old - 1) else [old_root, *proof]
    if not path:
        raise ProofError("the proof of consistency is too short")
    place, last = old - 1, new - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    before = after = path[0]
    for hashed in path[1:]:
        if last == 0:
            raise ProofError("the proof of consistency is too long")
        if place & 1 or place == last:
            before, after = node_hash(hashed, before), node_hash(hashed, after)
            while place and not place & 1:
                place, last = place >> 1, last >> 1
        else:
            after = node_hash(after, hashed)
        place, last = place >> 1, last >> 1
    if last != 0:
        raise ProofError("the proof of consistency is too short")
    return before, after


def _check_form(*hashes: bytes) -> None:
    if any(len(hashed) != HASH_BYTES for hashed in hashes):
        raise ProofError(f"a hash of the tree has {HASH_BYTES} bytes")


# --- a log that passes by


class Frontier:
    """The tree over leaves that come one after the other, in the memory of one hash a level.

    Attributes:
        size: leaves so far.
        peaks: the hashes of the complete subtrees that they are made of, the largest first.
    """

    def __init__(self, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self.size = size
        self.peaks = list(peaks)

    def copy(self) -> Frontier:
        """Another one, of the same leaves."""
        return Frontier(self.size, self.peaks)

    def add(self, leaf: bytes) -> list[bytes]:
        """Adds the leaf with this hash; the hashes of the subtrees that it completes, itself first."""
        completed, size = [leaf], self.size
        while size & 1:
            leaf = hashlib.sha256(b"\1" + self.peaks.pop() + leaf).digest()
            completed.append(leaf)
            size >>= 1
        self.peaks.append(leaf)
        self.size += 1
        return completed

    def root(self) -> bytes:
        """The root over all leaves so far."""
        if not self.peaks:
            return EMPTY_ROOT
        *others, found = self.peaks
        for peak in reversed(others):
            found = node_hash(peak, found)
        return found


def peaks(hashes: Hashes, size: int) -> list[bytes]:
    """What a :class:`Frontier` has after `size` leaves."""
    return [hashes(level, index) for level, index in _complete(0, size)]
