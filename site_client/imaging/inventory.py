"""The catalog as an ingest writes it: what was walked, seen, grouped, decided and stored, a page at a time.

Rules:
  * Nothing here is held for the whole site: rows come in pages, so that memory does not grow with the studies.
  * Each step commits what it has done; an ingest that was interrupted goes on with the rest. Until :meth:`finish` the
    catalog counts as incomplete.
  * A unit is stale when any of its items has changed; it is then grouped anew from what the headers said.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, fields
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Self, TypeVar

from locum.common.errors import DataError
from locum.site_client.imaging import catalog
from locum.site_client.imaging.catalog import CaseRow, Counts, Decision, Outcome
from locum.site_client.imaging.dicom import Sighting
from locum.site_client.imaging.items import Item, Unit, kept_path, path_as_kept
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import NOBODY, Known
from locum.site_client.imaging.labels.given import Annotation
from locum.site_client.imaging.quarantine import decision_on
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.store import DICOM

_TEMPORARY = """
PRAGMA temp_store = FILE;
CREATE TEMP TABLE walk (
    name TEXT PRIMARY KEY, source INTEGER NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, row TEXT, known TEXT, given TEXT, given_detail TEXT NOT NULL
) WITHOUT ROWID;
CREATE TEMP TABLE decided (
    key TEXT PRIMARY KEY, patient TEXT NOT NULL, fold TEXT, changed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX temp.decided_by_patient ON decided (patient, fold);
"""
#: A reader of a large catalog holds it for as long as it reads; an ingest waits.
_PATIENCE_S = 600.0
#: Rows that are at hand at a time.
_PAGE = 512
_NEW = """
    FROM walk LEFT JOIN items USING (name)
    WHERE (items.name IS NULL OR items.size <> walk.size OR items.mtime_ns <> walk.mtime_ns
        OR items.given IS NOT walk.given OR items.source <> walk.source
        OR (walk.known IS NOT NULL AND walk.known <> items.known)
        OR items.reason = 'unreadable')  -- access rights are mended without a change of the file
"""
_SIGHTING = (
    "name, source, path, size, mtime_ns, row, given, unit, sop, sop_class, known, file, reason, detail, spoils,"
    " multi_frame, annotation"
)


T = TypeVar("T")


def batches(things: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Things in tuples of `size`, the last one shorter."""
    rest = iter(things)
    while batch := tuple(islice(rest, size)):
        yield batch


class Inventory:
    """The catalog of a store in the hands of the one ingest that may write it. Open it with :meth:`opened`."""

    def __init__(self, store: Path, connection: sqlite3.Connection) -> None:
        self.store = store
        self.connection = connection

    @classmethod
    @contextmanager
    def opened(cls, store: Path, *, site: str, keys: Keys) -> Iterator[Self]:
        """Open the catalog of a store to write, and make it if there is none.

        Raises:
            DataError: it belongs to another site or was made with other keys.
        """
        with closing(sqlite3.connect(store / catalog.FILE_NAME, timeout=_PATIENCE_S)) as connection:
            connection.execute("PRAGMA secure_delete = ON")  # what was known of who has withdrawn is overwritten
            catalog.create(connection)
            catalog.check_version(connection, store)
            inventory = cls(store.absolute(), connection)
            inventory._bind("site", site, f"use a store of its own for the site {site}")
            remedy = "give the key file with which the store was made; after a rotation ingest into a new store"
            inventory._bind("key", keys.fingerprint, remedy)
            connection.executescript(_TEMPORARY)
            yield inventory

    def _bind(self, name: str, value: str, remedy: str) -> None:
        known = catalog.read_meta(self.connection, name, None)
        if known is None:
            with self.connection:
                catalog.write_meta(self.connection, name, value)
        elif known != value:
            raise DataError(f"the store {self.store} was made with another {name}", remedy)

    def withdraw(self, patients: frozenset[str]) -> int:
        """Take the cases of patients (pseudonyms) out at once, whatever becomes of the rest of the ingest.

        Returns:
            How many cases; their files are to be swept.
        """
        rows = self.connection.execute(
            "SELECT unit, patient, json_extract(known, '$.patient') FROM cases JOIN units ON units.key = cases.unit"
        )
        gone = [(unit,) for unit, *names in rows if not patients.isdisjoint(names)] if patients else []
        with self.connection:
            self.connection.executemany("DELETE FROM codes WHERE case_id = (SELECT id FROM cases WHERE unit = ?)", gone)
            self.connection.executemany("DELETE FROM cases WHERE unit = ?", gone)
            self.connection.executemany(
                "UPDATE units SET reason = ?, detail = '', inputs = '' WHERE key = ?",
                [(Reason.CONSENT_WITHDRAWN, *unit) for unit in gone],
            )
        return len(gone)

    # --- walked

    def expect(self, readings: Sequence[str]) -> None:
        """How the items of each source are read: those of a source that was read in another way count as changed."""
        before = catalog.read_meta(self.connection, "readings", [])
        changed = [(number,) for number, reading in enumerate(readings) if [reading] != before[number : number + 1]]
        with self.connection:
            # A time that no file has; -1 is that of a decision.
            self.connection.executemany("UPDATE items SET mtime_ns = -2 WHERE source = ?", changed)
            catalog.write_meta(self.connection, "readings", list(readings))

    def walked(self, items: Iterable[Item]) -> tuple[int, int]:
        """Note all that lies in the sources; the number of it, and how much of it is new or has changed."""
        with self.connection:
            self.connection.execute("DELETE FROM walk")
            marks = ", ".join("?" * len(_WALKED))
            self.connection.executemany(f"INSERT OR REPLACE INTO walk VALUES ({marks})", map(_walk_row, items))  # noqa: S608
        return self._number("SELECT count(*) FROM walk"), self._number(f"SELECT count(*) {_NEW}")

    def begin(self) -> None:
        """Forget what is no longer there; from here on the catalog is incomplete."""
        with self.connection:
            catalog.write_meta(self.connection, "complete", False)
            gone = "SELECT name FROM items EXCEPT SELECT name FROM walk"
            units = f"SELECT unit FROM items WHERE name IN ({gone})"  # noqa: S608
            self.connection.execute(f"UPDATE units SET stale = 1 WHERE key IN ({units})")  # noqa: S608
            self.connection.execute(f"DELETE FROM items WHERE name IN ({gone})")  # noqa: S608
            self.connection.execute(  # the root of the site may be elsewhere now
                "UPDATE items SET path = walk.path FROM walk WHERE walk.name = items.name AND walk.path <> items.path"
            )

    def new_items(self) -> Iterator[Item]:
        """The items that are not known as they are now, by name; they may be recorded meanwhile."""
        columns = ", ".join("name" if name == "name" else f"walk.{name}" for name in _WALKED)
        return map(_item, self._pages(f"SELECT {columns} {_NEW} AND name > ? ORDER BY name LIMIT ?"))

    def seen(self, sightings: Sequence[Sighting]) -> None:
        """Record what headers say, and that the units of these items, of now and of before, are stale."""
        names = [(sighting.item.name,) for sighting in sightings]
        units = [(sighting.unit,) for sighting in sightings if sighting.unit is not None]
        with self.connection:
            self.connection.executemany(
                "UPDATE units SET stale = 1 WHERE key = (SELECT unit FROM items WHERE name = ?)", names
            )
            marks = ", ".join("?" * 17)
            self.connection.executemany(
                f"INSERT OR REPLACE INTO items ({_SIGHTING}, apart, apart_detail) VALUES ({marks}, NULL, '')",  # noqa: S608
                map(_sighting_row, sightings),
            )
            self.connection.executemany(
                "UPDATE items SET apart = reason, apart_detail = detail"
                " WHERE name = ? AND reason IS NOT NULL AND (unit IS NULL OR NOT spoils)",
                names,
            )
            self.connection.executemany(
                "INSERT INTO units (key) VALUES (?) ON CONFLICT (key) DO UPDATE SET stale = 1", units
            )

    # --- grouped

    def stale_units(self) -> Iterator[tuple[str, tuple[Sighting, ...]]]:
        """Each stale unit with what was seen of its items, by name; without those that have left it."""
        keys = self._pages("SELECT key FROM units WHERE stale AND key > ? ORDER BY key LIMIT ?")
        return ((key, self._sightings(key)) for (key,) in keys)

    def _sightings(self, key: str) -> tuple[Sighting, ...]:
        rows = self.connection.execute(
            f"SELECT {_SIGHTING} FROM items WHERE unit = ? AND (reason IS NULL OR spoils) ORDER BY name",  # noqa: S608
            (key,),
        )
        return tuple(map(_sighting, rows))

    def grouped(self, found: Iterable[tuple[str, Unit | None, Sequence[Sighting]]]) -> None:
        """Record units with the copies that have left them; a unit of None has no image left."""
        with self.connection:
            for key, unit, copies in found:
                self.connection.execute(
                    "UPDATE items SET apart = NULL, apart_detail = '' WHERE unit = ? AND (reason IS NULL OR spoils)",
                    (key,),
                )
                self.connection.executemany(
                    "UPDATE items SET apart = ?, apart_detail = ? WHERE name = ?",
                    [(copy.reason, copy.detail, copy.item.name) for copy in copies],
                )
                if unit is None:
                    self.connection.execute("DELETE FROM units WHERE key = ?", (key,))
                else:
                    self.connection.execute(
                        "UPDATE units SET stale = 0, inputs = '', source = ?, known = ?, file = ?, gate = ?,"
                        " gate_detail = ? WHERE key = ?",
                        (unit.source, unit.known.to_json(), unit.file, unit.gate, unit.gate_detail, key),
                    )

    # --- decided and stored

    def units(self) -> Iterator[tuple[Unit, str]]:
        """Each unit with its items, and the digest of what its outcome depended on when it was last decided."""
        rows = self.connection.execute(f"SELECT {_UNIT} {_UNIT_FROM} ORDER BY items.unit, items.name")
        return (_unit(list(group)) for _, group in groupby(rows, key=lambda row: row[0]))

    def of_two_patients(self, kind: str) -> frozenset[str]:
        """The names of one kind (accession, study, series; keyed) that images of several patients have."""
        name, patient = f"json_extract(known, '$.{kind}')", "json_extract(known, '$.patient')"
        rows = self.connection.execute(
            f"SELECT {name} FROM units WHERE gate IS NULL AND known <> '' AND {name} <> ''"  # noqa: S608
            f" GROUP BY 1 HAVING count(DISTINCT {patient}) > 1"
        )
        return frozenset(row[0] for row in rows)

    def changed_units(self) -> Iterator[Unit]:
        """The units that are to be stored anew; they may be recorded meanwhile."""
        for (key,) in self._pages("SELECT key FROM decided WHERE changed AND key > ? ORDER BY key LIMIT ?"):
            rows = self.connection.execute(
                f"SELECT {_UNIT} {_UNIT_FROM} AND items.unit = ? ORDER BY items.name",
                (key,),
            )
            yield _unit(rows.fetchall())[0]

    def decided(self, decisions: Iterable[tuple[str, str, str | None, bool]]) -> int:
        """Note (unit, patient, stated fold, whether its outcome may be another); the number of the latter."""
        with self.connection:
            self.connection.execute("DELETE FROM decided")
            self.connection.executemany("INSERT INTO decided VALUES (?, ?, ?, ?)", decisions)
            # Files are written before the catalog: what an interrupted ingest wrote must not pass for what was there.
            self.connection.execute("UPDATE units SET inputs = '' WHERE key IN (SELECT key FROM decided WHERE changed)")
        return self._number("SELECT count(*) FROM decided WHERE changed")

    def torn_patient(self) -> tuple[str, str] | None:
        """A patient for whom two folds are stated, with these; None if there is none."""
        row = self.connection.execute(
            "SELECT patient, group_concat(DISTINCT fold) FROM decided WHERE fold IS NOT NULL AND patient <> ''"
            " GROUP BY patient HAVING count(DISTINCT fold) > 1 LIMIT 1"
        ).fetchone()
        return None if row is None else (row[0], row[1])

    def stated_folds(self) -> list[str]:
        """The folds that are stated for any unit."""
        rows = self.connection.execute("SELECT DISTINCT fold FROM decided WHERE fold IS NOT NULL ORDER BY 1")
        return [row[0] for row in rows]

    def files_of(self, unit: str) -> tuple[str, ...]:
        """The files of a unit that is a case, relative to the store."""
        row = self.connection.execute("SELECT image, mask FROM cases WHERE unit = ?", (unit,)).fetchone()
        return tuple(name for name in row or () if name)

    def is_file_of(self, case: str, name: str) -> bool:
        """Whether a file of the store, or its folder of DICOM files, belongs to the case of this id."""
        known = self.connection.execute("SELECT image, mask FROM cases WHERE id = ?", (case,)).fetchone()
        return known is not None and name in {*known, f"{DICOM}/{case}"}

    def stored(self, outcomes: Sequence[Outcome], cases: Sequence[CaseRow], codes: Mapping[str, Iterable[str]]) -> None:
        """Record outcomes, in place of what was known of the same units, in one transaction."""
        with self.connection:
            keys = [(outcome.key,) for outcome in outcomes]
            self.connection.executemany("DELETE FROM codes WHERE case_id = (SELECT id FROM cases WHERE unit = ?)", keys)
            self.connection.executemany("DELETE FROM cases WHERE unit = ?", keys)
            self.connection.executemany(
                "UPDATE units SET reason = ?, detail = ?, elsewhere = ?, inputs = ? WHERE key = ?",
                [(o.reason, o.detail, o.elsewhere, o.inputs, o.key) for o in outcomes],
            )
            marks = ", ".join("?" * len(fields(CaseRow)))
            columns = ", ".join(field.name for field in fields(CaseRow))
            self.connection.executemany(f"INSERT INTO cases ({columns}) VALUES ({marks})", map(astuple, cases))  # noqa: S608
            self.connection.executemany(
                "INSERT OR IGNORE INTO codes VALUES (?, ?)", [(case, code) for case in codes for code in codes[case]]
            )

    @property
    def withdrawn(self) -> list[str]:
        """The pseudonyms on the list of withdrawals at the last ingest that finished."""
        return list(catalog.read_meta(self.connection, "withdrawn", []))

    def finish(
        self, *, found: int, unmatched: Sequence[str], folds: Sequence[str], withdrawn: Sequence[str] = ()
    ) -> Counts:
        """Forget cases that no unit has any more and write the totals, in one transaction."""
        with self.connection:
            self.connection.execute("DELETE FROM cases WHERE unit NOT IN (SELECT key FROM units)")
            self.connection.execute("DELETE FROM codes WHERE case_id NOT IN (SELECT id FROM cases)")
            # A fold that is stated for any image of a patient, in quarantine or not, is that of all.
            stated = "(SELECT max(decided.fold) FROM decided WHERE decided.patient = cases.patient)"
            self.connection.execute(f"UPDATE cases SET fold = {stated} WHERE fold IS NOT {stated}")  # noqa: S608
            elsewhere = self._number("SELECT count(*) FROM items JOIN units ON units.key = items.unit WHERE elsewhere")
            values = {
                "found": found - elsewhere,
                "unmatched": list(unmatched),
                "folds": list(folds),
                "withdrawn": list(withdrawn),
                "complete": True,
            }
            for name, value in values.items():
                catalog.write_meta(self.connection, name, value)
        return catalog.counts_of(self.connection)

    # --- beside it

    def annotations(self) -> Iterator[tuple[int, Annotation]]:
        """Each object that says something of images, with the number of its source."""
        rows = self._pages(
            "SELECT name, source, path, size, sop_class, known FROM items"
            " WHERE annotation AND name > ? ORDER BY name LIMIT ?"
        )
        for _, source, path, size, sop_class, known in rows:
            yield source, Annotation(kept_path(path), size, sop_class, cleaned=False, known=Known.from_json(known))

    def decision(self, unit: str) -> Decision | None:
        """What a person decided on a unit; None if nobody did."""
        return decision_on(self.connection, unit)

    # --- rows

    def _number(self, sql: str) -> int:
        return int(self.connection.execute(sql).fetchone()[0])

    def _pages(self, sql: str) -> Iterator[Any]:
        """The rows of a query that goes on after a first column, page by page."""
        last = ""
        while page := self.connection.execute(sql, (last, _PAGE)).fetchall():
            yield from page
            last = page[-1][0]


_WALKED = ("name", "source", "path", "size", "mtime_ns", "row", "known", "given", "given_detail")
_UNIT = (
    # What could not be read is tried again.
    "units.key, CASE WHEN units.reason IN ('unreadable', 'mask_unreadable') THEN '' ELSE units.inputs END,"
    " units.source, units.known, units.file, units.gate, units.gate_detail,"
    " items.name, items.source, items.path, items.size, items.mtime_ns, items.row"
)
_UNIT_FROM = "FROM items JOIN units ON units.key = items.unit WHERE items.apart IS NULL"


def _walk_row(item: Item) -> tuple[Any, ...]:
    given, detail = item.refused or (None, "")
    known = item.known.to_json() if item.known else None
    row = json.dumps(item.row) if item.row else None
    return item.name, item.source, path_as_kept(item.path), item.size, item.mtime_ns, row, known, given, detail


def _item(row: Sequence[Any]) -> Item:
    name, source, path, size, mtime_ns, place, known, given, detail = row
    return Item(
        name,
        kept_path(path),
        source,
        size,
        mtime_ns,
        row=_place(place),
        known=Known.from_json(known) if known else None,
        refused=(Reason(given), detail) if given else None,
    )


def _place(written: str | None) -> Any:
    return tuple(json.loads(written)) if written else None


def _sighting_row(seen: Sighting) -> tuple[Any, ...]:
    item = seen.item
    return (
        item.name,
        item.source,
        path_as_kept(item.path),
        item.size,
        item.mtime_ns,
        json.dumps(item.row) if item.row else None,
        item.refused[0] if item.refused else None,
        seen.unit,
        seen.sop,
        seen.sop_class,
        seen.known.to_json(),
        seen.file,
        seen.reason,
        seen.detail,
        seen.spoils,
        seen.multi_frame,
        seen.annotation,
    )


def _sighting(row: Sequence[Any]) -> Sighting:
    name, source, path, size, mtime_ns, place, _, unit, sop, sop_class, known, file, reason, detail, *flags = row
    spoils, multi_frame, annotation = map(bool, flags)
    return Sighting(
        Item(name, kept_path(path), source, size, mtime_ns, row=_place(place)),
        unit=unit,
        sop=sop,
        sop_class=sop_class,
        known=Known.from_json(known),
        file=file,
        reason=Reason(reason) if reason else None,
        detail=detail,
        spoils=spoils,
        multi_frame=multi_frame,
        annotation=annotation,
    )


def _unit(rows: Sequence[Sequence[Any]]) -> tuple[Unit, str]:
    key, inputs, source, known, file, gate, gate_detail = rows[0][:7]
    items = tuple(Item(r[7], kept_path(r[9]), r[8], r[10], r[11], row=_place(r[12])) for r in rows)
    unit = Unit(
        key=key,
        source=source,
        items=items,
        known=Known.from_json(known) if known else NOBODY,
        file=file,
        gate=Reason(gate) if gate else None,
        gate_detail=gate_detail,
    )
    return unit, inputs
