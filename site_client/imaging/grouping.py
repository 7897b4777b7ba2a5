"""From items to units: which files make one series, and what is wrong with a series as a whole.

Rules:
  * DICOM files are grouped by Series Instance UID whatever their names and folders; a radiograph is its own unit.
  * A copy of an image leaves the series; two different images under one SOP Instance UID refuse it.
  * Parsed files are kept in memory up to a budget, so that a small hospital's files are read once and a large
    hospital's do not fill the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydicom.dataset import Dataset

from locum.site_client.imaging import dicom
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.dicom import Sighting
from locum.site_client.imaging.items import Item, Unit, stem
from locum.site_client.imaging.keys import pseudonym
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import DicomSource, NiftiSource, SiteData

_KEPT_BYTES = 512 << 20
#: What a parsed header takes in memory besides its values (measured: 20 to 40 KB for 45 elements).
_HEADER_BYTES = 32 << 10


class Reader:
    """Reads DICOM files, and keeps the parsed ones up to a budget until they are taken."""

    def __init__(self, budget: int = _KEPT_BYTES) -> None:
        self._left = budget
        self._kept: dict[str, tuple[Dataset, int]] = {}

    def read(self, item: Item) -> Dataset:
        """The dataset of an item; raises RefusedError."""
        kept = self._kept.get(item.name)
        if kept is not None:
            return kept[0]
        dataset = dicom.read(item.path, item.size)
        cost = _cost(item, dataset)
        if cost <= self._left:
            self._left -= cost
            self._kept[item.name] = dataset, cost
        return dataset

    def drop(self, item: Item) -> None:
        """Forget the dataset of an item."""
        _, cost = self._kept.pop(item.name, (None, 0))
        self._left += cost


def _cost(item: Item, dataset: Dataset) -> int:
    """What a dataset takes in memory: a compressed file is read into a buffer far larger than itself."""
    buffer = getattr(dataset, "buffer", None)
    return (item.size if buffer is None else len(buffer.getvalue())) + _HEADER_BYTES


def look(site: SiteData, item: Item, reader: Reader) -> Sighting:
    """What one item is; it never raises for what a file holds."""
    source = site.sources[item.source]
    if isinstance(source, DicomSource):
        return _look_dicom(item, reader)
    if isinstance(source, NiftiSource):
        return _look_nifti(item)
    index = str(item.row[1]) if item.row and item.row[0] == "train" else ""
    return Sighting(item, unit=item.name, patient=item.name.replace("#", ":").replace("/", ":"), file=index)


def _look_dicom(item: Item, reader: Reader) -> Sighting:
    try:
        sighting = dicom.look(item, reader.read(item))
    except RefusedError as refused:
        sighting = Sighting(item, reason=refused.reason, detail=refused.detail)
    if sighting.reason is not None:
        reader.drop(item)
    return sighting


def _look_nifti(item: Item) -> Sighting:
    if not item.name.endswith((".nii", ".nii.gz")):
        return Sighting(item, reason=Reason.NOT_AN_IMAGE)
    return Sighting(item, unit=item.name, patient=stem(item.name), file=stem(item.name))


@dataclass(frozen=True)
class Grouped:
    """Units, and the items that belong to none of them with their reasons."""

    units: tuple[Unit, ...]
    apart: tuple[Sighting, ...]


def group(sightings: Sequence[Sighting], reader: Reader, key: bytes) -> Grouped:
    """Group what was seen; every sighting is in one unit or apart."""
    apart: list[Sighting] = []
    members: dict[str, list[Sighting]] = {}
    for sighting in sightings:
        if sighting.unit is None or (sighting.reason is not None and not sighting.spoils):
            apart.append(sighting)
        else:
            members.setdefault(sighting.unit, []).append(sighting)
    units = []
    for series in members.values():
        unit, copies = _unit(series, reader, key)
        units.append(unit)
        apart += copies
    return Grouped(tuple(units), tuple(apart))


def _unit(sightings: Sequence[Sighting], reader: Reader, key: bytes) -> tuple[Unit, list[Sighting]]:
    distinct, copies, conflict = _without_copies(sightings, reader)
    first = distinct[0]
    gate, detail = _gate(distinct, conflict=conflict)
    unit = Unit(
        key=first.unit or "",
        source=first.item.source,
        items=tuple(sighting.item for sighting in distinct),
        patient=pseudonym(key, first.patient) if first.patient else "",
        patient_id=first.patient,
        accession=first.accession,
        study=first.study,
        series=first.series,
        file=first.file or (stem(first.item.name) if len(distinct) == 1 and first.sop else ""),
        gate=gate,
        gate_detail=detail,
    )
    return unit, copies


def _gate(sightings: Sequence[Sighting], *, conflict: bool) -> tuple[Reason | None, str]:
    if len({sighting.patient for sighting in sightings}) > 1:
        return Reason.MIXED_PATIENTS, ""
    spoiled = [sighting for sighting in sightings if sighting.reason is not None]
    if spoiled:
        some = f"{len(spoiled)} of {len(sightings)} images"
        return spoiled[0].reason, spoiled[0].detail or (some if len(sightings) > 1 else "")
    if conflict:
        return Reason.CONFLICTING_INSTANCES, ""
    if len(sightings) > 1 and any(sighting.multi_frame for sighting in sightings):
        return Reason.SEVERAL_VOLUMES, f"{len(sightings)} objects"
    return None, ""


def _without_copies(sightings: Sequence[Sighting], reader: Reader) -> tuple[list[Sighting], list[Sighting], bool]:
    """The images of a series without copies, the copies, and whether two under one UID differ."""
    if len({sighting.sop for sighting in sightings}) == len(sightings):
        return list(sightings), [], False
    first_by_sop: dict[str, Sighting] = {}
    distinct, copies, conflict = [], [], False
    for sighting in sightings:
        first = first_by_sop.setdefault(sighting.sop, sighting)
        if first is sighting:
            distinct.append(sighting)
        elif _is_same(first.item, sighting.item, reader):
            copies.append(replace(sighting, reason=Reason.DUPLICATE_INSTANCE, spoils=False))
        else:
            distinct.append(sighting)
            conflict = True
    return distinct, copies, conflict


def _is_same(one: Item, other: Item, reader: Reader) -> bool:
    """Whether two files hold the same picture at the same place, in whatever compression."""
    try:
        with damage_is(Reason.UNREADABLE):
            first, second = reader.read(one), reader.read(other)
            alike = all(first.get(name) == second.get(name) for name in _IDENTITY)
            return alike and np.array_equal(first.pixel_array, second.pixel_array)
    except RefusedError:
        return False


_IDENTITY = (
    "PatientID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
    "RescaleIntercept",
    "PhotometricInterpretation",
)
