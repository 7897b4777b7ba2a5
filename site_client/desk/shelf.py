"""What the pages show of a store's catalog, a page at a time.

Rules:
  * A page asks for what it shows and no more: a catalog may hold a hundred thousand cases.
  * What a browser names is looked up in the catalog; the paths of files come from there, and never from a browser.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locum.common.errors import DataError
from locum.site_client.imaging.catalog import Catalog, read_meta
from locum.site_client.imaging.consent import REPORTS
from locum.site_client.imaging.split import fold_of

#: The split that pages show; a plan states its own.
SPLIT = (0.8, 0.1, 0.1)
#: By what cases can be filtered; each is a column of the catalog or is made of some.
FILTERS = ("label", "part", "modality", "manufacturer", "masked")
PAGE = 50
_REPORT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.html")


@dataclass(frozen=True)
class Shown:
    """One case as the pages show it.

    Attributes:
        part: its fold at the shares of SPLIT.
        image: its file; `mask` as well, or None.
        shape: voxels along (column, row[, slice[, channel]]); `spacing` in millimetres.
        facts: name to value, those that are stated.
    """

    id: str
    unit: str
    patient: str
    label: str
    part: str
    modality: str
    scanner: str
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    image: Path
    mask: Path | None
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Shelf:
    """A store and its catalog, open to read."""

    store: Path
    catalog: Catalog

    @property
    def connection(self) -> sqlite3.Connection:
        """To the catalog."""
        return self.catalog.connection

    @property
    def complete(self) -> bool:
        """Whether the last ingest has finished; if not, one may be running."""
        return bool(read_meta(self.connection, "complete", False))

    @property
    def site(self) -> str:
        """The name of the site that the catalog was made for."""
        return str(read_meta(self.connection, "site", ""))

    def cases(self, chosen: Mapping[str, str], *, first: int) -> tuple[tuple[Shown, ...], int]:
        """A page of the cases that fit what was chosen (filter to value), by id, and the number of all that do."""
        which = [name for name in FILTERS if name in chosen]
        where = " AND ".join(f"{_COLUMNS[name]} = ?" for name in which) or "1"
        values = [_value(name, chosen[name]) for name in which]
        # A fold depends on all cases of the patient: it is asked of all only where it is chosen by.
        table = _WITH_FOLDS if "part" in chosen else "cases"
        self._know_folds()
        number = self.connection.execute(f"SELECT count(*) FROM {table} WHERE {where}", values).fetchone()[0]  # noqa: S608
        page = f"SELECT * FROM {table} WHERE {where} ORDER BY id LIMIT ? OFFSET ?"  # noqa: S608
        return self._shown(page, (*values, PAGE, first)), number

    def choices(self) -> dict[str, list[str]]:
        """The values that each filter can have."""
        found = {name: [str(row[0]) for row in self.connection.execute(sql)] for name, sql in _CHOICES.items()}
        return {**found, "part": ["train", "validation", "test"], "masked": ["yes", "no"]}

    def case(self, name: str) -> Shown:
        """One case; raises DataError if there is none of that name."""
        found = self._shown("SELECT * FROM cases WHERE id = ?", (name,))
        if not found:
            raise DataError("there is no such case", "it may have left the store: look at the list of cases")
        return found[0]

    def _shown(self, sql: str, values: tuple[Any, ...]) -> tuple[Shown, ...]:
        cursor = self.connection.cursor()
        cursor.row_factory = sqlite3.Row
        rows = cursor.execute(sql, values).fetchall()
        patients = sorted({row["patient"] for row in rows})
        marks = ", ".join("?" * len(patients))
        stated = dict(
            self.connection.execute(
                f"SELECT patient, max(fold) FROM cases WHERE patient IN ({marks}) GROUP BY patient",  # noqa: S608
                patients,
            ).fetchall()
        )
        return tuple(_shown(self.store, row, self._fold(row["place"], stated[row["patient"]])) for row in rows)

    def _fold(self, place: float, stated: Any) -> str:
        return fold_of(place, stated, SPLIT, table_folds=read_meta(self.connection, "folds", []))

    def _know_folds(self) -> None:
        folds = read_meta(self.connection, "folds", [])

        def fold_at(place: float, stated: Any) -> str:
            return fold_of(place, stated, SPLIT, table_folds=folds)

        self.connection.create_function("fold_at", 2, fold_at, deterministic=True)


_WITH_FOLDS = "(SELECT *, fold_at(place, max(fold) OVER (PARTITION BY patient)) AS part FROM cases)"
_COLUMNS = {
    "label": "coalesce(label, '')",
    "part": "part",
    "modality": "modality",
    "manufacturer": "manufacturer",
    "masked": "(mask IS NOT NULL)",
}
_CHOICES = {
    "label": "SELECT DISTINCT coalesce(label, '') FROM cases ORDER BY 1",
    "modality": "SELECT DISTINCT modality FROM cases ORDER BY 1",
    "manufacturer": "SELECT DISTINCT manufacturer FROM cases ORDER BY 1",
}


@contextmanager
def opened(store: Path) -> Iterator[Shelf]:
    """A store, to read; raises DataError."""
    with closing(Catalog.open(store)) as catalog:
        yield Shelf(store, catalog)


def reports(store: Path) -> tuple[str, ...]:
    """The names of the readiness reports, the newest first."""
    found = [
        path for path in (store / REPORTS).glob("*.html") if _REPORT.fullmatch(path.name) and not path.is_symlink()
    ]
    return tuple(path.name for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True))


def report(store: Path, name: str) -> bytes:
    """A readiness report; raises DataError if there is none of that name."""
    if name not in reports(store):
        raise DataError("there is no such report", "locum site readiness PLAN writes one")
    return (store / REPORTS / name).read_bytes()


def _value(name: str, value: str) -> str | int:
    return int(value == "yes") if name == "masked" else value


def _shown(store: Path, row: sqlite3.Row, part: str) -> Shown:
    scanner = f"{row['manufacturer']} {row['model']}".strip()
    return Shown(
        id=row["id"],
        unit=row["unit"],
        patient=row["patient"],
        label=row["label"] or "",
        part=part,
        modality=row["modality"],
        scanner=scanner,
        shape=tuple(json.loads(row["shape"])),
        spacing=tuple(json.loads(row["spacing"])),
        image=store / row["image"],
        mask=store / row["mask"] if row["mask"] else None,
        facts=_facts(row, scanner, part),
    )


def _facts(row: sqlite3.Row, scanner: str, part: str) -> dict[str, str]:
    parameters = {name: f"{value:g}" for name, value in json.loads(row["parameters"]).items()}
    told = {
        "label": row["label"],
        "fold (80/10/10)": part,
        "patient (pseudonym)": row["patient"],
        "modality": row["modality"],
        "scanner": scanner,
        "body part": row["body_part"],
        "orientation": row["orientation"],
        "size": " × ".join(map(str, json.loads(row["shape"]))),
        "spacing (mm)": " × ".join(f"{length:g}" for length in json.loads(row["spacing"])),
        "values": row["dtype"],
        "sex": row["sex"],
        "age": row["age"],
        "month of the study": row["month"],
        "de-identified by": row["profile"],
        **parameters,
    }
    return {name: str(value) for name, value in told.items() if value not in {None, ""}}
