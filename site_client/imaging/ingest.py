"""Ingest: from the site's sources to a store of volumes and a catalog of cases.

Rules:
  * found = stored + annotations + quarantined, always: every file ends in a case, as an annotation, or in quarantine
    with one reason.
  * No file can stop an ingest; only a wrong site file, a wrong key, a PACS that does not answer or a disk that cannot
    be written does.
  * What has not changed is not read again; an interrupted ingest continues with what it had not committed.
  * A series is decided whole: by its files, its label, its fold and its mask, whose digest tells a change.
  * What comes after the look at a header sees the cleaned image only.
  * Nothing is held for all studies at once but the site's own tables.

Steps: retrieve → find items → look at what is new → group into units → decide (label, fold, table) → load, clean, gate,
store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydicom.dataset import Dataset

from locum.common.errors import DataError
from locum.site_client.imaging import consent, geometry, nifti, npz
from locum.site_client.imaging.catalog import CaseRow, Counts, Decision, Outcome
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.declared import note
from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.grids import Volume, picture
from locum.site_client.imaging.grouping import Reader, Watch, group, look
from locum.site_client.imaging.headers import text
from locum.site_client.imaging.inventory import Inventory, batches
from locum.site_client.imaging.items import Item, Unit, find_items, tree_of
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.labels.given import Label, LabelSource, MaskSource
from locum.site_client.imaging.labels.opening import label_source, mask_source
from locum.site_client.imaging.labels.reports import ReportBook, keep
from locum.site_client.imaging.labels.tables import Roll, name_of
from locum.site_client.imaging.protocol import Loaded, Protocol, facts_of, placed
from locum.site_client.imaging.quarantine import rejected, released
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import (
    BidsSource,
    DeepLesionSource,
    DicomSource,
    Labels,
    Masks,
    NpzSource,
    PacsSource,
    SiteData,
)
from locum.site_client.imaging.split import Fold
from locum.site_client.imaging.store import DICOM, MASKS, VOLUMES, Draft, exclusive, sweep
from locum.site_client.imaging.terminology import labelled

#: Raised when the same files would have another outcome than before: everything is then done again.
GATE_VERSION = 2

_BATCH = 64
_TREES = (BidsSource, DeepLesionSource)


@dataclass(frozen=True)
class Progress:
    """How far an ingest is: images fetched from a PACS, files looked at, or units decided and stored."""

    stage: Literal["retrieving", "reading", "storing"]
    done: int
    total: int


@dataclass(frozen=True)
class _Desk:
    """What every step needs."""

    site: SiteData
    store: Path
    keys: Keys
    inventory: Inventory
    reader: Reader
    cleaner: Deidentifier
    withdrawn: frozenset[str]
    tell: Callable[[Progress], None]


@dataclass(frozen=True)
class _Tables:
    """What the site knows besides the images."""

    labels: LabelSource | None
    roll: Roll | None
    masks: MaskSource
    shared: Mapping[str, frozenset[str]]  # by the key of labels and of masks: names that several patients have


@dataclass(frozen=True)
class _Decision:
    """All that an outcome depends on besides the content of the image."""

    unit: Unit
    patient: str
    place: float
    setting: str
    fold: Fold | None = None
    label: Label | None = None
    mask: str | None = None
    crop: tuple[int, int, int, int] | None = None
    reason: Reason | None = None
    detail: str = ""
    elsewhere: bool = False

    @cached_property
    def inputs(self) -> str:
        """A digest that changes when anything does that the outcome depends on.

        It is asked for before the mask is read: one that is replaced meanwhile is then taken at the next ingest.
        """
        files = [(item.name, item.size, item.mtime_ns) for item in self.unit.items]
        parts = (GATE_VERSION, self.setting, files, self.unit.known, self.patient, self.fold, self.label, self.mask)
        whole = repr((*parts, self.crop, self.reason, self.detail, self.elsewhere))
        return hashlib.sha256(whole.encode("utf-8", "backslashreplace")).hexdigest()[:32]


@dataclass
class _Batch:
    """Outcomes that are not yet committed."""

    draft: Draft
    outcomes: list[Outcome] = field(default_factory=list)
    cases: list[CaseRow] = field(default_factory=list)
    codes: dict[str, tuple[str, ...]] = field(default_factory=dict)


def ingest(site: SiteData, store: Path, *, keys: Keys, progress: Callable[[Progress], None] | None = None) -> Counts:
    """Bring a store up to date with the site's sources.

    Args:
        site: where the images are, from :func:`locum.site_client.imaging.sources.load_site`.
        store: a folder; it is made if need be.
        keys: the site's secret keys.
        progress: told of every file and unit.

    Returns:
        What became of everything found.

    Raises:
        DataError: the tables do not fit the images, the store is another site's or of another key, or in use; a PACS
            refuses.
        RunError: the store cannot be written, or a PACS does not answer; what was committed stays.
    """
    store = store.absolute()
    with exclusive(store), Inventory.opened(store, site=site.name, keys=keys) as inventory, _quiet():
        withdrawn = consent.withdrawn(site.consent, keys)
        cleaner = Deidentifier(site.deidentification, keys)
        desk = _Desk(site, store, keys, inventory, Reader(), cleaner, withdrawn, progress or _tell_nobody)
        if inventory.withdraw(withdrawn):  # first of all: a PACS that is away must not hold it up
            consent.forget_reports(store)
            sweep(store, inventory.is_file_of)
        _retrieve(desk)
        inventory.expect([f"{source.kind} {GATE_VERSION}" for source in site.sources])
        found, new = inventory.walked(find_items(site, store, keys))
        inventory.begin()
        _look(desk, new)
        _group(desk)
        tables = _tables(desk)
        total = _decide(desk, tables)
        _store(desk, tables, total)
        if isinstance(tables.labels, ReportBook):
            keep(tables.labels, store)
        unmatched = _unmatched(tables) + consent.unmatched(site.consent, keys, inventory.connection)
        folds = sorted({*inventory.stated_folds(), *(tables.roll.folds if tables.roll else ())})
        note(inventory.connection, site)
        if inventory.withdrawn != sorted(withdrawn):
            consent.forget_reports(store)  # they hold pictures
        counts = inventory.finish(found=found, unmatched=unmatched, folds=folds, withdrawn=sorted(withdrawn))
        sweep(store, inventory.is_file_of)
        return counts


def _tell_nobody(progress: Progress) -> None:
    """The progress of an ingest that nobody watches."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's and highdicom's remarks on single files, which quote their content, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom", "nibabel.global", "pynetdicom")]
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


# Retrieve, look and group: only what is new, and what shares a series with it.


def _retrieve(desk: _Desk) -> None:
    """Fetch what the site's PACSs have, and forget what was fetched of patients who have withdrawn."""
    from locum.site_client.imaging.retrieve.spool import forget

    forget(desk.store, desk.withdrawn)
    if not any(isinstance(source, PacsSource) for source in desk.site.sources):
        return
    from locum.site_client.imaging.retrieve.pacs import retrieve

    retrieve(desk.site, desk.store, desk.keys, desk.cleaner, desk.tell)


def _look(desk: _Desk, total: int) -> None:
    watch = Watch(desk.site, desk.reader, desk.keys, desk.inventory.decision)
    done = 0
    for items in batches(desk.inventory.new_items(), _BATCH):
        seen = []
        for item in items:
            seen.append(look(watch, item))
            done += 1
            desk.tell(Progress("reading", done, total))
        desk.inventory.seen(seen)


def _group(desk: _Desk) -> None:
    for units in batches(desk.inventory.stale_units(), _BATCH):
        desk.inventory.grouped([(key, *group(key, sightings, desk.reader)) for key, sightings in units])


# Decide: label, fold, patient and mask of every unit.


def _tables(desk: _Desk) -> _Tables:
    site, keys = desk.site, desk.keys
    annotations = [
        replace(found, cleaned=isinstance(site.sources[source], PacsSource))
        for source, found in desk.inventory.annotations()
    ]
    roll = Roll(site.table, keys) if site.table else None
    keyed: set[str] = {source.key for source in (site.labels, site.masks) if isinstance(source, Labels | Masks)}
    shared = {kind: desk.inventory.of_two_patients(kind) for kind in keyed & {"accession", "study", "series"}}
    return _Tables(label_source(site, keys, annotations), roll, mask_source(site, keys, annotations), shared)


def _decide(desk: _Desk, tables: _Tables) -> int:
    """Find which units have to be stored anew; the number of them.

    Raises:
        DataError: not one line of a table names an image, or a patient is put in two folds.
    """
    inventory = desk.inventory

    def decisions() -> Iterator[tuple[str, str, str | None, bool]]:
        for unit, inputs in inventory.units():
            decision = _decision(desk, unit, tables)
            there = all((desk.store / name).exists() for name in inventory.files_of(unit.key))
            yield unit.key, decision.patient, decision.fold, decision.inputs != inputs or not there

    total = inventory.decided(decisions())
    _unmatched(tables)
    torn = inventory.torn_patient()
    if torn is not None:
        file = desk.site.table.file if desk.site.table else desk.site.name
        raise DataError(
            f"{file}: one patient (pseudonym {torn[0]}) is in the folds {' and '.join(torn[1].split(','))}",
            "put all images of a patient in one fold, or remove fold_column",
        )
    return total


def _unmatched(tables: _Tables) -> list[str]:
    """The lines of all tables, and the files of all masks, that name no image."""
    known = (tables.labels, tables.roll, tables.masks)
    return [line for table in known if table is not None for line in table.unmatched()]


def _decision(desk: _Desk, unit: Unit, tables: _Tables) -> _Decision:
    source, roll, row = desk.site.sources[unit.source], tables.roll, unit.items[0].row
    of_dicom = isinstance(source, DicomSource | PacsSource)
    declared = f"{desk.cleaner.profile} {desk.cleaner.digest}" if of_dicom else getattr(source, "modality", "")
    setting = f"{desk.keys.fingerprint} {declared} {desk.site.defaced} {desk.site.deidentification.keep_dicom}"
    decision = _Decision(unit, unit.known.patient, unit.known.place, setting)
    if roll is not None:
        if not roll.has(unit):
            return replace(decision, elsewhere=True)
        stated = roll.patient(unit)
        if stated is not None:
            decision = replace(decision, patient=desk.keys.patient(stated), place=desk.keys.place(stated))
        decision = replace(decision, fold=roll.fold(unit))
    if row is not None:
        decision = replace(decision, fold=decision.fold or row[0])
    if isinstance(source, _TREES):
        decision = replace(decision, fold=decision.fold or tree_of(source).fold(source, unit.items[0]))
    try:
        found = desk.inventory.decision(unit.key)
        _refuse(desk, unit, decision.patient, found)
        label = _label(desk.site, unit, tables)
        _refuse_shared(unit, tables)
        return replace(decision, label=label, mask=tables.masks.stamp(unit), crop=found.crop if found else None)
    except RefusedError as refused:
        return replace(decision, reason=refused.reason, detail=refused.detail)


def _refuse(desk: _Desk, unit: Unit, patient: str, decided: Decision | None) -> None:
    """Raises RefusedError for a unit that must not be used, whatever its label."""
    if patient in desk.withdrawn or unit.known.patient in desk.withdrawn:
        raise RefusedError(Reason.CONSENT_WITHDRAWN, patient)
    if rejected(decided):
        raise RefusedError(Reason.REJECTED)
    if unit.gate is not None:
        raise RefusedError(unit.gate, unit.gate_detail)


def _refuse_shared(unit: Unit, tables: _Tables) -> None:
    """Raises RefusedError if a label or mask under the unit's name could be another patient's."""
    for kind, names in tables.shared.items():
        if name_of(unit, kind) in names:
            raise RefusedError(Reason.CONFLICTING_LABELS, f"one {kind} of several patients")


def _label(site: SiteData, unit: Unit, tables: _Tables) -> Label | None:
    source, item = site.sources[unit.source], unit.items[0]
    if isinstance(source, NpzSource) and item.row is not None:
        return labelled(npz.row(item.path, *item.row)[1], source.classes, None)
    if isinstance(source, _TREES) and tables.labels is None:
        stated = tree_of(source).label(source, item)
        return None if stated is None else Label(stated)
    return tables.labels.label(unit) if tables.labels else None


# Store: load, gate and write what has changed, a batch at a time.


def _store(desk: _Desk, tables: _Tables, total: int) -> None:
    done = 0
    for units in batches(desk.inventory.changed_units(), _BATCH):
        batch = _Batch(Draft(desk.store))
        for unit in units:
            _settle(desk, _decision(desk, unit, tables), tables.masks, batch)
            done += 1
            desk.tell(Progress("storing", done, total))
        batch.draft.publish()
        desk.inventory.stored(batch.outcomes, batch.cases, batch.codes)


def _settle(desk: _Desk, decision: _Decision, masks: MaskSource, batch: _Batch) -> None:
    """Bring one unit to its end: a case or a reason."""
    case, reason, detail = _outcome(desk, decision, masks, batch.draft)
    unit = decision.unit
    batch.outcomes.append(Outcome(unit.key, reason, detail, decision.elsewhere, decision.inputs))
    if case is not None:
        batch.cases.append(case)
        batch.codes[case.id] = decision.label.codes if decision.label else ()
    for item in unit.items:
        desk.reader.drop(item)


def _outcome(
    desk: _Desk, decision: _Decision, masks: MaskSource, draft: Draft
) -> tuple[CaseRow | None, Reason | None, str]:
    if decision.elsewhere or decision.reason is not None:
        return None, decision.reason, decision.detail
    try:
        return _case(desk, decision, masks, draft), None, ""
    except RefusedError as refused:
        return None, refused.reason, refused.detail


def _case(desk: _Desk, decision: _Decision, masks: MaskSource, draft: Draft) -> CaseRow:
    unit, known = decision.unit, decision.unit.known
    name = desk.keys.case(unit.key)
    loaded = _load(desk, decision)
    _keep_dicom(desk, unit, draft, f"{DICOM}/{name}")
    volume, protocol = loaded.volume, loaded.protocol
    mask = masks.read(unit, volume) if decision.mask is not None else None
    return CaseRow(
        id=name,
        unit=unit.key,
        patient=decision.patient,
        place=decision.place,
        fold=decision.fold,
        label=decision.label.name if decision.label else None,
        image=_written(draft, f"{VOLUMES}/{name}.nii", volume),
        mask=_written(draft, f"{MASKS}/{name}.nii", mask) if mask else None,
        modality=loaded.modality,
        manufacturer=loaded.manufacturer,
        model=loaded.model,
        shape=json.dumps(volume.array.shape),
        spacing=json.dumps([round(length, 6) for length in volume.spacing]),
        dtype=str(volume.array.dtype),
        sop_class=protocol.sop_class,
        body_part=protocol.body_part,
        sex=known.sex,
        age=known.age,
        month=known.month,
        orientation=protocol.orientation,
        slices=protocol.slices,
        profile=desk.cleaner.profile if protocol.sop_class else "",
        defaced=desk.site.defaced,
        parameters=json.dumps(dict(protocol.parameters)),
    )


def _written(draft: Draft, name: str, volume: Volume) -> str:
    header, voxels = nifti.parts_of(volume)
    return draft.write(name, header, voxels.data)


def _load(desk: _Desk, decision: _Decision) -> Loaded:
    unit = decision.unit
    source, item = desk.site.sources[unit.source], unit.items[0]
    if isinstance(source, DicomSource | PacsSource):
        return _load_dicom(desk, decision)
    if isinstance(source, _TREES):
        loaded: Loaded = tree_of(source).load(source, item)
        return loaded
    if item.row is not None:
        volume = picture(npz.row(item.path, *item.row)[0])
    else:
        volume = nifti.read_image(item.path, item.size)
    return Loaded(volume, source.modality, protocol=placed(Protocol(), volume))


def _cleaned(desk: _Desk, item: Item) -> Dataset:
    """A file without identifiers: what a PACS gave has none; a series may be of a folder and of a PACS."""
    dataset = desk.reader.read(item)
    return dataset if isinstance(desk.site.sources[item.source], PacsSource) else desk.cleaner.clean(dataset)


def _load_dicom(desk: _Desk, decision: _Decision) -> Loaded:
    unit = decision.unit
    datasets = [_cleaned(desk, item) for item in unit.items]
    first = datasets[0]
    with damage_is(Reason.UNREADABLE, "header"):
        modality, maker, model = (text(first, name) for name in ("Modality", "Manufacturer", "ManufacturerModelName"))
    volume = geometry.volume_of(datasets, crop=_crop(desk, unit))
    return Loaded(volume, modality, maker, model, facts_of(datasets))


def _crop(desk: _Desk, unit: Unit) -> tuple[int, int, int, int] | None:
    """The box that a person drew, if it was drawn on these files."""
    found = desk.inventory.decision(unit.key)
    if found is None or found.crop is None:
        return None
    # Of a release from a mere rejection no files are noted. Beside a file that was seen the box holds for all.
    seen = not found.reasons or any(released(found, item) for item in unit.items)
    return found.crop if seen else None


def _keep_dicom(desk: _Desk, unit: Unit, draft: Draft, folder: str) -> None:
    """The cleaned files of a case, if the site keeps them; what a PACS gave lies in the store already."""
    draft.clear(folder)
    if not desk.site.deidentification.keep_dicom:
        return
    own = (item for item in unit.items if isinstance(desk.site.sources[item.source], DicomSource))
    for number, item in enumerate(own):
        draft.write(f"{folder}/{number:05}.dcm", desk.cleaner.file(desk.reader.read(item)))
