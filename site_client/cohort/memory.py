"""A site's memory of the questions that it was asked, and of whom its answers counted.

cohort/memory.sqlite    questions, answers, and the patients of every cell (mode 0600)

Rules:
  * An answer is in the memory, with the patients of its cells, before anybody else learns of it: one transaction,
    flushed to the disk. What is not there was never said.
  * One memory for all studies: who asks can call a study what he likes, and what he learns of one adds to the other.
  * A question that was answered has that answer for ever. A cell that was told keeps its number, whoever asks, until
    another may be told.
  * Patients are numbers here; a keyed hash says which pseudonym has which, and the key lies beside it. Who left the
    catalog stays in what was told of him.
  * A memory that has not every answer that the site's own log knows of is not used: it was lost, or is an old one.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locum.common.canonical import sha256_hex
from locum.common.durable import transaction
from locum.common.errors import LocumError
from locum.site_client.cohort.suppression import Cells, Verdict, judged, stacked

FOLDER, FILE = "cohort", "memory.sqlite"
_VERSION, _HASH_BYTES = 1, 16
_SCHEMA = f"""
CREATE TABLE meta (key BLOB NOT NULL) STRICT;
CREATE TABLE patients (number INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE) STRICT;
CREATE TABLE questions (
    digest TEXT PRIMARY KEY, envelope BLOB NOT NULL, received_at REAL NOT NULL, answered_at REAL, answer BLOB,
    refused TEXT
) STRICT;
CREATE TABLE cells (
    number INTEGER PRIMARY KEY, question TEXT NOT NULL, predicate TEXT NOT NULL, state TEXT NOT NULL,
    patients INTEGER, members BLOB NOT NULL
) STRICT;
CREATE INDEX cells_of ON cells (predicate, state);
PRAGMA user_version = {_VERSION};
"""


class ForgottenError(LocumError):
    """A memory that cannot be used: nothing is answered."""


#: Makes the signed answer of the numbers of each table; None is not told.
Seal = Callable[[list[list[int | None]]], bytes]


@dataclass(frozen=True)
class Asked:
    """A question as the memory has it.

    Attributes:
        envelope: as the federation signed it.
        received_at: seconds since 1970, by the coordinator's clock; `answered_at` likewise, None before.
        answer: the signed answer, None before.
        refused: the policy's key, if that is why nothing was told.
    """

    digest: str
    envelope: bytes
    received_at: float
    answered_at: float | None
    answer: bytes | None
    refused: str | None


@dataclass(frozen=True)
class Cell:
    """A cell that is asked about: its name, the same for the same patients, and who is in it (pseudonyms)."""

    predicate: str
    members: Collection[str]


class Memory:
    """The memory in an agent's folder. Every method raises ForgottenError if it cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    # --- questions

    def receive(self, digest: str, envelope: bytes, *, now: float) -> bool:
        """Notes a question; returns whether it is new. The first envelope of a question stays."""
        with self._changed() as connection:
            query = "INSERT INTO questions (digest, envelope, received_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
            return connection.execute(query, (digest, envelope, now)).rowcount > 0

    def questions(self) -> tuple[Asked, ...]:
        """Every question, the newest last; none if there is no memory."""
        if not self.path.exists():
            return ()
        with self._opened() as connection:
            rows = connection.execute(
                "SELECT digest, envelope, received_at, answered_at, answer, refused FROM questions"
                " ORDER BY received_at, digest"
            )
            return tuple(Asked(*row) for row in rows)

    def waiting(self) -> tuple[Asked, ...]:
        """The questions without an answer, the oldest first."""
        return tuple(asked for asked in self.questions() if asked.answer is None)

    def answered_since(self, at: float) -> int:
        """How many questions were answered with numbers since a time."""
        return sum(
            asked.answered_at is not None and asked.answered_at > at and asked.refused is None
            for asked in self.questions()
        )

    def check_has(self, answers: Collection[str]) -> None:
        """Raises unless the memory has each of these answers, by SHA-256: those that left according to the log."""
        known = {sha256_hex(asked.answer) for asked in self.questions() if asked.answer is not None}
        missing = len(set(answers) - known)
        if missing:
            raise ForgottenError(
                f"the memory of cohort questions in {self.path} lacks {missing} answers that left this site",
                "restore it from a backup; without it no question is answered",
            )

    # --- answers

    def refuse(self, digest: str, clause: str, envelope: bytes, *, now: float) -> None:
        """Notes an answer that tells nothing."""
        with self._changed() as connection:
            _note(connection, digest, envelope, now, clause)

    def answer(self, digest: str, tables: Sequence[Sequence[Cell]], *, least: int, seal: Seal, now: float) -> bytes:
        """Decides which numbers are told, and notes them and the answer that `seal` makes of them, at once.

        Args:
            digest: of the question.
            tables: its cells.
            least: the site's least cell.
            seal: makes the signed answer of the numbers.
            now: the time.

        Returns:
            The answer; the one that there is, if the question was answered before.
        """
        with self._changed() as connection:
            before = connection.execute("SELECT answer FROM questions WHERE digest = ?", (digest,)).fetchone()
            if before is not None and before[0] is not None:
                return bytes(before[0])
            numbers = [_decided(connection, digest, cells, least) for cells in _numbered(connection, tables)]
            envelope = seal(numbers)
            _note(connection, digest, envelope, now, None)
            return envelope

    # --- the file

    @contextmanager
    def _changed(self) -> Iterator[sqlite3.Connection]:
        with self._opened() as connection, transaction(connection):
            yield connection

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, isolation_level=None, timeout=10)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                _begin(connection, self.path)
                yield connection
        except (sqlite3.Error, OSError) as error:
            reason = f"the memory of cohort questions in {self.path} cannot be used: {error}"
            raise ForgottenError(
                reason, "free space, or restore it from a backup; nothing is answered meanwhile"
            ) from error


def _begin(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == _VERSION:
        return
    if version != 0:
        raise sqlite3.DatabaseError(f"its form is {version}, and this version of Locum knows {_VERSION}")
    path.chmod(0o600)
    with transaction(connection):
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            for statement in _SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES (?)", (secrets.token_bytes(32),))


def _note(connection: sqlite3.Connection, digest: str, envelope: bytes, now: float, refused: str | None) -> None:
    connection.execute(
        "UPDATE questions SET answered_at = ?, answer = ?, refused = ? WHERE digest = ? AND answer IS NULL",
        (now, envelope, refused, digest),
    )


# --- patients


@dataclass(frozen=True)
class _Numbered:
    """A cell with its patients as numbers."""

    predicate: str
    members: NDArray[np.int64]


def _numbered(connection: sqlite3.Connection, tables: Sequence[Sequence[Cell]]) -> list[list[_Numbered]]:
    """Gives every patient a number."""
    (key,) = connection.execute("SELECT key FROM meta").fetchone()
    people = sorted({pseudonym for cells in tables for cell in cells for pseudonym in cell.members})
    hashes = {each: hashlib.blake2b(each.encode(), key=key, digest_size=_HASH_BYTES).digest() for each in people}
    connection.executemany(
        "INSERT INTO patients (hash) VALUES (?) ON CONFLICT DO NOTHING", [(each,) for each in hashes.values()]
    )
    numbers: Mapping[bytes, int] = dict(connection.execute("SELECT hash, number FROM patients"))
    place = {pseudonym: numbers[each] for pseudonym, each in hashes.items()}
    return [
        [_Numbered(cell.predicate, np.array([place[each] for each in cell.members], dtype=np.int64)) for cell in cells]
        for cells in tables
    ]


def _row(members: NDArray[np.int64], patients: int) -> NDArray[np.bool_]:
    row = np.zeros(patients, dtype=np.bool_)
    row[members - 1] = True
    return row


def _packed(row: NDArray[np.bool_]) -> bytes:
    return zlib.compress(np.packbits(row).tobytes(), 1)


def _unpacked(content: bytes, patients: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(zlib.decompress(content), dtype=np.uint8))[:patients]
    return np.pad(bits, (0, patients - len(bits))).astype(np.bool_)


# --- a table


def _decided(connection: sqlite3.Connection, digest: str, cells: Sequence[_Numbered], least: int) -> list[int | None]:
    """What is told of each cell of a table; noted with its patients."""
    patients = connection.execute("SELECT coalesce(max(number), 0) FROM patients").fetchone()[0]
    asked = stacked([_row(cell.members, patients) for cell in cells], patients)
    small = asked[asked.sum(axis=1) < least].any(axis=0)
    if small.any():
        _remember(connection, digest, "", Verdict("small"), small)
    told, tainted = _before(connection, patients)
    verdicts = judged(told, tainted, asked, least)
    found: list[int | None] = []
    for cell, row, verdict in zip(cells, asked, verdicts, strict=True):
        if verdict.state == "told":
            _remember(connection, digest, cell.predicate, verdict, row)
        found.append(_number(connection, cell.predicate, verdict))
    return found


def _before(connection: sqlite3.Connection, patients: int) -> tuple[Cells, NDArray[np.bool_]]:
    """The cells that were told, and the patients of those that were too small."""
    rows: dict[str, list[NDArray[np.bool_]]] = {"told": [], "small": []}
    for state, members in connection.execute("SELECT state, members FROM cells ORDER BY number"):
        rows[state].append(_unpacked(members, patients))
    return stacked(rows["told"], patients), np.any(stacked(rows["small"], patients), axis=0)


def _remember(
    connection: sqlite3.Connection, digest: str, predicate: str, verdict: Verdict, row: NDArray[np.bool_]
) -> None:
    connection.execute(
        "INSERT INTO cells (question, predicate, state, patients, members) VALUES (?, ?, ?, ?, ?)",
        (digest, predicate, verdict.state, verdict.patients, _packed(row)),
    )


def _number(connection: sqlite3.Connection, predicate: str, verdict: Verdict) -> int | None:
    """What a cell's answer is: its number, or the one that was told before."""
    if verdict.state == "told":
        return verdict.patients
    query = "SELECT patients FROM cells WHERE predicate = ? AND state = 'told' ORDER BY number DESC LIMIT 1"
    known: Any = connection.execute(query, (predicate,)).fetchone()
    return None if known is None else int(known[0])
