"""What was retrieved: cleaned files under `incoming/`, and one database that counts them.

Rules:
  * All names are keyed; the database holds no UID, number or date of a PACS.
  * A file is written under another name, flushed and renamed, a batch at a time; then the batch is committed. Killed
    between, the next retrieval finds files that no row names and removes them.
  * An instance has one row, with a file or with a reason why there is none: nothing is fetched twice, nothing lost.
  * What was cleaned in another way, or named with other keys, goes: it is fetched again.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from locum.common.durable import flush
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.retrieve.arrival import Arrival
from locum.site_client.imaging.store import Draft

FOLDER = "incoming"
FILE_NAME = "retrieval.sqlite"
_OUTSIDE = "outside"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS sources (source INTEGER PRIMARY KEY, made TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS studies (
    source INTEGER NOT NULL, study TEXT NOT NULL, said INTEGER, lacking INTEGER NOT NULL, surplus INTEGER NOT NULL,
    trouble TEXT NOT NULL,
    PRIMARY KEY (source, study)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS instances (
    source INTEGER NOT NULL, study TEXT NOT NULL, sop TEXT NOT NULL, series TEXT NOT NULL, patient TEXT NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, reason TEXT, detail TEXT NOT NULL, known TEXT NOT NULL,
    PRIMARY KEY (source, study, sop)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS of_series ON instances (source, series);
CREATE INDEX IF NOT EXISTS of_patient ON instances (patient);
"""
#: So many, or so many bytes, are flushed and committed at a time.
_BATCH, _BATCH_BYTES = 64, 64 << 20
#: These are asked for again at every retrieval: what was damaged on the way may be whole the next time.
_AGAIN = (Reason.UNREADABLE, Reason.TOO_LARGE, Reason.INCOMPLETE_HEADER)
#: A good image of the same series as a row of `instances`.
_NEIGHBOUR = """
SELECT near.patient, near.known FROM instances AS near
WHERE near.source = instances.source AND near.series = instances.series AND near.reason IS NULL LIMIT 1
"""


@dataclass(frozen=True)
class Tally:
    """What a study should have and has.

    Attributes:
        said: instances, as the PACS says.
        lacking: instances that it said there are, or listed, and did not give.
        surplus: those that it gave beyond what it said.
        trouble: why something is lacking, in words, if that is known.
    """

    said: int | None
    lacking: int
    surplus: int
    trouble: str = ""


class Spool:
    """What one source has given. Open it with :meth:`opened`, as the one writer of the store."""

    def __init__(self, store: Path, source: int, connection: sqlite3.Connection) -> None:
        self.folder = store / FOLDER / str(source)
        self._source = source
        self._db = connection
        self._draft = Draft(self.folder)
        self._batch: dict[tuple[str, str], tuple[str, Arrival]] = {}
        self._bytes = 0

    @classmethod
    @contextmanager
    def opened(cls, store: Path, source: int, *, made: str) -> Iterator[Self]:
        """Open what a source has given, and bring it in order.

        Args:
            store: the folder of the store.
            source: the number of the source in the site file.
            made: names the way in which files are cleaned and named; what was made in another way is removed.
        """
        (store / FOLDER / str(source)).mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(store / FOLDER / FILE_NAME)) as connection:
            connection.executescript(_SCHEMA)
            spool = cls(store, source, connection)
            spool._bind(made)
            spool._sweep()
            yield spool

    # --- in order

    def _bind(self, made: str) -> None:
        row = self._db.execute("SELECT made FROM sources WHERE source = ?", (self._source,)).fetchone()
        if row == (made,):
            return
        with self._db:
            for table in ("instances", "studies"):
                self._db.execute(f"DELETE FROM {table} WHERE source = ?", (self._source,))  # noqa: S608
            self._db.execute("INSERT OR REPLACE INTO sources VALUES (?, ?)", (self._source, made))

    def refresh(self, withdrawn: Collection[str], *, asked: str) -> None:
        """Forget what is to be asked for again.

        That is what could not be read, what another query did not name, and what was not taken of patients who are
        no longer on the list of withdrawals.
        """
        marks = ", ".join("?" * len(_AGAIN))
        patients = self._db.execute(
            "SELECT DISTINCT patient FROM instances WHERE source = ? AND reason = ?",
            (self._source, Reason.CONSENT_WITHDRAWN),
        ).fetchall()
        back = [(self._source, Reason.CONSENT_WITHDRAWN, name) for (name,) in patients if name not in withdrawn]
        delete = "DELETE FROM instances WHERE source = ? AND reason"
        with self._db:
            self._db.execute(f"{delete} IN ({marks})", (self._source, *_AGAIN))
            self._db.execute(f"{delete} = ? AND detail <> ?", (self._source, _OUTSIDE, asked))
            self._db.executemany(f"{delete} = ? AND patient = ?", back)

    def _sweep(self) -> None:
        """Remove the files that no row names, and the rows whose file is gone."""
        for entry in os.scandir(self.folder):
            self._sweep_study(entry.name)
        for (study,) in self._db.execute("SELECT study FROM studies WHERE source = ?", (self._source,)).fetchall():
            if not (self.folder / study).is_dir():
                self._sweep_study(study)

    def _sweep_study(self, study: str) -> None:
        folder = self.folder / study
        there = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208 (names are all that is asked)
        rows = self._db.execute(
            "SELECT sop FROM instances WHERE source = ? AND study = ? AND reason IS NULL", (self._source, study)
        )
        named = {f"{sop}.dcm" for (sop,) in rows}
        for name in there - named:
            (folder / name).unlink()
        with self._db:
            self._db.executemany(
                "DELETE FROM instances WHERE source = ? AND study = ? AND sop = ?",
                [(self._source, study, name.removesuffix(".dcm")) for name in named - there],
            )
        if not named & there:
            shutil.rmtree(folder, ignore_errors=True)

    # --- what there is

    def has(self, study: str) -> frozenset[str]:
        """The instances of a study that have a row, by their keyed UIDs."""
        rows = self._db.execute("SELECT sop FROM instances WHERE source = ? AND study = ?", (self._source, study))
        return frozenset(sop for (sop,) in rows)

    def count(self, series: str) -> int:
        """How many instances of a series have a row."""
        query = "SELECT count(*) FROM instances WHERE source = ? AND series = ?"
        return int(self._db.execute(query, (self._source, series)).fetchone()[0])

    def is_empty(self) -> bool:
        """Whether the source has given nothing yet."""
        query = "SELECT NOT EXISTS (SELECT 1 FROM instances WHERE source = ?)"
        return bool(self._db.execute(query, (self._source,)).fetchone()[0])

    # --- what comes

    def put(self, series: str, study: str, arrival: Arrival) -> bool:
        """Take one arrival in, unless it is there; it is kept for good with its batch."""
        if (study, arrival.sop) in self._batch or self._is_here(study, arrival.sop):
            return False
        if arrival.content is not None:
            self._draft.write(f"{study}/{arrival.sop}.dcm", arrival.content)
            self._bytes += len(arrival.content)
        self._batch[study, arrival.sop] = (series, arrival)
        if len(self._batch) >= _BATCH or self._bytes >= _BATCH_BYTES:
            self.commit()
        return True

    def _is_here(self, study: str, sop: str) -> bool:
        query = "SELECT 1 FROM instances WHERE source = ? AND study = ? AND sop = ?"
        return self._db.execute(query, (self._source, study, sop)).fetchone() is not None

    def commit(self) -> None:
        """Keep for good what came."""
        if not self._batch:
            return
        self._draft.publish()
        flush(self.folder)
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO instances VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [self._row(series, study, arrival) for (study, _), (series, arrival) in self._batch.items()],
            )
        self._batch.clear()
        self._bytes = 0

    def _row(self, series: str, study: str, arrival: Arrival) -> tuple[object, ...]:
        size, mtime_ns = 0, 0
        if arrival.content is not None:
            status = (self.folder / study / f"{arrival.sop}.dcm").stat()
            size, mtime_ns = status.st_size, status.st_mtime_ns
        reason = _OUTSIDE if arrival.outside else arrival.reason
        known = arrival.known
        return (
            *(self._source, study, arrival.sop, series, known.patient, size, mtime_ns),
            *(reason, arrival.detail, known.to_json()),
        )

    def settle(self, study: str, tally: Tally, series: Collection[str] | None) -> None:
        """Record what a study should have and has.

        What could not be read is held to be of its neighbours' patient; what is of another series than `series`, if
        these are known, is removed.
        """
        if series is not None:
            self._remove_others(study, series)
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO studies VALUES (?, ?, ?, ?, ?, ?)",
                (self._source, study, tally.said, tally.lacking, tally.surplus, tally.trouble),
            )
            marks = ", ".join("?" * len(_AGAIN))
            self._db.execute(
                f"UPDATE instances SET (patient, known) = ({_NEIGHBOUR}) WHERE source = ? AND study = ?"  # noqa: S608
                f" AND reason IN ({marks}) AND EXISTS ({_NEIGHBOUR})",
                (self._source, study, *_AGAIN),
            )

    def _remove_others(self, study: str, series: Collection[str]) -> None:
        rows = self._db.execute(
            "SELECT sop, series FROM instances WHERE source = ? AND study = ?", (self._source, study)
        ).fetchall()
        gone = [sop for sop, of in rows if of not in series]
        with self._db:
            self._db.executemany(
                "DELETE FROM instances WHERE source = ? AND study = ? AND sop = ?",
                [(self._source, study, sop) for sop in gone],
            )
        for sop in gone:
            (self.folder / study / f"{sop}.dcm").unlink(missing_ok=True)

    def keep_only(self, studies: Iterable[str]) -> None:
        """Remove the studies that the query no longer names, with their files."""
        gone = {row[0] for row in self._db.execute("SELECT study FROM studies WHERE source = ?", (self._source,))}
        gone |= set(os.listdir(self.folder))  # noqa: PTH208
        gone -= set(studies)
        for study in sorted(gone):
            with self._db:
                for table in ("instances", "studies"):
                    self._db.execute(f"DELETE FROM {table} WHERE source = ? AND study = ?", (self._source, study))  # noqa: S608
            shutil.rmtree(self.folder / study, ignore_errors=True)


def spooled(store: Path, source: int) -> Iterator[Item]:
    """What a source has given, by name; nothing if it was never asked.

    An item that cannot be used says so in `refused`; of some there is no file.
    """
    path = store / FOLDER / FILE_NAME
    if not path.exists():
        return
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT study, sop, size, mtime_ns, reason, detail, known, coalesce(lacking, 1), coalesce(trouble, '')"
            " FROM instances LEFT JOIN studies USING (source, study)"
            " WHERE source = ? AND (reason IS NULL OR reason <> ?) ORDER BY study, sop",
            (source, _OUTSIDE),
        )
        for study, sop, size, mtime_ns, reason, detail, known, lacking, trouble in rows:
            name = f"{FOLDER}/{source}/{study}/{sop}.dcm"
            refused = _refused(reason, detail, lacking, trouble)
            yield Item(name, store / name, source, size, mtime_ns, known=Known.from_json(known), refused=refused)


def _refused(reason: str | None, detail: str, lacking: int, trouble: str) -> tuple[Reason, str] | None:
    if reason is not None:
        return Reason(reason), detail
    if not lacking:
        return None
    return Reason.INCOMPLETE_STUDY, f"images not given: {lacking}{f' ({trouble})' if trouble else ''}"


def forget(store: Path, patients: Collection[str]) -> None:
    """Delete what was retrieved of patients (pseudonyms); that they withdrew stays: nothing is fetched again."""
    path = store / FOLDER / FILE_NAME
    if not patients or not path.exists():
        return
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA secure_delete = ON")  # what was known of them is overwritten
        connection.executescript(_SCHEMA)
        for patient in sorted(patients):
            _forget(store, connection, patient)


def _forget(store: Path, connection: sqlite3.Connection, patient: str) -> None:
    rows = connection.execute("SELECT source, study, sop FROM instances WHERE patient = ?", (patient,)).fetchall()
    for source, study, sop in rows:
        (store / FOLDER / str(source) / study / f"{sop}.dcm").unlink(missing_ok=True)
    with connection:
        connection.execute(
            "UPDATE instances SET reason = ?, detail = '', size = 0, mtime_ns = 0, known = ? WHERE patient = ?",
            (Reason.CONSENT_WITHDRAWN, Known(patient=patient).to_json(), patient),
        )
