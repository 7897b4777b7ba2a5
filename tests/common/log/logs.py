"""Entries, keys and a log for the tests of logs."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from locum.common.log.entries import Entry, PolicyEntry, RoundEntry, SecureSumFields
from locum.common.log.note import Checkpoint, sign
from locum.common.log.store import Log

ORIGIN = "log.example.org/federation"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DIGEST = "ab" * 32
_SITES = ("east", "north", "south", "west")


def a_round(number: int, attempt: int = 1) -> RoundEntry:
    """A committed round of four sites under secure aggregation."""
    secured = SecureSumFields(
        roster=DIGEST, context=DIGEST, sites=4, threshold=3, uploads=dict.fromkeys(_SITES, DIGEST), total=DIGEST
    )
    return RoundEntry(
        at="2026-01-02T03:04:05Z",
        run="heart-1",
        plan=DIGEST,
        round=number + 1,
        attempt=attempt,
        start=DIGEST,
        model=DIGEST,
        sites=_SITES,
        secured=secured,
        refused={},
        spent={},
    )


def a_policy(number: int) -> PolicyEntry:
    """A short entry; each number gives another."""
    return PolicyEntry(at="2026-01-02T03:04:05Z", policy=f"{number:064x}")


def policies(start: int, end: int) -> list[Entry]:
    """Short entries."""
    return [a_policy(number) for number in range(start, end)]


def signed(checkpoint: Checkpoint) -> str:
    """A checkpoint, signed by the log."""
    return sign(checkpoint, ORIGIN, KEY)


def new_log(folder: Path, *entries: Entry) -> Log:
    """A log with entries, each an append of its own."""
    log = Log(folder, ORIGIN)
    for entry in entries:
        log.append(entry)
    return log
