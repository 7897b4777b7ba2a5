"""What was spent of the privacy of a hospital's patients, over all runs: one SQLite file that the hospital owns.

Rules:
  * Reserve, then train; commit when the result is about to leave. What was reserved counts as spent, whether or not a
    commit follows: after a crash nobody knows what left.
  * Every reservation of a population counts, of all runs and all folds together, for a patient may be in another fold
    in another plan. What would pass the lifetime's epsilon, or the run's own, is refused.
  * Rows are only added. Each holds the SHA-256 of the one before and of itself, over canonical JSON (RFC 8785). All are
    checked at each use; a ledger of which one is damaged refuses everything, and says which.
  * The order is that of the rows, never that of a clock: a clock that was set back gives the last row's time again.
  * A reservation is one transaction, flushed to the disk before it counts (WAL, synchronous=FULL): two agents with one
    ledger cannot pass the limit together.

What a chain cannot show is that its last rows are gone, or that all of it was written anew: see `Ledger.check`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rfc8785 import CanonicalizationError

from locum.common.canonical import digest
from locum.common.durable import flush, transaction
from locum.common.errors import LocumError
from locum.common.plan import Fold
from locum.site_client.privacy.accountant import Mechanism, epsilon

#: A reservation may have to wait until another agent has composed its own.
_BUSY_SECONDS = 60.0
_VERSION = 1
_FIRST = "0" * 64
_SCHEMA = """
CREATE TABLE ledger (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('opened', 'reserve', 'commit', 'unprotected')),
    population TEXT, run TEXT, plan TEXT, round INTEGER, purpose TEXT,
    noise REAL, rate REAL, steps INTEGER, of INTEGER UNIQUE REFERENCES ledger (id),
    previous TEXT NOT NULL, hash TEXT NOT NULL
) STRICT;
CREATE TRIGGER no_replacement BEFORE INSERT ON ledger WHEN NEW.id <= (SELECT max(id) FROM ledger)
    BEGIN SELECT RAISE(ABORT, 'rows are only added'); END;
CREATE TRIGGER no_change BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'rows are only added'); END;
CREATE TRIGGER no_removal BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'rows are only added'); END;
"""

Kind = Literal["opened", "reserve", "commit", "unprotected"]


class LedgerError(LocumError):
    """The ledger cannot be used: plans with differential privacy must be refused."""


class SpentError(LocumError):
    """What was asked for would pass a limit."""


class Row(NamedTuple):
    """A row as it stands in the file.

    Attributes:
        id: 1, 2, 3, …
        at: seconds since 1970 by the site's clock, never less than in the row before.
        kind: `opened` is the first; `unprotected` notes a run without differential privacy, once.
        population: whose patients. This and the next seven are None where they do not apply.
        run: the run's name.
        plan: the plan's digest.
        round: of the run.
        purpose: the fold that is used.
        noise: σ of the mechanism that is reserved.
        rate: q, the rate at which patients are drawn.
        steps: how often.
        of: of a commit, the id of the reservation.
        previous: the hash of the row before.
        hash: of this row: SHA-256 of the canonical JSON of all other fields.
    """

    id: int
    at: float
    kind: str
    population: str | None
    run: str | None
    plan: str | None
    round: int | None
    purpose: str | None
    noise: float | None
    rate: float | None
    steps: int | None
    of: int | None
    previous: str
    hash: str

    @property
    def mechanism(self) -> Mechanism:
        """What a reservation reserves."""
        if self.noise is None or self.rate is None or self.steps is None:
            raise ValueError(f"row {self.id} reserves nothing")
        return Mechanism(self.noise, self.rate, self.steps)


@dataclass(frozen=True)
class Use:
    """What the patients of a population are used for."""

    population: str
    run: str
    plan: str
    round: int
    purpose: Fold


@dataclass(frozen=True)
class Limit:
    """An epsilon that must not be passed, at a delta."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Reservation:
    """What was reserved.

    Attributes:
        id: the row's number.
        of_run: the epsilon of the run's use of this fold, this reservation included, at the run's delta.
        of_lifetime: the epsilon of all that the population has spent, at the ledger's delta.
    """

    id: int
    of_run: float
    of_lifetime: float


class State(NamedTuple):
    """How far a ledger has come: the number of its rows and the hash of the last."""

    rows: int
    head: str


class Ledger:
    """The ledger's file. One object may be shared by threads; each process opens its own.

    Every method raises LedgerError if the file is missing, damaged, or busy for a minute.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, ...] = ()
        self._known: tuple[Row, ...] = ()

    def begin(self) -> bool:
        """Makes an empty ledger, mode 0600, unless there is one; returns whether it is new."""
        if self.path.exists():
            return False
        try:
            return _create(self.path, self._clock())
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"the ledger {self.path} cannot be made: {error}", "mend the folder") from error

    def close(self) -> None:
        """Closes the file; a later call opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def rows(self) -> tuple[Row, ...]:
        """All rows, checked."""
        with self._use() as connection:
            return self._checked(connection)

    def state(self) -> State:
        """How far the ledger has come."""
        last = self.rows()[-1]
        return State(last.id, last.hash)

    def check(self, state: State) -> None:
        """Raises LedgerError unless the ledger goes on from a state that it was in."""
        rows = self.rows()
        if len(rows) < state.rows:
            raise self._damage(len(rows) + 1, f"is missing, and so are all up to row {state.rows}")
        if state.rows and rows[state.rows - 1].hash != state.head:
            raise self._damage(state.rows, "is another one than it was")

    def reserve(self, use: Use, mechanism: Mechanism, *, run: Limit, lifetime: Limit) -> Reservation:
        """Writes down what is about to be used; raises SpentError, and writes nothing, if it would pass a limit."""
        _composed(use, mechanism, self.rows(), run=run, lifetime=lifetime)  # so that the lock is held for a moment only
        with self._change() as connection:
            rows = self._checked(connection)
            of_run, of_lifetime = _composed(use, mechanism, rows, run=run, lifetime=lifetime)
            _check(of_lifetime, lifetime, f"all that the population '{use.population}' has spent")
            _check(of_run, run, f"the {use.purpose} fold in this run")
            added = self._append(connection, rows, kind="reserve", **vars(use), **vars(mechanism))
        return Reservation(added.id, of_run, of_lifetime)

    def commit(self, reservation: int) -> None:
        """Notes that what was reserved is about to leave; a second time changes nothing."""
        with self._change() as connection:
            rows = self._checked(connection)
            if any(row.of == reservation for row in rows):
                return
            of = next(row for row in rows if (row.id, row.kind) == (reservation, "reserve"))
            use = {name: getattr(of, name) for name in ("population", "run", "plan", "round", "purpose")}
            self._append(connection, rows, kind="commit", of=reservation, **use)

    def note_unprotected(self, use: Use) -> None:
        """Notes that a run uses the population without differential privacy, if that is not noted."""
        if _is_noted(use, self.rows()):
            return
        with self._change() as connection:
            rows = self._checked(connection)
            if not _is_noted(use, rows):
                self._append(connection, rows, kind="unprotected", **vars(use))

    # --- the file

    def _append(self, connection: sqlite3.Connection, rows: Sequence[Row], *, kind: Kind, **fields: Any) -> Row:
        last = rows[-1]
        row = _row(last.id + 1, at=max(last.at, self._clock()), kind=kind, previous=last.hash, **fields)
        connection.execute(_INSERT, row)
        return row

    def _checked(self, connection: sqlite3.Connection) -> tuple[Row, ...]:
        """All rows; those that were checked before must be there, and only what follows is hashed."""
        found = tuple(Row(*row) for row in connection.execute(_SELECT))
        known = self._known
        if found[: len(known)] != known:
            self._check_chain((), found)  # which names the row, unless all was made to fit
            first = next((old.id for old, new in zip(known, found, strict=False) if old != new), len(found) + 1)
            raise self._damage(first, "is another one than it was" if first <= len(found) else "is missing")
        self._check_chain(known, found[len(known) :])
        (made,) = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'ledger'").fetchone() or (1,)
        if made != len(found):
            raise self._damage(len(found) + 1, "is missing")
        self._known = found
        return found

    def _check_chain(self, before: Sequence[Row], rows: Iterable[Row]) -> None:
        number, previous = (before[-1].id, before[-1].hash) if before else (0, _FIRST)
        for row in rows:
            number += 1
            if row.id != number:
                raise self._damage(number, "is missing")
            if not _has_its_hash(row):
                raise self._damage(number, "was changed: it does not have its hash")
            if row.previous != previous:
                raise self._damage(number, f"does not follow row {number - 1}: one of the two was changed")
            previous = row.hash

    def _damage(self, row: int, what: str) -> LedgerError:
        remedy = "restore the ledger from a backup that has every run since, or ask who else writes to it"
        return LedgerError(f"row {row} of the ledger {self.path} {what}", remedy)

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._open()
            except (sqlite3.Error, OSError) as error:
                self.close()
                reason = f"the ledger {self.path} cannot be used: {error}"
                remedy = "restore it from a backup that has every run since, or free what holds it"
                raise LedgerError(reason, remedy) from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction. What it adds is known as checked only once it is on the disk."""
        with self._use() as connection, transaction(connection):
            yield connection

    def _open(self) -> sqlite3.Connection:
        status = self.path.stat()
        here = (os.getpid(), status.st_dev, status.st_ino)
        if self._connection is None or self._opened != here:
            self.close()
            self._connection, self._opened = _connect(self.path), here
            _check_whole(self._connection)
        return self._connection


# --- rows

_INSERT = f"INSERT INTO ledger VALUES ({', '.join('?' * len(Row._fields))})"  # noqa: S608 - question marks
_SELECT = f"SELECT {', '.join(Row._fields)} FROM ledger ORDER BY id"  # noqa: S608 - our own names


def _row(number: int, *, at: float, kind: Kind, previous: str, **fields: Any) -> Row:
    """A row with its hash; fields that are not given are None."""
    empty = dict.fromkeys(Row._fields)
    row = Row(**{**empty, **fields, "id": number, "at": at, "kind": kind, "previous": previous, "hash": ""})
    return row._replace(hash=_hash(row))


def _hash(row: Row) -> str:
    return digest({name: value for name, value in row._asdict().items() if name != "hash"})


def _has_its_hash(row: Row) -> bool:
    try:
        return _hash(row) == row.hash
    except CanonicalizationError:  # of a number that no row has
        return False


def _is_noted(use: Use, rows: Sequence[Row]) -> bool:
    wanted = ("unprotected", use.population, use.run, use.plan)
    return any((row.kind, row.population, row.run, row.plan) == wanted for row in rows)


def reserved(rows: Iterable[Row], population: str) -> tuple[Row, ...]:
    """The reservations of a population, committed or not."""
    return tuple(row for row in rows if row.kind == "reserve" and row.population == population)


def composed(rows: Iterable[Row], delta: float) -> float:
    """The epsilon of reservations together."""
    return epsilon([row.mechanism for row in rows], delta)


def _composed(
    use: Use, mechanism: Mechanism, rows: Sequence[Row], *, run: Limit, lifetime: Limit
) -> tuple[float, float]:
    """The epsilon of the run's fold, and of everything, once the mechanism was used too."""
    everything = reserved(rows, use.population)
    wanted = (use.run, use.plan, use.purpose)
    own = [row.mechanism for row in everything if (row.run, row.plan, row.purpose) == wanted]
    every = [row.mechanism for row in everything]
    return epsilon([*own, mechanism], run.delta), epsilon([*every, mechanism], lifetime.delta)


def _check(found: float, limit: Limit, what: str) -> None:
    if found > limit.epsilon:
        reason = (
            f"{what} would come to epsilon {found:.3g} at delta {limit.delta:.2g}, and the limit is {limit.epsilon:g}"
        )
        raise SpentError(reason, "see `locum site ledger --explain`")


# --- SQLite


def _create(path: Path, now: float) -> bool:
    """Makes a ledger beside its place, and puts it there whole; returns whether nobody else was faster."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    os.close(os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with closing(_connect(beside)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            connection.execute(_INSERT, _row(1, at=now, kind="opened", previous=_FIRST))
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        flush(beside)
        os.link(beside, path)
    except FileExistsError:
        return False
    finally:
        beside.unlink(missing_ok=True)
    flush(path.parent)
    return True


def _connect(path: Path) -> sqlite3.Connection:
    # rw, not rwc: a ledger that is missing is an error, not an empty one.
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _check_whole(connection: sqlite3.Connection) -> None:
    (form,) = connection.execute("PRAGMA user_version").fetchone()
    if form != _VERSION:
        raise sqlite3.DatabaseError(f"its form is {form}, and this version of Locum knows {_VERSION}")
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(f"the file is damaged ({found})")
