"""The site's catalog: what was found, what became of it, and the cases that a model can learn from (SQLite).

Rules:
  * Nothing of a patient is in it but keyed pseudonyms, sex, age to 90 and the month of the study. The paths of the
    files found are in it as they are: it never leaves the site.
  * A case is in the catalog only after its files are on the disk: one transaction for each batch.
  * It is written by :mod:`locum.site_client.imaging.inventory`, with the keys and for the site it was made with.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from locum.common.errors import DataError
from locum.site_client.imaging.split import Fold, Shares, check_shares, fold_of

SCHEMA_VERSION = 2
FILE_NAME = "catalog.sqlite"

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (                           -- files, rows of an .npz, instances of a PACS
    name TEXT PRIMARY KEY, source INTEGER NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, row TEXT,       -- row: JSON [fold, index] in an .npz
    given TEXT,                                -- a reason that was known before it was opened
    unit TEXT, sop TEXT NOT NULL, sop_class TEXT NOT NULL, known TEXT NOT NULL, file TEXT NOT NULL,
    reason TEXT, detail TEXT NOT NULL, spoils INTEGER NOT NULL, multi_frame INTEGER NOT NULL,
    annotation INTEGER NOT NULL,               -- what the header alone decided
    apart TEXT, apart_detail TEXT NOT NULL     -- why it is no part of its unit; NULL: it is, or it is an annotation
) WITHOUT ROWID;
CREATE INDEX items_by_unit ON items (unit, name);
CREATE INDEX items_annotating ON items (name) WHERE annotation;
CREATE TABLE units (                           -- series, radiographs, NIfTI images, rows
    key TEXT PRIMARY KEY, stale INTEGER NOT NULL DEFAULT 1,
    source INTEGER NOT NULL DEFAULT 0, known TEXT NOT NULL DEFAULT '', file TEXT NOT NULL DEFAULT '',
    gate TEXT, gate_detail TEXT NOT NULL DEFAULT '',    -- what the headers alone decided
    reason TEXT, detail TEXT NOT NULL DEFAULT '',       -- what became of it in the end; no reason: it is a case
    elsewhere INTEGER NOT NULL DEFAULT 0,               -- 1: the site's table gives it to another site
    inputs TEXT NOT NULL DEFAULT ''                     -- digest of all that the outcome depends on
) WITHOUT ROWID;
CREATE INDEX units_stale ON units (key) WHERE stale;
CREATE TABLE cases (
    id TEXT PRIMARY KEY, unit TEXT NOT NULL UNIQUE, patient TEXT NOT NULL, place REAL NOT NULL, fold TEXT,
    label TEXT, image TEXT NOT NULL, mask TEXT, modality TEXT NOT NULL, manufacturer TEXT NOT NULL,
    model TEXT NOT NULL, shape TEXT NOT NULL, spacing TEXT NOT NULL, dtype TEXT NOT NULL,
    sop_class TEXT NOT NULL, body_part TEXT NOT NULL, sex TEXT NOT NULL, age INTEGER, month TEXT NOT NULL,
    orientation TEXT NOT NULL, slices INTEGER NOT NULL, profile TEXT NOT NULL, defaced INTEGER NOT NULL,
    parameters TEXT NOT NULL                   -- JSON, by DICOM keyword: milliseconds, degrees, tesla, millimetres
) WITHOUT ROWID;
CREATE TABLE codes (case_id TEXT NOT NULL, code TEXT NOT NULL, PRIMARY KEY (code, case_id)) WITHOUT ROWID;
CREATE TABLE decisions (                       -- what a person at the site decided on a unit in quarantine
    unit TEXT PRIMARY KEY, decision TEXT NOT NULL, reasons TEXT NOT NULL, by TEXT NOT NULL, at TEXT NOT NULL,
    crop TEXT, content TEXT NOT NULL           -- content: digest of the files that the person saw
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
    """What is known of a case and its image.

    Attributes:
        patient: pseudonym.
        shape: voxels along (column, row[, slice[, channel]]).
        spacing: millimetres along (column, row[, slice]).
        sex: F, M, O or empty; `age` in years, 90 for 90 and more, or None; `month` of the study, YYYY-MM, or empty.
        orientation: axial, coronal or sagittal, or empty.
        profile: how its DICOM was cleaned; empty of what is no DICOM.
        defaced: whether the site declares that faces were removed.
        parameters: of the acquisition, by DICOM keyword: milliseconds, degrees, tesla, kilovolts, millimetres.
        codes: standard codes of its labels, SCHEME:CODE.
    """

    id: str
    patient: str
    label: str | None
    masked: bool
    modality: str
    manufacturer: str
    model: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    dtype: str
    sop_class: str
    body_part: str
    sex: str
    age: int | None
    month: str
    orientation: str
    slices: int
    profile: str
    defaced: bool
    parameters: Mapping[str, float]
    codes: tuple[str, ...]

    @property
    def scanner(self) -> str:
        """Modality, manufacturer and model, as far as they are stated."""
        return f"{self.modality} {self.manufacturer} {self.model}".strip()


@dataclass(frozen=True)
class Counts:
    """What became of everything found: found = stored + annotations + the sum of quarantined.

    Attributes:
        found: files, or rows of an .npz.
        stored: those that went into cases.
        annotations: DICOM objects that say something of images (SEG, SR, RTSTRUCT).
        cases: series, files or rows that a model can learn from.
        quarantined: reason to number of files or rows.
        labels_without_image: lines of the label file, and of the site's table, that name no image.
    """

    found: int
    stored: int
    cases: int
    annotations: int = 0
    quarantined: Mapping[str, int] = field(default_factory=dict)
    labels_without_image: int = 0

    def check(self) -> Self:
        """Return itself, or raise DataError if the numbers do not add up."""
        known = self.stored + self.annotations + sum(self.quarantined.values())
        if self.found != known or self.cases > self.stored:
            raise DataError(
                f"the catalog does not add up: {self.as_dict()}", "delete the store, ingest again, and report this"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What became of a unit; see the schema for the fields."""

    key: str
    reason: str | None
    detail: str
    elsewhere: bool
    inputs: str


@dataclass(frozen=True)
class Decision:
    """What a person at the site decided on a unit in quarantine.

    Attributes:
        unit: its key.
        decision: whether it may be used.
        reasons: from which it is released.
        by: who decided; `at` when, in UTC.
        crop: left, top, width and height in pixels: nothing outside is taken; None for the whole image.
        content: a digest of the files that the person saw: of others the decision does not hold.
    """

    unit: str
    decision: Literal["release", "reject"]
    reasons: tuple[str, ...]
    by: str
    at: str
    content: str
    crop: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class CaseRow:
    """One case as the catalog keeps it; shape, spacing and parameters are JSON."""

    id: str
    unit: str
    patient: str
    place: float
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
    sop_class: str = ""
    body_part: str = ""
    sex: str = ""
    age: int | None = None
    month: str = ""
    orientation: str = ""
    slices: int = 1
    profile: str = ""
    defaced: bool = False
    parameters: str = "{}"


class Catalog:
    """The catalog of one store, to read. Open it with :meth:`open`."""

    def __init__(self, store: Path, connection: sqlite3.Connection) -> None:
        self._store = store
        self.connection = connection

    @classmethod
    def open(cls, store: Path) -> Self:
        """Open an existing catalog.

        Raises:
            DataError: there is none, or it is damaged or of another version.
        """
        path = store / FILE_NAME
        if not path.is_file():
            raise DataError(f"{store} holds no catalog", "run: locum site ingest SITE.yaml --store DIR")
        # A reader waits for a writer's short transactions.
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
        check_version(connection, store)
        return cls(store.absolute(), connection)

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def cases(self, split: Shares) -> tuple[Case, ...]:
        """The cases, sorted by id, each with its fold.

        Args:
            split: shares of train, validation and test for patients whose fold no table states.

        Raises:
            DataError: the shares do not add up to 1, or the last ingest did not finish.
        """
        check_shares(split)
        self._check_complete()
        table_folds = read_meta(self.connection, "folds", [])
        rows = self.connection.execute(
            "SELECT id, patient, image, mask, label, place, max(fold) OVER (PARTITION BY patient), manufacturer"
            " FROM cases ORDER BY id"
        )
        return tuple(
            Case(
                id=name,
                patient=patient,
                image=self._store / image,
                mask=self._store / mask if mask else None,
                label=label,
                fold=fold_of(place, stated, split, table_folds=table_folds),
                manufacturer=manufacturer,
            )
            for name, patient, image, mask, label, place, stated, manufacturer in rows
        )

    def facts(self) -> Iterator[Facts]:
        """What is known of each case and its image, by id."""
        codes = "(SELECT case_id, json_group_array(code) AS known FROM codes GROUP BY case_id)"
        rows = self.connection.execute(
            f"SELECT {', '.join(_FACTS)}, coalesce(known, '[]') FROM cases"  # noqa: S608
            f" LEFT JOIN {codes} ON case_id = id ORDER BY id"
        )
        return (_facts(row) for row in rows)

    def counts(self) -> Counts:
        """What became of everything found at the last complete ingest.

        Raises:
            DataError: the numbers do not add up, or the last ingest did not finish.
        """
        self._check_complete()
        return counts_of(self.connection)

    def unmatched_lines(self) -> tuple[str, ...]:
        """'file name:line' of each line of the label file or the site's table that names no image."""
        return tuple(read_meta(self.connection, "unmatched", []))

    def quarantine(self) -> tuple[tuple[str, str, str], ...]:
        """(name, reason, detail) of each file or row in quarantine, sorted by name."""
        rows = self.connection.execute(
            "SELECT items.name, coalesce(items.apart, units.reason) AS why,"
            " CASE WHEN items.apart IS NULL THEN units.detail ELSE items.apart_detail END"
            " FROM items LEFT JOIN units ON units.key = items.unit"
            " WHERE why IS NOT NULL AND NOT coalesce(units.elsewhere, 0) ORDER BY items.name"
        )
        return tuple(rows.fetchall())

    def _check_complete(self) -> None:
        if not read_meta(self.connection, "complete", False):
            raise DataError(f"the last ingest into {self._store} did not finish", "run it again: it continues")


def counts_of(connection: sqlite3.Connection) -> Counts:
    """What became of everything found; raises DataError if the numbers do not add up."""
    outcomes = dict(
        connection.execute(
            "SELECT CASE WHEN annotation AND apart IS NULL THEN ? ELSE coalesce(apart, units.reason, '') END, count(*)"
            " FROM items LEFT JOIN units ON units.key = items.unit WHERE NOT coalesce(elsewhere, 0)"
            " GROUP BY 1 ORDER BY 1",
            (_ANNOTATION,),
        ).fetchall()
    )
    return Counts(
        found=read_meta(connection, "found", 0),
        stored=outcomes.pop("", 0),
        cases=connection.execute("SELECT count(*) FROM cases").fetchone()[0],
        annotations=outcomes.pop(_ANNOTATION, 0),
        quarantined=outcomes,
        labels_without_image=len(read_meta(connection, "unmatched", [])),
    ).check()


def read_meta(connection: sqlite3.Connection, name: str, default: Any) -> Any:
    """A value of the table `meta`."""
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return default if row is None else json.loads(row[0])


def write_meta(connection: sqlite3.Connection, name: str, value: Any) -> None:
    """Set a value of the table `meta`."""
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))


def create(connection: sqlite3.Connection) -> None:
    """Make the tables of a new catalog."""
    if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
        connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def check_version(connection: sqlite3.Connection, store: Path) -> None:
    """Raise DataError if a catalog is damaged or of another version."""
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise DataError(
            f"the catalog in {store} cannot be read: {error}", "ingest again, into a new store if need be"
        ) from None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"the catalog in {store} is of version {version}, not {SCHEMA_VERSION}",
            "ingest into a new store with this version",
        )


_ANNOTATION = "annotation"
_FACTS = (
    "id",
    "patient",
    "label",
    "mask IS NOT NULL",
    "modality",
    "manufacturer",
    "model",
    "shape",
    "spacing",
    "dtype",
    "sop_class",
    "body_part",
    "sex",
    "age",
    "month",
    "orientation",
    "slices",
    "profile",
    "defaced",
    "parameters",
)

_NAMES = (*(column.split()[0] for column in _FACTS), "codes")


def _facts(row: Sequence[Any]) -> Facts:
    found = dict(zip(_NAMES, row, strict=True))
    shape, spacing, codes = (tuple(json.loads(found.pop(name))) for name in ("shape", "spacing", "codes"))
    masked, defaced = bool(found.pop("mask")), bool(found.pop("defaced"))
    parameters = json.loads(found.pop("parameters"))
    return Facts(
        **found, masked=masked, defaced=defaced, shape=shape, spacing=spacing, codes=codes, parameters=parameters
    )
