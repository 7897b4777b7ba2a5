"""Ingest: from the site's sources to a store of volumes and a catalog of cases.

Rules:
  * found = stored + quarantined, always: every file ends in a case or in quarantine with one reason.
  * No file can stop an ingest; only a wrong site file, a wrong key or a disk that cannot be written does.
  * What has not changed is not read again; an interrupted ingest continues with what it had not committed.
  * A series is decided whole: by its files, its label, its fold and its mask, whose digest tells a change.

Steps: find items → look at what is new → group into units → decide (label, fold, table) → load, gate, store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from locum.site_client.imaging import dicom, geometry, nifti, npz
from locum.site_client.imaging.catalog import CaseRow, Catalog, Counts, ItemRow, UnitRow
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.dicom import Sighting
from locum.site_client.imaging.geometry import Volume
from locum.site_client.imaging.grouping import Grouped, Reader, group, look
from locum.site_client.imaging.items import Item, Unit, find_items
from locum.site_client.imaging.keys import case_id
from locum.site_client.imaging.labels.tables import LabelBook, MaskFolder, Roll, check_folds, code_class
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import DicomSource, NpzSource, SiteData
from locum.site_client.imaging.split import Fold, unit_interval
from locum.site_client.imaging.store import MASKS, VOLUMES, Draft, exclusive, present, sweep

#: Raised when the same files would have another outcome than before: everything is then done again.
GATE_VERSION = 1

_BATCH = 64


@dataclass(frozen=True)
class Progress:
    """How far an ingest is: files looked at, or units decided and stored."""

    stage: Literal["reading", "storing"]
    done: int
    total: int


@dataclass(frozen=True)
class _Desk:
    """What every step needs."""

    site: SiteData
    store: Path
    key: bytes
    catalog: Catalog
    reader: Reader
    tell: Callable[[Progress], None]


@dataclass(frozen=True)
class _Decision:
    """All that an outcome depends on besides the content of the image."""

    unit: Unit
    patient: str
    fold: Fold | None = None
    label: str | None = None
    mask: Path | None = None
    reason: Reason | None = None
    detail: str = ""
    elsewhere: bool = False
    modality: str = ""

    @cached_property
    def inputs(self) -> str:
        """A digest that changes when anything does that the outcome depends on.

        It is asked for before the mask is read: one that is replaced meanwhile is then taken at the next ingest.
        """
        files = [(item.name, item.size, item.mtime_ns) for item in self.unit.items]
        parts = (GATE_VERSION, files, self.patient, self.fold, self.label, _stamp(self.mask))
        whole = repr((*parts, self.reason, self.detail, self.elsewhere, self.modality))
        return hashlib.sha256(whole.encode("utf-8", "backslashreplace")).hexdigest()[:32]


@dataclass(frozen=True)
class _Loaded:
    """An image with the facts that the catalog keeps of it."""

    volume: Volume
    modality: str = ""
    manufacturer: str = ""
    model: str = ""


@dataclass
class _Batch:
    """Outcomes that are not yet committed."""

    draft: Draft
    units: list[UnitRow] = field(default_factory=list)
    items: list[ItemRow] = field(default_factory=list)
    cases: list[CaseRow] = field(default_factory=list)


def ingest(site: SiteData, store: Path, *, key: bytes, progress: Callable[[Progress], None] | None = None) -> Counts:
    """Bring a store up to date with the site's sources.

    Args:
        site: where the images are, from :func:`locum.site_client.imaging.sources.load_site`.
        store: a folder; it is made if need be.
        key: the site's secret key.
        progress: told of every file and unit.

    Returns:
        What became of everything found.

    Raises:
        DataError: the tables do not fit the images, the store is another site's or of another key, or in use.
        RunError: the store cannot be written; what was committed stays.
    """
    store = store.absolute()
    with exclusive(store), Catalog.writing(store, site=site.name, key=key) as catalog, _quiet():
        desk = _Desk(site, store, key, catalog, Reader(), progress or _tell_nobody)
        items = find_items(site)
        grouped = _grouped(desk, items)
        known = catalog.units()
        decisions, unmatched, folds = _decide(desk, grouped.units)
        _store(desk, known, decisions, grouped.apart)
        gone = known.keys() - {unit.key for unit in grouped.units}
        catalog.finish(gone_units=gone, found=len(items), unmatched=unmatched, folds=folds)
        sweep(store, catalog.files())
        return catalog.counts()


def _tell_nobody(progress: Progress) -> None:
    """The progress of an ingest that nobody watches."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's and highdicom's remarks on single files, which quote their content, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom", "nibabel.global")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# Look and group: only what is new, and what shares a series with it.


def _grouped(desk: _Desk, items: Sequence[Item]) -> Grouped:
    known, units = desk.catalog.items(), desk.catalog.units()
    old = [item for item in items if _is_known(item, known)]
    unchanged = {item.name for item in old}
    new = [item for item in items if item.name not in unchanged]
    gone = known.keys() - {item.name for item in items}
    touched = {row.unit for name, row in known.items() if row.unit and name not in unchanged}
    touched |= {key for key, unit in units.items() if not unit.inputs}
    sightings = _look(desk, new, total=len(new))
    touched |= {sighting.unit for sighting in sightings if sighting.unit}
    again = [item for item in old if known[item.name].unit in touched]
    sightings += _look(desk, again, total=len(new) + len(again))
    desk.catalog.begin(gone=gone, changed_units=touched)
    fresh = group(sorted(sightings, key=lambda sighting: sighting.item.name), desk.reader, desk.key)
    kept = _kept_units(units, old, known, touched)
    return Grouped((*fresh.units, *kept), fresh.apart)


def _is_known(item: Item, known: Mapping[str, ItemRow]) -> bool:
    row = known.get(item.name)
    return row is not None and (row.size, row.mtime_ns) == (item.size, item.mtime_ns)


def _look(desk: _Desk, items: Sequence[Item], *, total: int) -> list[Sighting]:
    sightings = []
    for item in items:
        sightings.append(look(desk.site, item, desk.reader))
        desk.tell(Progress("reading", total - len(items) + len(sightings), total))
    return sightings


def _kept_units(
    units: Mapping[str, UnitRow], items: Sequence[Item], known: Mapping[str, ItemRow], touched: set[str]
) -> list[Unit]:
    """The units of which no file has changed, as the catalog knows them."""
    members: dict[str, list[Item]] = {}
    for item in items:
        row = known[item.name]
        if row.unit is not None and row.reason is None and row.unit not in touched:
            members.setdefault(row.unit, []).append(item)
    return [_kept_unit(units[key], some) for key, some in members.items()]


def _kept_unit(row: UnitRow, items: Sequence[Item]) -> Unit:
    return Unit(
        key=row.key,
        source=row.source,
        items=tuple(items),
        patient=row.patient,
        accession=row.accession,
        study=row.study,
        series=row.series,
        file=row.file,
        gate=Reason(row.gate) if row.gate else None,
        gate_detail=row.gate_detail,
    )


# Decide: label, fold, patient and mask of every unit.


@dataclass(frozen=True)
class _Tables:
    """What the site knows besides the images."""

    book: LabelBook | None
    roll: Roll | None
    masks: MaskFolder


def _decide(desk: _Desk, units: Sequence[Unit]) -> tuple[list[_Decision], list[str], list[str]]:
    """The decisions, the lines of tables that name no image, and the folds that tables state."""
    site = desk.site
    book = LabelBook(site.labels, desk.key) if site.labels else None
    roll = Roll(site.table, desk.key) if site.table else None
    in_files = [unit for unit in units if not isinstance(site.sources[unit.source], NpzSource)]
    unmatched = (book.unmatched(in_files) if book else []) + (roll.unmatched(units) if roll else [])
    tables = _Tables(book, roll, MaskFolder(site, desk.key))
    decisions = [_decision(desk, unit, tables) for unit in units]
    check_folds([(decision.patient, decision.fold) for decision in decisions], site)
    folds = {decision.fold for decision in decisions if decision.fold} | (roll.folds if roll else set())
    return decisions, unmatched, sorted(folds)


def _decision(desk: _Desk, unit: Unit, tables: _Tables) -> _Decision:
    source, roll, row = desk.site.sources[unit.source], tables.roll, unit.items[0].row
    declared = "" if isinstance(source, DicomSource) else source.modality
    decision = _Decision(unit, unit.patient, modality=declared)
    if roll is not None:
        if not roll.has(unit):
            return replace(decision, elsewhere=True)
        decision = replace(decision, fold=roll.fold(unit), patient=roll.patient(unit) or unit.patient)
    if row is not None:
        decision = replace(decision, fold=decision.fold or row[0])
    if unit.gate is not None:
        return replace(decision, reason=unit.gate, detail=unit.gate_detail)
    try:
        return replace(decision, label=_label(desk.site, unit, tables.book), mask=tables.masks.find(unit))
    except RefusedError as refused:
        return replace(decision, reason=refused.reason, detail=refused.detail)


def _label(site: SiteData, unit: Unit, book: LabelBook | None) -> str | None:
    source, item = site.sources[unit.source], unit.items[0]
    if isinstance(source, NpzSource) and item.row is not None:
        return code_class(npz.row(item.path, *item.row)[1], source.classes)
    return book.label(unit) if book else None


def _stamp(path: Path | None) -> tuple[str, int, int] | None:
    if path is None or not path.is_file():
        return None
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


# Store: load, gate and write what has changed, a batch at a time.


def _store(
    desk: _Desk, known: Mapping[str, UnitRow], decisions: Sequence[_Decision], apart: Sequence[Sighting]
) -> None:
    todo = _changed(desk, known, decisions)
    batch = _Batch(Draft(desk.store), items=[_item_row(s.item, s.unit, s.reason, s.detail) for s in apart])
    for number, decision in enumerate(todo, start=1):
        _settle(desk, decision, batch)
        if number % _BATCH == 0:
            batch = _commit(desk, batch)
        desk.tell(Progress("storing", number, len(todo)))
    _commit(desk, batch)


def _changed(desk: _Desk, known: Mapping[str, UnitRow], decisions: Sequence[_Decision]) -> list[_Decision]:
    files, there = desk.catalog.files_of_units(), present(desk.store)
    inputs = {key: row.inputs for key, row in known.items()}
    return [
        decision
        for decision in decisions
        if decision.inputs != inputs.get(decision.unit.key) or not there.issuperset(files.get(decision.unit.key, ()))
    ]


def _commit(desk: _Desk, batch: _Batch) -> _Batch:
    batch.draft.publish()
    desk.catalog.record(batch.units, batch.items, batch.cases)
    return _Batch(batch.draft)


def _settle(desk: _Desk, decision: _Decision, batch: _Batch) -> None:
    """Bring one unit to its end: a case or a reason."""
    unit = decision.unit
    case, reason, detail = _outcome(desk, decision, batch.draft)
    batch.units.append(_unit_row(decision, reason, detail))
    batch.items += [_item_row(item, unit.key, None, "") for item in unit.items]
    if case is not None:
        batch.cases.append(case)
    for item in unit.items:
        desk.reader.drop(item)


def _outcome(desk: _Desk, decision: _Decision, draft: Draft) -> tuple[CaseRow | None, Reason | None, str]:
    if decision.elsewhere or decision.reason is not None:
        return None, decision.reason, decision.detail
    try:
        return _case(desk, decision, draft), None, ""
    except RefusedError as refused:
        return None, refused.reason, refused.detail


def _case(desk: _Desk, decision: _Decision, draft: Draft) -> CaseRow:
    unit = decision.unit
    loaded = _load(desk, unit)
    volume = loaded.volume
    mask = nifti.read_mask(decision.mask, volume) if decision.mask is not None else None
    name = case_id(desk.key, unit.key)
    return CaseRow(
        id=name,
        unit=unit.key,
        patient=decision.patient,
        u=unit_interval(desk.key, decision.patient),
        fold=decision.fold,
        label=decision.label,
        image=draft.write(f"{VOLUMES}/{name}.nii", nifti.encode(volume)),
        mask=draft.write(f"{MASKS}/{name}.nii", nifti.encode(mask)) if mask else None,
        modality=loaded.modality,
        manufacturer=loaded.manufacturer,
        model=loaded.model,
        shape=json.dumps(volume.array.shape),
        spacing=json.dumps([round(length, 6) for length in volume.spacing]),
        dtype=str(volume.array.dtype),
    )


def _load(desk: _Desk, unit: Unit) -> _Loaded:
    source, item = desk.site.sources[unit.source], unit.items[0]
    if isinstance(source, DicomSource):
        return _load_dicom(desk, unit)
    if item.row is not None:
        return _Loaded(geometry.picture(npz.row(item.path, *item.row)[0]), source.modality)
    return _Loaded(nifti.read_image(item.path, item.size), source.modality)


def _load_dicom(desk: _Desk, unit: Unit) -> _Loaded:
    datasets = [desk.reader.read(item) for item in unit.items]
    first = datasets[0]
    with damage_is(Reason.UNREADABLE, "header"):
        sop_class = dicom.text(first, "SOPClassUID")
        facts = [dicom.text(first, name) for name in ("Modality", "Manufacturer", "ManufacturerModelName")]
    if sop_class in dicom.RADIOGRAPHS:
        volume = geometry.radiograph(first)
    elif sop_class in dicom.MULTI_FRAME:
        volume = geometry.multi_frame_volume(first)
    else:
        volume = geometry.slices_volume(datasets)
    return _Loaded(volume, *facts)


def _unit_row(decision: _Decision, reason: Reason | None, detail: str) -> UnitRow:
    unit = decision.unit
    return UnitRow(
        key=unit.key,
        source=unit.source,
        patient=unit.patient,
        accession=unit.accession,
        study=unit.study,
        series=unit.series,
        file=unit.file,
        gate=unit.gate,
        gate_detail=unit.gate_detail,
        reason=reason,
        detail=detail,
        elsewhere=decision.elsewhere,
        inputs=decision.inputs,
    )


def _item_row(item: Item, unit: str | None, reason: Reason | None, detail: str) -> ItemRow:
    return ItemRow(item.name, item.size, item.mtime_ns, unit, reason, detail)
