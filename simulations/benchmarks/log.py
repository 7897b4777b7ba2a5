"""What a log of a million committed rounds costs: to append to it, to open it, to prove something of it, to verify it.

Rules:
  * Each number stands beside a floor of the same bytes, in the same run: SHA-256 of the lines of the file, and a bare
    write that is flushed. Appends and bare writes take turns. Hashing is compared in seconds of the processor.
  * An entry is a round of four sites under secure aggregation, each with digests of its own.
  * To verify is to read every entry in its one spelling, to hash it, and to compare the root with the checkpoint that
    was signed. What a proof shows is checked; a wrong one is an error.
  * Memory is the most that a process had which opened the log and verified it, Python and its libraries included.
"""

from __future__ import annotations

import hashlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from locum.common.errors import RunError
from locum.common.log.entries import RoundEntry, SecureSumFields, read_entry
from locum.common.log.lines import write_all
from locum.common.log.merkle import Frontier, check_consistency, check_inclusion, leaf_hash
from locum.common.log.note import opened, sign
from locum.common.log.store import ENTRIES, Log
from locum.simulations.benchmarks.memory import alone, most
from locum.simulations.benchmarks.rows import Row

_SIZE, _APPENDS, _PROOFS = 1_000_000, 1000, 1000
_AT_ONCE = 1000
_ORIGIN, _SITES = "benchmark/log", ("east", "north", "south", "west")
T = TypeVar("T")


def a_round(number: int) -> RoundEntry:
    """A committed round; each number gives other digests."""
    draw = random.Random(number)  # noqa: S311 # no secret
    digests = iter([draw.randbytes(32).hex() for _ in range(10)])
    secured = SecureSumFields(
        roster=next(digests),
        context=next(digests),
        sites=len(_SITES),
        threshold=3,
        uploads={site: next(digests) for site in _SITES},
        total=next(digests),
    )
    return RoundEntry(
        at="2026-01-02T03:04:05Z",
        run="benchmark-1",
        plan="0" * 64,
        round=number + 1,
        attempt=1,
        start=next(digests),
        model=next(digests),
        sites=_SITES,
        secured=secured,
        refused={},
        spent={},
    )


def measure(size: int = _SIZE) -> Iterable[Row]:
    """Measures a log of `size` entries; raises RunError if a root or a proof is wrong."""
    with tempfile.TemporaryDirectory(prefix="locum-log-") as made:
        folder = Path(made) / "log"
        log = Log(folder, _ORIGIN)
        yield Row(
            f"{size} entries, appended {_AT_ONCE} at once: an entry",
            _timed(partial(_fill, log, size))[0] / size * 1e3,
            "ms",
        )
        key = Ed25519PrivateKey.generate()
        log.checkpoint(lambda checkpoint: sign(checkpoint, "benchmark", key))
        yield Row("an entry", (folder / ENTRIES).stat().st_size / size, "bytes")
        yield from _verifying(folder)
        yield from _proving(log)
        yield from _appending(log, Path(made) / "bare")


def _fill(log: Log, size: int) -> None:
    for first in range(0, size, _AT_ONCE):
        log.append(*[a_round(number) for number in range(first, min(size, first + _AT_ONCE))])


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


# --- to verify


@dataclass(frozen=True)
class _Cost:
    """Seconds of the clock and of the processor, and the most memory of the process so far, in MiB."""

    clock: float
    processor: float
    memory: float


def _cost(call: Callable[[], object]) -> _Cost:
    start = time.process_time()
    clock, _ = _timed(call)
    return _Cost(clock, time.process_time() - start, most())


def _verifying(folder: Path) -> Iterator[Row]:
    opening, verifying, floor = alone(_verified, folder)
    yield Row("open: every entry hashed, the tree compared", opening.clock, "s")
    yield Row("verify: every entry read and hashed, the root compared", verifying.clock, "s")
    yield Row("verify, of a processor", verifying.processor, "s")
    yield Row("floor: SHA-256 of the same lines, of a processor", floor.processor, "s")
    yield Row("verify / floor", verifying.processor / floor.processor, "×")
    yield Row("the most memory of the process that opened and verified", verifying.memory, "MiB")


def _verified(folder: Path) -> tuple[_Cost, _Cost, _Cost]:
    """What it costs to open a log, to verify it, and to hash its lines."""
    log: list[Log] = []
    opening = _cost(lambda: log.append(Log(folder, _ORIGIN)))
    verifying = _cost(partial(verify, *log))
    return opening, verifying, _cost(partial(_hashed, folder))


def verify(log: Log) -> None:
    """Raises EntryError for a line that is no entry, RunError unless the newest checkpoint is of these entries."""
    note, frontier = log.latest(), Frontier()
    for line in log.entries():
        read_entry(line)
        frontier.add(leaf_hash(line))
    if note is None or opened(note)[0].root != frontier.root():
        raise RunError("the root is not that of the checkpoint", "measure again")


def _hashed(folder: Path) -> None:
    with (folder / ENTRIES).open("rb") as file:
        for line in file:
            hashlib.sha256(line).digest()


# --- to prove


def _proving(log: Log) -> Iterator[Row]:
    size, root, draw = log.size, log.root(), random.Random(1)  # noqa: S311 # no secret
    indices = [draw.randrange(size) for _ in range(_PROOFS)]
    seconds, proofs = _timed(lambda: [log.inclusion(index, size) for index in indices])
    yield Row("a proof of inclusion", seconds / len(indices) * 1e3, "ms")
    for index, proof in zip(indices, proofs, strict=True):
        check_inclusion(leaf_hash(log.entry(index)), index, size, proof, root)
    seconds, proofs = _timed(lambda: [log.consistency(index, size) for index in indices])
    yield Row("a proof of consistency", seconds / len(indices) * 1e3, "ms")
    for index, proof in zip(indices, proofs, strict=True):
        check_consistency(index, size, proof, log.root(index), root)


# --- to append


def _appending(log: Log, bare: Path) -> Iterator[Row]:
    first, ours, floor = log.size, [], []
    with bare.open("wb", buffering=0) as file:
        for number in range(first, first + min(first, _APPENDS)):
            entry = a_round(number)
            ours.append(_timed(partial(log.append, entry))[0])
            floor.append(_timed(partial(_flushed, file.fileno(), log.entry(number) + b"\n"))[0])
    yield Row("an append of one entry, on the disk, median", statistics.median(ours) * 1e3, "ms")
    yield Row("an append, the slowest of a hundred", sorted(ours)[-(-len(ours) * 99 // 100) - 1] * 1e3, "ms")
    yield Row("floor: a write of the same bytes, flushed, median", statistics.median(floor) * 1e3, "ms")
    yield Row("append / floor", statistics.median(ours) / statistics.median(floor), "×")


def _flushed(descriptor: int, content: bytes) -> None:
    write_all(descriptor, content)
    os.fdatasync(descriptor)
