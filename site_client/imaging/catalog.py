"""The site's catalog: what was found, what became of it, and the cases that a model can learn from (SQLite).

Rules:
  * Nothing of a patient is in it but a keyed pseudonym; file names and series UIDs are, since it never leaves the site.
  * A case is in the catalog only after its files are on the disk: one transaction for each batch.
  * It can only be written with the key and for the site it was made with.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from locum.common.errors import DataError
from locum.site_client.imaging.keys import fingerprint
from locum.site_client.imaging.split import Fold, Shares, check_shares, fold_of

SCHEMA_VERSION = 1
FILE_NAME = "catalog.sqlite"

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE units (
    key TEXT PRIMARY KEY, source INTEGER NOT NULL, patient TEXT NOT NULL, accession TEXT NOT NULL,
    study TEXT NOT NULL, series TEXT NOT NULL, file TEXT NOT NULL,
    gate TEXT, gate_detail TEXT NOT NULL,      -- what the headers alone decided
    reason TEXT, detail TEXT NOT NULL,         -- what became of it in the end; no reason: it is a case
    elsewhere INTEGER NOT NULL,                -- 1: the site's table gives it to another site
    inputs TEXT NOT NULL                       -- digest of all that the outcome depends on
) WITHOUT ROWID;
CREATE TABLE items (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
    unit TEXT, reason TEXT, detail TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX items_by_unit ON items (unit);
CREATE TABLE cases (
    id TEXT PRIMARY KEY, unit TEXT NOT NULL UNIQUE, patient TEXT NOT NULL, u REAL NOT NULL, fold TEXT,
    label TEXT, image TEXT NOT NULL, mask TEXT, modality TEXT NOT NULL, manufacturer TEXT NOT NULL,
    model TEXT NOT NULL, shape TEXT NOT NULL, spacing TEXT NOT NULL, dtype TEXT NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Case:
    """One image that a model can learn from.

    Attributes:
        id: its name in the store, 16 hexadecimal characters.
        patient: the pseudonym of the patient.
        image: a .nii file.
        mask: a .nii file on the same grid, or None.
        label: the plan's class, or None.
        manufacturer: of the scanner; empty if it is not stated.
    """

    id: str
    patient: str
    image: Path
    mask: Path | None
    label: str | None
    fold: Fold
    manufacturer: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known of the image of a case.

    Attributes:
        shape: voxels along (column, row[, slice[, channel]]).
        spacing: millimetres along (column, row[, slice]).
    """

    id: str
    modality: str
    manufacturer: str
    model: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    dtype: str

    @property
    def scanner(self) -> str:
        """Modality, manufacturer and model, as far as they are stated."""
        return f"{self.modality} {self.manufacturer} {self.model}".strip()


@dataclass(frozen=True)
class Counts:
    """What became of everything found: found = stored + the sum of quarantined.

    Attributes:
        found: files, or rows of an .npz.
        stored: those that went into cases.
        cases: series, files or rows that a model can learn from.
        quarantined: reason to number of files or rows.
        labels_without_image: lines of the label file, and of the site's table, that name no image.
    """

    found: int
    stored: int
    cases: int
    quarantined: Mapping[str, int] = field(default_factory=dict)
    labels_without_image: int = 0

    def check(self) -> Self:
        """Return itself, or raise DataError if the numbers do not add up."""
        if self.found != self.stored + sum(self.quarantined.values()) or self.cases > self.stored:
            raise DataError(
                f"the catalog does not add up: {self.as_dict()}", "delete the store, ingest again, and report this"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class UnitRow:
    """One series, NIfTI image or row as the catalog keeps it; see the schema for its columns."""

    key: str
    source: int
    patient: str
    accession: str
    study: str
    series: str
    file: str
    gate: str | None
    gate_detail: str
    reason: str | None
    detail: str
    elsewhere: bool
    inputs: str


@dataclass(frozen=True)
class ItemRow:
    """One file or row of an .npz as the catalog keeps it."""

    name: str
    size: int
    mtime_ns: int
    unit: str | None
    reason: str | None
    detail: str


@dataclass(frozen=True)
class CaseRow:
    """One case as the catalog keeps it; shape and spacing are JSON."""

    id: str
    unit: str
    patient: str
    u: float
    fold: str | None
    label: str | None
    image: str
    mask: str | None
    modality: str
    manufacturer: str
    model: str
    shape: str
    spacing: str
    dtype: str


class Catalog:
    """The catalog of one store. Open it with :meth:`open`, or to write with :meth:`writing`."""

    def __init__(self, store: Path, connection: sqlite3.Connection) -> None:
        self._store = store
        self._db = connection

    @classmethod
    def open(cls, store: Path) -> Self:
        """Open an existing catalog to read.

        Raises:
            DataError: there is none, or it is damaged or of another version.
        """
        path = store / FILE_NAME
        if not path.is_file():
            raise DataError(f"{store} holds no catalog", "run: locum site ingest SITE.yaml --store DIR")
        catalog = cls(store.absolute(), sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True))
        catalog._check_version()
        return catalog

    @classmethod
    @contextmanager
    def writing(cls, store: Path, *, site: str, key: bytes) -> Iterator[Self]:
        """Open the catalog of a store to write, and make it if there is none.

        Raises:
            DataError: it belongs to another site or was made with another key.
        """
        with closing(sqlite3.connect(store / FILE_NAME)) as connection:
            catalog = cls(store.absolute(), connection)
            catalog._create()
            catalog._check_version()
            catalog._bind("site", site, f"use a store of its own for the site {site}")
            catalog._bind("key", fingerprint(key), "give the key file with which the store was made")
            yield catalog

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def cases(self, split: Shares) -> tuple[Case, ...]:
        """The cases, sorted by id, each with its fold.

        Args:
            split: shares of train, validation and test for patients whose fold no table states.

        Raises:
            DataError: the shares do not add up to 1, or the last ingest did not finish.
        """
        check_shares(split)
        self._check_complete()
        table_folds = self._meta("folds", [])
        rows = self._db.execute(
            "SELECT id, patient, image, mask, label, u, max(fold) OVER (PARTITION BY patient), manufacturer FROM cases"
            " ORDER BY id"
        )
        return tuple(
            Case(
                id=name,
                patient=patient,
                image=self._store / image,
                mask=self._store / mask if mask else None,
                label=label,
                fold=fold_of(u, stated, split, table_folds=table_folds),
                manufacturer=manufacturer,
            )
            for name, patient, image, mask, label, u, stated, manufacturer in rows
        )

    def facts(self) -> tuple[Facts, ...]:
        """What is known of each case's image, sorted by id."""
        rows = self._db.execute(
            "SELECT id, modality, manufacturer, model, shape, spacing, dtype FROM cases ORDER BY id"
        )
        return tuple(_facts(*row) for row in rows)

    def counts(self) -> Counts:
        """What became of everything found at the last complete ingest.

        Raises:
            DataError: the numbers do not add up, or the last ingest did not finish.
        """
        self._check_complete()
        outcomes = dict(
            self._db.execute(
                "SELECT coalesce(items.reason, units.reason, ''), count(*) FROM items"
                " LEFT JOIN units ON units.key = items.unit WHERE NOT coalesce(units.elsewhere, 0)"
                " GROUP BY 1 ORDER BY 1"
            ).fetchall()
        )
        return Counts(
            found=self._meta("found", 0),
            stored=outcomes.pop("", 0),
            cases=self._db.execute("SELECT count(*) FROM cases").fetchone()[0],
            quarantined=outcomes,
            labels_without_image=len(self.unmatched_lines()),
        ).check()

    def unmatched_lines(self) -> tuple[str, ...]:
        """'file name:line' of each line of the label file or the site's table that names no image."""
        return tuple(self._meta("unmatched", []))

    def quarantine(self) -> tuple[tuple[str, str, str], ...]:
        """(name, reason, detail) of each file or row in quarantine, sorted by name."""
        rows = self._db.execute(
            "SELECT items.name, coalesce(items.reason, units.reason) AS why,"
            " CASE WHEN items.reason IS NULL THEN units.detail ELSE items.detail END"
            " FROM items LEFT JOIN units ON units.key = items.unit"
            " WHERE why IS NOT NULL AND NOT coalesce(units.elsewhere, 0) ORDER BY items.name"
        )
        return tuple(rows.fetchall())

    def items(self) -> dict[str, ItemRow]:
        """All files and rows known, by name."""
        rows = self._db.execute("SELECT name, size, mtime_ns, unit, reason, detail FROM items")
        return {row[0]: ItemRow(*row) for row in rows}

    def units(self) -> dict[str, UnitRow]:
        """All series, images and rows known, by key."""
        columns = ", ".join(UnitRow.__dataclass_fields__)
        rows = self._db.execute(f"SELECT {columns} FROM units")  # noqa: S608 (column names of our own)
        return {row[0]: UnitRow(*row) for row in rows}

    def files(self) -> frozenset[str]:
        """The files of all cases, relative to the store."""
        rows = self._db.execute("SELECT image FROM cases UNION ALL SELECT mask FROM cases WHERE mask IS NOT NULL")
        return frozenset(row[0] for row in rows)

    def files_of_units(self) -> dict[str, tuple[str, ...]]:
        """The files of each unit that is a case."""
        rows = self._db.execute("SELECT unit, image, mask FROM cases")
        return {unit: (image, mask) if mask else (image,) for unit, image, mask in rows}

    def record(self, units: Iterable[UnitRow], items: Iterable[ItemRow], cases: Iterable[CaseRow]) -> None:
        """Write outcomes, in place of what was known of the same units and items, in one transaction."""
        units = tuple(units)
        with self._db:
            self._db.executemany("DELETE FROM cases WHERE unit = ?", [(unit.key,) for unit in units])
            self._replace("units", UnitRow, units)
            self._replace("items", ItemRow, items)
            self._replace("cases", CaseRow, cases)

    def begin(self, *, gone: Iterable[str], changed_units: Iterable[str]) -> None:
        """Forget items that are no longer there, and note which units are not what they were.

        Until :meth:`finish` the catalog counts as incomplete, whatever happens to this process.
        """
        with self._db:
            self._write_meta("complete", False)
            self._db.executemany("DELETE FROM items WHERE name = ?", [(name,) for name in gone])
            self._db.executemany("UPDATE units SET inputs = '' WHERE key = ?", [(key,) for key in changed_units])

    def finish(self, *, gone_units: Iterable[str], found: int, unmatched: list[str], folds: list[str]) -> None:
        """Forget units that are no longer there and write the totals, in one transaction."""
        with self._db:
            self._db.executemany("DELETE FROM units WHERE key = ?", [(key,) for key in gone_units])
            self._db.execute("DELETE FROM cases WHERE unit NOT IN (SELECT key FROM units)")
            elsewhere = self._db.execute(
                "SELECT count(*) FROM items JOIN units ON units.key = items.unit WHERE units.elsewhere"
            ).fetchone()[0]
            self._write_meta("found", found - elsewhere)
            self._write_meta("unmatched", unmatched)
            self._write_meta("folds", folds)
            self._write_meta("complete", True)

    def _replace(self, table: str, kind: type, rows: Iterable[Any]) -> None:
        columns = tuple(kind.__dataclass_fields__)  # type: ignore[attr-defined]
        sql = f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608
        self._db.executemany(sql, [tuple(getattr(row, column) for column in columns) for row in rows])

    def _meta(self, name: str, default: Any) -> Any:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def _write_meta(self, name: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def _check_complete(self) -> None:
        if not self._meta("complete", False):
            raise DataError(f"the last ingest into {self._store} did not finish", "run it again: it continues")

    def _create(self) -> None:
        if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def _check_version(self) -> None:
        try:
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"the catalog in {self._store} cannot be read: {error}", "ingest again, into a new store if need be"
            ) from None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"the catalog in {self._store} is of version {version}, not {SCHEMA_VERSION}",
                "ingest into a new store with this version",
            )

    def _bind(self, name: str, value: str, remedy: str) -> None:
        known = self._meta(name, None)
        if known is None:
            with self._db:
                self._write_meta(name, value)
        elif known != value:
            raise DataError(f"the store {self._store} was made with another {name}", remedy)


def _facts(name: str, modality: str, manufacturer: str, model: str, *grid: str) -> Facts:
    shape, spacing, dtype = grid
    return Facts(name, modality, manufacturer, model, tuple(json.loads(shape)), tuple(json.loads(spacing)), dtype)
