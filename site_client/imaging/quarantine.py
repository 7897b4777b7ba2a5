"""What a person at the site decides on images in quarantine: to release or to reject them, and why that holds.

Rules:
  * A release is from the reasons that a person can clear by looking. No person can clear a withdrawn consent, an
    identifier that de-identification has left, a missing patient ID, or a fault of the geometry or of the file.
  * A release holds for the very files that the person saw, by their SHA-256: of a file that has changed, or has joined
    the series since, it says nothing. A rejection holds for the series or image whatever becomes of its files: to
    touch a file must not let it in.
  * A decision is one transaction. It says who and when, and takes effect at the next ingest, which looks at the images
    again. While an ingest writes to the store nothing can be decided.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from locum.common.durable import transaction
from locum.common.errors import DataError
from locum.site_client.imaging import catalog, dicom
from locum.site_client.imaging.catalog import Decision
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.items import Item, kept_path
from locum.site_client.imaging.reasons import SENTENCE, Reason, RefusedError
from locum.site_client.imaging.store import exclusive

#: What a person can clear by looking at the picture.
RELEASABLE = dicom.RELEASABLE | {Reason.REJECTED}
#: A crop box that is smaller than this shows nothing.
LEAST_CROP = 16
_LONGEST_NAME = 80

Crop = tuple[int, int, int, int]

#: What a steward can do next.
NEXT: dict[Reason, str] = {
    Reason.NOT_AN_IMAGE: "Nothing, if it is a list or a viewer's file.",
    Reason.UNREADABLE: "Check access rights; export the file again.",
    Reason.TOO_LARGE: "Split it, or leave it out.",
    Reason.INCOMPLETE_HEADER: "Export it again; do not use tools that strip UIDs.",
    Reason.UNSUPPORTED_OBJECT: "Nothing: such objects are not read.",
    Reason.LOCALIZER: "Nothing.",
    Reason.DERIVED: "Look at it: release it if it is an image of its own, or send the original images.",
    Reason.BURNED_IN: "Look at it: release it, cut the text off, or reject it. BurnedInAnnotation NO lets it pass.",
    Reason.SECONDARY_CAPTURE: "Look at it: release it if it shows no text, cut the text off, or reject it.",
    Reason.DOCUMENT: "Nothing: documents are never taken.",
    Reason.NO_REGIONS: "Look at it: mark the picture and leave the text out, or reject it.",
    Reason.COLOUR: "Send the grey image.",
    Reason.MOSAIC: "Export as enhanced multi-frame, or leave functional MR out.",
    Reason.NO_PIXELS: "Retrieve it again with pixels.",
    Reason.NO_PATIENT_ID: "Give every patient an ID or a pseudonym.",
    Reason.CONSENT_WITHDRAWN: "Nothing: it stays out.",
    Reason.REJECTED: "Nothing, unless the rejection was a mistake: then release it.",
    Reason.RESIDUE: "Clean it at the source: it holds an identifier where none is expected.",
    Reason.INCOMPLETE_STUDY: "Retrieve the study again; ask the PACS team if it stays incomplete.",
    Reason.MIXED_PATIENTS: "Mend the IDs at the source.",
    Reason.DUPLICATE_INSTANCE: "Nothing.",
    Reason.CONFLICTING_INSTANCES: "Find which one is right; remove the other.",
    Reason.SEVERAL_VOLUMES: "Send one volume a series, and single frames of a film.",
    Reason.NO_GEOMETRY: "Export it again with the Image Plane attributes.",
    Reason.MIXED_GEOMETRY: "Split the series at the source.",
    Reason.DUPLICATED_POSITIONS: "Send one volume a series.",
    Reason.MISSING_SLICES: "Retrieve the series again, completely.",
    Reason.IRREGULAR_SPACING: "Send another reconstruction.",
    Reason.TILTED: "Send a reconstruction without tilt.",
    Reason.MONOCHROME1_VOLUME: "Convert it to MONOCHROME2 at the source.",
    Reason.DECODE_FAILED: "Retrieve it again, or decompress it at the source.",
    Reason.NOT_FINITE: "Send the image as it was before it was processed.",
    Reason.NO_LABEL: "Add the line, or leave the image out on purpose.",
    Reason.UNMAPPED_CODE: "Add the code to the site's classes or terminology.",
    Reason.CONFLICTING_LABELS: "Decide, and remove one line.",
    Reason.UNCERTAIN_LABEL: "Have a person read the report or decide between the readers.",
    Reason.MASK_MISSING: "Add it under the right name.",
    Reason.MASK_UNREADABLE: "Save it again as whole numbers.",
    Reason.MASK_MISMATCH: "Draw or resample it on the image's own grid.",
}


@dataclass(frozen=True)
class Held:
    """Files of one series, image or row that are in quarantine for one reason.

    Attributes:
        handle: 16 hexadecimal characters by which a person names the unit.
        unit: the key of the unit, or the name of the file if it belongs to none.
        in_unit: whether it belongs to a unit, so that a person can decide on it.
        files: how many.
        name: of the first of the files.
        decided: what was decided on the unit, and takes or took effect; None if nothing was.
        waiting: the decision takes effect at the next ingest.
    """

    handle: str
    unit: str
    in_unit: bool
    reason: Reason
    detail: str
    files: int
    name: str
    decided: Literal["release", "reject"] | None
    waiting: bool

    @property
    def sentence(self) -> str:
        """The reason in words."""
        return SENTENCE[self.reason]

    @property
    def next_step(self) -> str:
        """What a steward can do."""
        return NEXT[self.reason]

    @property
    def releasable(self) -> bool:
        """Whether a person can clear it by looking."""
        return self.in_unit and self.reason in RELEASABLE

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "id": self.handle,
            "reason": self.reason,
            "detail": self.detail,
            "files": self.files,
            "name": self.name,
            "meaning": self.sentence,
            "next": self.next_step,
            "releasable": self.releasable,
            "decided": self.decided,
            "waiting": self.waiting,
        }


@dataclass(frozen=True)
class Wish:
    """What a person wants.

    Attributes:
        unit: a handle, or the key of the unit.
        by: who decides, as it shall be recorded.
        crop: left, top, width and height in pixels of what is kept of each image; None for all.
        seen: what :func:`stamp` gave for the page that the person saw; None if it was no page.
    """

    unit: str
    decision: Literal["release", "reject"]
    by: str
    crop: Crop | None = None
    seen: str | None = None


# --- what is held

_REASON = "coalesce(items.apart, units.reason)"
_HELD = (
    "FROM items LEFT JOIN units ON units.key = items.unit LEFT JOIN decisions ON decisions.unit = items.unit"
    f" WHERE {_REASON} IS NOT NULL AND NOT coalesce(units.elsewhere, 0)"
)


def handle(unit: str) -> str:
    """A short name of a unit or of a file, for pages and commands: it says nothing of a file's name."""
    return hashlib.sha256(unit.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def held(
    connection: sqlite3.Connection, *, reason: str | None = None, first: int = 0, most: int = -1
) -> tuple[Held, ...]:
    """What is in quarantine, by reason and name; `most` of it from the place `first` on."""
    which, values = ("", ()) if reason is None else (f" AND {_REASON} = ?", (reason,))
    rows = connection.execute(
        f"SELECT coalesce(items.unit, items.name) AS thing, items.unit IS NOT NULL, {_REASON} AS why,"
        " max(CASE WHEN items.apart IS NULL THEN units.detail ELSE items.apart_detail END), count(*),"
        f" min(items.name) AS name, decisions.decision, min(items.mtime_ns) = -1 {_HELD}{which}"
        " GROUP BY thing, why ORDER BY why, name LIMIT ? OFFSET ?",
        (*values, most, first),
    )
    return tuple(_held(row) for row in rows)


def held_of(connection: sqlite3.Connection, unit: str) -> tuple[Held, ...]:
    """What is in quarantine of one unit, or the one file that belongs to none."""
    rows = connection.execute(
        "SELECT coalesce(items.unit, items.name) AS thing, items.unit IS NOT NULL, "
        f"{_REASON} AS why, max(CASE WHEN items.apart IS NULL THEN units.detail ELSE items.apart_detail END), count(*),"
        f" min(items.name) AS name, decisions.decision, min(items.mtime_ns) = -1 {_HELD}"
        " AND (items.unit = ? OR (items.unit IS NULL AND items.name = ?)) GROUP BY thing, why ORDER BY why",
        (unit, unit),
    )
    return tuple(_held(row) for row in rows)


def number_held(connection: sqlite3.Connection, reason: str | None = None) -> int:
    """How many entries :func:`held` has in all."""
    which, values = ("", ()) if reason is None else (f" AND {_REASON} = ?", (reason,))
    row = connection.execute(
        f"SELECT count(*) FROM (SELECT 1 {_HELD}{which} GROUP BY coalesce(items.unit, items.name), {_REASON})",  # noqa: S608
        values,
    ).fetchone()
    return int(row[0])


def reasons_held(connection: sqlite3.Connection) -> dict[str, int]:
    """The reasons for which anything is in quarantine, and for each the number of entries of :func:`held`."""
    rows = connection.execute(
        f"SELECT why, count(*) FROM (SELECT {_REASON} AS why {_HELD} GROUP BY coalesce(items.unit, items.name), why)"  # noqa: S608
        " GROUP BY why ORDER BY why"
    )
    return dict(rows.fetchall())


def number_waiting(connection: sqlite3.Connection) -> int:
    """How many decisions take effect at the next ingest."""
    row = connection.execute(
        "SELECT count(DISTINCT decisions.unit) FROM decisions JOIN items USING (unit) WHERE mtime_ns = -1"
    ).fetchone()
    return int(row[0])


def unit_of(connection: sqlite3.Connection, named: str) -> str:
    """The key of the unit (or the name of the file that belongs to none) with a handle, or itself if it is one.

    Raises:
        DataError: there is none.
    """
    connection.create_function("handle", 1, handle, deterministic=True)
    row = connection.execute(
        "SELECT coalesce(unit, name) FROM items WHERE unit = ? OR (unit IS NULL AND name = ?) LIMIT 1", (named, named)
    ).fetchone()
    if row is None and len(named) == len(handle("")):
        row = connection.execute(
            "SELECT thing FROM (SELECT DISTINCT coalesce(unit, name) AS thing FROM items) WHERE handle(thing) = ?",
            (named,),
        ).fetchone()
    if row is None:
        raise DataError(f"nothing here has the name {named!r}", "locum site quarantine --store DIR lists what there is")
    return str(row[0])


def items_of(connection: sqlite3.Connection, unit: str) -> tuple[Item, ...]:
    """The files or rows of a unit, by name, those that have left it included."""
    return _items(connection, unit, "1")


def images_of(connection: sqlite3.Connection, unit: str) -> tuple[Item, ...]:
    """The files that would make the unit: without localizers and copies, unless there is nothing else."""
    return _items(connection, unit, "apart IS NULL") or items_of(connection, unit)


def case_of(connection: sqlite3.Connection, unit: str) -> str | None:
    """The id of the case that a unit is; None if it is none."""
    row = connection.execute("SELECT id FROM cases WHERE unit = ?", (unit,)).fetchone()
    return None if row is None else str(row[0])


def _items(connection: sqlite3.Connection, unit: str, which: str) -> tuple[Item, ...]:
    whose = "(unit = ? OR (unit IS NULL AND name = ?))"
    rows = connection.execute(
        f"SELECT name, path, source, size, mtime_ns, row FROM items WHERE {whose} AND {which} ORDER BY name",  # noqa: S608
        (unit, unit),
    )
    return tuple(
        Item(name, kept_path(path), source, size, mtime_ns, row=tuple(json.loads(row)) if row else None)
        for name, path, source, size, mtime_ns, row in rows
    )


def stamp(items: Sequence[Item]) -> str:
    """By what a change of files is seen between the page that shows them and the decision; nothing is read."""
    return hashlib.sha256(repr([_status(item.path) for item in items]).encode()).hexdigest()[:32]


def decision_on(connection: sqlite3.Connection, unit: str) -> Decision | None:
    """What a person decided on a unit; None if nobody did."""
    row = connection.execute(
        "SELECT unit, decision, reasons, by, at, content, crop FROM decisions WHERE unit = ?", (unit,)
    ).fetchone()
    if row is None:
        return None
    crop = tuple(json.loads(row[6])) if row[6] else None
    return Decision(row[0], row[1], tuple(json.loads(row[2])), row[3], row[4], row[5], crop)


# --- what holds


def released(decision: Decision | None, item: Item) -> frozenset[Reason]:
    """The reasons from which a person has released a file as it is now; none if it is not the file that was seen."""
    if decision is None or decision.decision != "release" or not decision.reasons:
        return frozenset()
    return frozenset(map(Reason, decision.reasons)) if content_of(item.path) in decision.content else frozenset()


def rejected(decision: Decision | None) -> bool:
    """Whether a person has rejected the unit."""
    return decision is not None and decision.decision == "reject"


def content_of(path: Path) -> str:
    """The SHA-256 of a file, its first 32 digits; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError:
        return "unreadable"


# --- to decide


def decide(store: Path, wish: Wish) -> Decision:
    """Record what a person wants, in one transaction; it takes effect at the next ingest.

    Raises:
        DataError: no such unit; a reason that no person can clear; a name or a crop box that is none; the files have
            changed since they were seen; or an ingest is writing to the store.
    """
    if not (store / catalog.FILE_NAME).is_file():
        raise DataError(f"{store} holds no catalog", "run: locum site ingest SITE.yaml --store DIR")
    name = _name(wish.by)
    with exclusive(store), _writing(store) as connection:
        unit = unit_of(connection, wish.unit)
        items = items_of(connection, unit)
        if wish.seen is not None and wish.seen != stamp(items):
            raise DataError("the files have changed since the page was opened", "open it again, and look once more")
        decision = _release(connection, unit, items, wish) if wish.decision == "release" else _rejection(unit)
        decision = Decision(unit, wish.decision, decision.reasons, name, _now(), decision.content, decision.crop)
        with transaction(connection):
            _record(connection, decision)
        return decision


def _release(connection: sqlite3.Connection, unit: str, items: Sequence[Item], wish: Wish) -> Decision:
    cleared = _cleared(connection, unit)
    if wish.crop is not None:
        _check_crop(items, wish.crop)
    content = {content_of(item.path) for item in items} if cleared else set()
    before = decision_on(connection, unit)
    # An image that was released may be held for another reason now: it keeps what it was released from.
    if before is not None and before.decision == "release" and content <= set(json.loads(before.content)):
        cleared |= set(map(Reason, before.reasons))
    return Decision(unit, "release", tuple(sorted(cleared)), "", "", json.dumps(sorted(content)), wish.crop)


def _cleared(connection: sqlite3.Connection, unit: str) -> set[Reason]:
    """The reasons from which a release would be; raises DataError if a person can clear none, or one that stays."""
    found = held_of(connection, unit)
    if not found:
        raise DataError("this is not in quarantine", "locum site quarantine --store DIR lists what is")
    row = connection.execute("SELECT reason FROM units WHERE key = ?", (unit,)).fetchone()
    of_all = {Reason(row[0])} if row is not None and row[0] is not None else set()
    reasons = {one.reason for one in found}
    # What only some files have (a localizer, a copy) keeps these out, and not the rest.
    lasting = sorted(of_all - RELEASABLE) or (sorted(reasons) if reasons.isdisjoint(RELEASABLE) else [])
    if lasting or not found[0].in_unit:
        reason = lasting[0] if lasting else found[0].reason
        raise DataError(f"nobody can release this: {SENTENCE[reason]}", NEXT[reason])
    return (reasons & RELEASABLE) - {Reason.REJECTED}


def _rejection(unit: str) -> Decision:
    return Decision(unit, "reject", (), "", "", "[]")


def _record(connection: sqlite3.Connection, decision: Decision) -> None:
    columns = "unit, decision, reasons, by, at, crop, content"
    connection.execute(
        f"INSERT OR REPLACE INTO decisions ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
        (
            decision.unit,
            decision.decision,
            json.dumps(decision.reasons),
            decision.by,
            decision.at,
            json.dumps(decision.crop) if decision.crop is not None else None,
            decision.content,
        ),
    )
    # A time that no file has: the next ingest looks at them again.
    connection.execute("UPDATE items SET mtime_ns = -1 WHERE unit = ?", (decision.unit,))


def _name(given: str) -> str:
    name = " ".join(given.split())
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise DataError(
            "a decision needs the name of who decides", f"give a name of at most {_LONGEST_NAME} characters"
        )
    return name


def _check_crop(items: Sequence[Item], crop: Crop) -> None:
    left, top, width, height = crop
    if min(left, top) < 0 or min(width, height) < LEAST_CROP:
        raise DataError(f"{list(crop)} is no box", f"give left, top, width, height in pixels, {LEAST_CROP} at least")
    for item in items:
        columns, rows = _size(item)
        if left + width > columns or top + height > rows:
            raise DataError(f"the box {list(crop)} is larger than an image of {columns} × {rows}", "draw it again")


def _size(item: Item) -> tuple[int, int]:
    """Columns and rows of an image; (0, 0) if it has none."""
    try:
        dataset = dicom.read(item.path, item.path.stat().st_size)
        with damage_is(Reason.UNREADABLE):
            return int(dataset.get("Columns", 0)), int(dataset.get("Rows", 0))
    except (RefusedError, OSError):
        return 0, 0


def _status(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def _writing(store: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(store / catalog.FILE_NAME, isolation_level=None, timeout=10)) as connection:
        catalog.check_version(connection, store)
        yield connection


def _held(row: Sequence[Any]) -> Held:
    unit, in_unit, reason, detail, files, name, decided, waiting = row
    return Held(
        handle(unit), unit, bool(in_unit), Reason(reason), detail or "", files, name, decided, waiting=bool(waiting)
    )
