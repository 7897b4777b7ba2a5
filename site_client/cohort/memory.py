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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

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
        received_at: seconds since 1970, by the coordinator's clock.
        answered_at: likewise, by the site's own: who asks must not set the clock of how many he may ask. None before.
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
    """A cell that is asked about: its name, the same for the same patients, and who is in it, by number."""

    predicate: str
    members: NDArray[np.int64]


@dataclass(frozen=True)
class Tables:
    """The cells of each table of a question; `people` are the pseudonyms of the patients, by number from 0."""

    cells: Sequence[Sequence[Cell]]
    people: Sequence[str]


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

    def answer(self, digest: str, asked: Tables, *, least: int, seal: Seal, now: float) -> bytes:
        """Decides which numbers are told, and notes them and the answer that `seal` makes of them, at once.

        Args:
            digest: of the question.
            asked: its cells.
            least: the site's least cell.
            seal: makes the signed answer of the numbers.
            now: the time.

        Returns:
            The answer; the one that there is, if the question was answered before.
        """
        while True:
            with self._changed() as connection:
                if (given := _given(connection, digest)) is not None:
                    return given
                cells = _numbered(connection, asked)
                held = _held(connection)
            decided = [_decided(held, table, least) for table in cells]  # takes seconds: nobody waits for it meanwhile
            with self._changed() as connection:
                if _given(connection, digest) is None and _last(connection) == held.last:
                    _remember(connection, digest, held.added)
                    envelope = seal(decided)
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


def _numbered(connection: sqlite3.Connection, asked: Tables) -> list[list[Cell]]:
    """The cells with the numbers that the patients have in the memory; those who have none are given one."""
    (key,) = connection.execute("SELECT key FROM meta").fetchone()
    there = np.unique(np.concatenate([np.zeros(0, np.int64), *(cell.members for row in asked.cells for cell in row)]))
    hashes = [hashlib.blake2b(asked.people[each].encode(), key=key, digest_size=_HASH_BYTES).digest() for each in there]
    connection.executemany(
        "INSERT INTO patients (hash) VALUES (?) ON CONFLICT DO NOTHING", [(each,) for each in hashes]
    )
    known: dict[bytes, int] = dict(connection.execute("SELECT hash, number FROM patients"))
    place = np.zeros(len(asked.people), dtype=np.int64)
    place[there] = [known[each] for each in hashes]
    return [[Cell(cell.predicate, place[cell.members]) for cell in row] for row in asked.cells]


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


@dataclass
class _Held:
    """What the memory holds of cells.

    Attributes:
        told: the cells that were told; `tainted` the patients of those that were too small.
        numbers: by a cell's name, the number that was told last.
        last: of the newest row.
        added: what becomes of cells now: name, verdict, patients.
    """

    told: Cells
    tainted: NDArray[np.bool_]
    numbers: dict[str, int]
    last: int
    added: list[tuple[str, Verdict, NDArray[np.bool_]]]


def _held(connection: sqlite3.Connection) -> _Held:
    patients = connection.execute("SELECT coalesce(max(number), 0) FROM patients").fetchone()[0]
    rows: dict[str, list[NDArray[np.bool_]]] = {"told": [], "small": []}
    numbers: dict[str, int] = {}
    query = "SELECT state, members, predicate, patients FROM cells ORDER BY number"
    for state, members, predicate, number in connection.execute(query):
        rows[state].append(_unpacked(members, patients))
        if state == "told":
            numbers[predicate] = number
    tainted = np.any(stacked(rows["small"], patients), axis=0)
    return _Held(stacked(rows["told"], patients), tainted, numbers, _last(connection), [])


def _last(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(number), 0) FROM cells").fetchone()[0])


def _given(connection: sqlite3.Connection, digest: str) -> bytes | None:
    """The answer to a question, if it has one."""
    row = connection.execute("SELECT answer FROM questions WHERE digest = ?", (digest,)).fetchone()
    return None if row is None or row[0] is None else bytes(row[0])


def _decided(held: _Held, cells: Sequence[Cell], least: int) -> list[int | None]:
    """What is told of each cell of a table: its number, or the one that was told before."""
    patients = len(held.tainted)
    asked = stacked([_row(cell.members, patients) for cell in cells], patients)
    small = np.any(asked[asked.sum(axis=1) < least], axis=0)
    if small.any():
        held.added.append(("", Verdict("small"), small))
        held.tainted = held.tainted | small
    verdicts = judged(held.told, held.tainted, asked, least)
    for cell, row, verdict in zip(cells, asked, verdicts, strict=True):
        if verdict.patients is not None:
            held.added.append((cell.predicate, verdict, row))
            held.numbers[cell.predicate] = verdict.patients
    held.told = np.vstack([held.told, asked[[verdict.state == "told" for verdict in verdicts]]])
    return [held.numbers.get(cell.predicate) for cell in cells]


def _remember(
    connection: sqlite3.Connection, digest: str, added: Sequence[tuple[str, Verdict, NDArray[np.bool_]]]
) -> None:
    connection.executemany(
        "INSERT INTO cells (question, predicate, state, patients, members) VALUES (?, ?, ?, ?, ?)",
        [(digest, name, verdict.state, verdict.patients, _packed(row)) for name, verdict, row in added],
    )
