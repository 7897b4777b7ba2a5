"""From items to units: which files make one series, and what is wrong with a series as a whole.

Rules:
  * DICOM files are grouped by Series Instance UID whatever their names and folders; a radiograph is its own unit.
  * A copy of an image leaves the series; two different images under one SOP Instance UID refuse it.
  * Parsed files are kept in memory up to a budget, so that a small hospital's files are read once and a large
    hospital's do not fill the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from pydicom.dataset import Dataset

from locum.site_client.imaging import dicom
from locum.site_client.imaging.catalog import Decision
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.decoding import decoded
from locum.site_client.imaging.dicom import Sighting
from locum.site_client.imaging.headers import text
from locum.site_client.imaging.items import Item, Unit, stem
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import NOBODY, Known, known_of
from locum.site_client.imaging.quarantine import released
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import DicomSource, NiftiSource, NpzSource, PacsSource, SiteData

_KEPT_BYTES = 128 << 20
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


@dataclass(frozen=True)
class Watch:
    """What looking at an item needs besides the item.

    Attributes:
        keys: names what is found.
        decision: what a person decided on a unit, by its key.
    """

    site: SiteData
    reader: Reader
    keys: Keys
    decision: Callable[[str], Decision | None]


def look(watch: Watch, item: Item) -> Sighting:
    """What one item is; it never raises for what a file holds."""
    source = watch.site.sources[item.source]
    if item.refused is not None:
        return _refused(item)
    if isinstance(source, DicomSource | PacsSource):
        return _look_dicom(watch, item)
    if isinstance(source, NiftiSource):
        return _look_nifti(item, watch.keys)
    if isinstance(source, NpzSource):
        index = str(item.row[1]) if item.row and item.row[0] == "train" else ""
        return Sighting(item, unit=item.name, known=_patient(_row_name(item), watch.keys), file=index)
    return Sighting(item, unit=item.name, known=item.known or NOBODY, file=stem(item.name))


def _row_name(item: Item) -> str:
    return item.name.replace("#", ":").replace("/", ":")


def _patient(name: str, keys: Keys) -> Known:
    """Of an image that says nothing of its patient but a name."""
    return Known(patient=keys.patient(name), place=keys.place(name))


def _refused(item: Item) -> Sighting:
    """What is known without opening it not to be usable, and with it the series that it is of."""
    known = item.known or NOBODY
    reason, detail = item.refused or (None, "")
    return Sighting(item, unit=known.series or None, known=known, reason=reason, detail=detail, spoils=True)


def _look_dicom(watch: Watch, item: Item) -> Sighting:
    try:
        sighting = _seen(watch, item, watch.reader.read(item))
    except RefusedError as refused:
        sighting = Sighting(item, reason=refused.reason, detail=refused.detail)
    if sighting.reason is not None or sighting.annotation:
        watch.reader.drop(item)
    return sighting


def _seen(watch: Watch, item: Item, dataset: Dataset) -> Sighting:
    with damage_is(Reason.UNREADABLE, "header"):
        sop, sop_class = text(dataset, "SOPInstanceUID"), text(dataset, "SOPClassUID")
        # What a PACS gave was cleaned on arrival, and its UIDs are keyed already.
        known = item.known or known_of(dataset, watch.keys)
        sop = sop if item.known else watch.keys.uid(sop)
    decision = watch.decision(dicom.unit_of(sop_class, known, sop))
    return dicom.look(item, dataset, known, sop, released(decision, item))


def _look_nifti(item: Item, keys: Keys) -> Sighting:
    if not item.name.endswith((".nii", ".nii.gz")):
        return Sighting(item, reason=Reason.NOT_AN_IMAGE)
    return Sighting(item, unit=item.name, known=_patient(stem(item.name), keys), file=stem(item.name))


def group(key: str, sightings: Sequence[Sighting], reader: Reader) -> tuple[Unit | None, list[Sighting]]:
    """What was seen of one unit as a whole, and the copies that leave it; None if nothing is left."""
    if not sightings:
        return None, []
    distinct, copies, conflict = _without_copies(sightings, reader)
    first = distinct[0]
    gate, detail = _gate(distinct, conflict=conflict)
    unit = Unit(
        key=key,
        source=first.item.source,
        items=tuple(sighting.item for sighting in distinct),
        known=_known(distinct),
        file=first.file or (stem(first.item.name) if len(distinct) == 1 and first.sop else ""),
        gate=gate,
        gate_detail=detail,
    )
    return unit, copies


def _known(sightings: Sequence[Sighting]) -> Known:
    """What is known of a series; study and accession number only if all its images agree on them."""
    first = sightings[0].known
    study = first.study if all(one.known.study == first.study for one in sightings) else ""
    accession = first.accession if all(one.known.accession == first.accession for one in sightings) else ""
    return replace(first, study=study, accession=accession)


def _gate(sightings: Sequence[Sighting], *, conflict: bool) -> tuple[Reason | None, str]:
    if len({sighting.known.patient for sighting in sightings}) > 1:
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
        elif first.known.patient == sighting.known.patient and _is_same(first.item, sighting.item, reader):
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
            return alike and np.array_equal(decoded(first), decoded(second))
    except RefusedError:
        return False


_IDENTITY = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
    "RescaleIntercept",
    "PhotometricInterpretation",
)
