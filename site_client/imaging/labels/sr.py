"""Labels in structured reports (SR) of template TID 1500, Measurement Report (PS3.16), read by highdicom.

Rules:
  * The label is the coded value of one concept: the Finding of a measurement group unless the site names another, such
    as the name of a qualitative evaluation.
  * A measurement group speaks of the images that it names; one that names none, and an evaluation of the report as a
    whole, of all images of the report's evidence.
  * Reports and groups that agree on an image are one label; those that do not are refused, or their readers' majority
    decides if the site says so.
  * A finding that the report itself calls absent is no label, and no other class either: it is refused.
  * Codes of SNOMED's old style (SRT) are read as the SNOMED CT codes that they became.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    RealWorldValueMappingStorage,
)

from locum.common.errors import DataError
from locum.site_client.imaging import dicom
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.dicom import ANNOTATIONS
from locum.site_client.imaging.headers import text
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.labels.given import Annotation, Label
from locum.site_client.imaging.labels.objects import (
    Found,
    ObjectIndex,
    code_name,
    references,
    standard,
)
from locum.site_client.imaging.labels.readers import by_reader, majority
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import SrLabels
from locum.site_client.imaging.terminology import Terminology, labelled

_KINDS: Mapping[str, Any] = {
    str(EnhancedSRStorage): sr.EnhancedSR,
    str(ComprehensiveSRStorage): sr.ComprehensiveSR,
    str(Comprehensive3DSRStorage): sr.Comprehensive3DSR,
}
CLASSES = frozenset(_KINDS)

_MEASUREMENT_REPORT = "DCM:126000"
_MEASUREMENT_GROUP = "DCM:125007"
_SOURCE_SERIES = "DCM:121232"
_OBSERVER_NAME = "DCM:121008"

#: Objects that a report may list as evidence besides images.
_NO_IMAGES = ANNOTATIONS | {str(RealWorldValueMappingStorage)}

#: SNOMED CT qualifiers of a finding that is not, or hardly, there: absent, known absent, improbable, certainly not.
_NOT_THERE = frozenset({"SCT:2667000", "SCT:410516002", "SCT:410593006", "SCT:410594000"})
_EMPTIED = "de-identification removed the content of its reports: option clean_structured_content"

#: An image, of whatever kind, by series UID, SOP class and SOP Instance UID.
_Image = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class _Said:
    """What one report says of one image: a code, or that what it means is not there."""

    reader: str
    code: str
    denied: bool


@dataclass(frozen=True)
class _Finding:
    """One value of the concept in a report.

    Attributes:
        denied: whether the report says that it is not there.
        images: SOP Instance UIDs, or series UIDs, that its measurement group names.
    """

    code: str
    denied: bool
    images: frozenset[str]


class SrBook:
    """The labels of a site in structured reports."""

    def __init__(
        self, labels: SrLabels, keys: Keys, annotations: Iterable[Annotation], terms: Terminology | None = None
    ) -> None:
        self._labels = labels
        self._terms = terms
        self._concept = standard(labels.concept)
        self._classes = {standard(code): name for code, name in labels.classes.items()} if labels.classes else None
        self._index = ObjectIndex(labels.path, CLASSES, annotations, keys, reader=_observer)
        self._silent: list[str] = []
        self._emptied: set[str] = set()
        self._said: dict[str, list[_Said]] = {}
        for found in self._index:
            self._read(found, keys)

    def label(self, unit: Unit) -> Label:
        """As :meth:`LabelSource.label`; also raises RefusedError (uncertain_label)."""
        said = self._of(unit)
        labels = {each.code: labelled(each.code, self._classes, self._terms) for each in said}
        names = {label.name for label in labels.values()}
        name = self._agreed(self.readings(unit)) if self._labels.consensus else _only(names)
        codes = {code: {code, *label.codes} for code, label in labels.items() if label.name == name}
        return Label(name, tuple(sorted(set().union(*codes.values()))))

    def readings(self, unit: Unit) -> dict[str, str]:
        """The class that each reader gave a unit; raises as :meth:`label`."""
        said = self._of(unit)
        return by_reader((each.reader, labelled(each.code, self._classes, self._terms).name) for each in said)

    def unmatched(self) -> list[str]:
        """The name of every report that speaks of none of the units asked for, or says nothing of the concept.

        Raises:
            DataError: there are reports, units were asked for, and no report speaks of a unit.
        """
        if self._index.missed_all:
            where = self._labels.path or "the sources"
            raise DataError(
                f"no structured report of {where} refers to an image of this site",
                "check that the reports and the images come from one archive",
            )
        return [*self._index.unmatched(), *self._silent]

    def _of(self, unit: Unit) -> list[_Said]:
        objects = self._index.of(unit)
        said = self._said.get(unit.key, [])
        if not said:
            emptied = any(found.sop in self._emptied for found in objects)
            raise RefusedError(Reason.NO_LABEL, _EMPTIED if emptied else "")
        if any(each.denied for each in said):
            raise RefusedError(Reason.UNCERTAIN_LABEL, "a report says that a finding is absent or improbable")
        return said

    def _read(self, found: Found, keys: Keys) -> None:
        try:
            dataset = found.load(Reason.UNREADABLE)
            with damage_is(Reason.UNREADABLE, "content"):
                units = _units(_findings(dataset, self._concept), dataset, found.uid(keys))
        except RefusedError as refused:
            self._silent.append(f"{found.name} ({refused.reason})")
            return
        if not units and found.cleaned and not dataset.get("ContentSequence"):
            self._emptied.add(found.sop)
        if not units:
            self._silent.append(f"{found.name} ({Reason.NO_LABEL})")
        for unit, code, denied in units:
            self._said.setdefault(unit, []).append(_Said(found.reader or found.sop, code, denied))

    def _agreed(self, readings: Mapping[str, str]) -> str:
        name = majority(list(readings.values()))
        if name is None:
            raise RefusedError(Reason.UNCERTAIN_LABEL, ", ".join(sorted(set(readings.values()))))
        return name


def _only(names: set[str]) -> str:
    if len(names) > 1:
        raise RefusedError(Reason.CONFLICTING_LABELS, ", ".join(sorted(names)))
    return next(iter(names))


def _findings(dataset: Dataset, concept: str) -> list[_Finding]:
    """Each value of a concept.

    Raises:
        RefusedError: unsupported_object, if it is no Measurement Report.
    """
    document = _KINDS[text(dataset, "SOPClassUID")].from_dataset(dataset, copy=False)
    root = document.content[0]
    if _name(root) != _MEASUREMENT_REPORT:
        raise RefusedError(Reason.UNSUPPORTED_OBJECT, "a report of another template than TID 1500")
    return list(_coded(root, concept, frozenset()))


def _coded(item: Dataset, concept: str, images: frozenset[str]) -> Iterator[_Finding]:
    for child in item.get("ContentSequence") or ():
        if child.ValueType == "CODE" and _name(child) == concept:
            yield _Finding(code_name(child.ConceptCodeSequence[0]), _is_denied(child), images)
        if child.ValueType == "CONTAINER":
            group = _name(child) == _MEASUREMENT_GROUP
            yield from _coded(child, concept, frozenset(_named_in(child)) if group else images)


def _is_denied(finding: Dataset) -> bool:
    values = (child.get("ConceptCodeSequence") for child in finding.get("ContentSequence") or ())
    return any(code_name(value[0]) in _NOT_THERE for value in values if value)


def _named_in(item: Dataset) -> Iterator[str]:
    """The SOP Instance UIDs of images, and the series UIDs, that are named below an item."""
    for child in item.get("ContentSequence") or ():
        if child.ValueType == "IMAGE":
            yield str(child.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
        if child.ValueType == "UIDREF" and _name(child) == _SOURCE_SERIES:
            yield str(child.UID)
        yield from _named_in(child)


def _units(findings: Iterable[_Finding], dataset: Dataset, uid: Callable[[str], str]) -> set[tuple[str, str, bool]]:
    """(key of a unit, code, whether it is denied) of all findings."""
    evidence: list[_Image] = [image for image in references(dataset) if image[1] not in _NO_IMAGES]
    found: set[tuple[str, str, bool]] = set()
    for finding in findings:
        names = finding.images
        named = [image for image in evidence if image[2] in names or (not image[2] and image[0] in names)]
        for series, sop_class, sop in named or evidence:
            unit = dicom.unit_of(sop_class, Known(series=uid(series)), uid(sop))
            found.add((unit, finding.code, finding.denied))
    return found


def _name(item: Dataset) -> str:
    concept = item.get("ConceptNameCodeSequence")
    return code_name(concept[0]) if concept else ""


def _observer(dataset: Dataset) -> str:
    """Person Observer Name (TID 1003) of a report, or the first of those who verified it."""
    for item in dataset.get("ContentSequence") or ():
        if _name(item) == _OBSERVER_NAME:
            return str(item.get("PersonName") or item.get("TextValue") or "")
    verified = dataset.get("VerifyingObserverSequence")
    return str(verified[0].get("VerifyingObserverName") or "") if verified else ""
