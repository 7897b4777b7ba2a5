"""DICOM objects that say something of images (SEG, SR, RTSTRUCT): where they lie, and of which images they speak.

Rules:
  * An object is bound to images by the UIDs that it refers to, never by file names, folders or order; the UIDs are
    keyed, so that it still finds images whose own UIDs were keyed when they were de-identified.
  * Whatever a file holds, it is indexed or listed; a damaged one stops nothing.
  * Of each object only names are held here: its content is read when its image is at hand.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from pydicom.dataset import Dataset
from pydicom.sr._snomed_dict import mapping as snomed

from locum.common.errors import DataError
from locum.site_client.imaging import dicom
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.headers import text
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys, keyed
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.labels.given import Annotation
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.terminology import scheme_of

#: Of a dataset: the sequences in which objects of all kinds list the series that they refer to.
_LISTS = (
    "StudiesContainingOtherReferencedInstancesSequence",
    "CurrentRequestedProcedureEvidenceSequence",
    "PertinentOtherEvidenceSequence",
)


@dataclass(frozen=True, slots=True)
class Found:
    """One object.

    Attributes:
        name: what a person at the site is shown: its file's name.
        size, mtime_ns: by them a change is seen.
        cleaned: whether its UIDs are keyed already.
        sop: SOP Instance UID, keyed.
        reader: keyed name of who made it, 8 characters; empty if it does not say, or no longer does.
        units: keys of the units that it refers to.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    cleaned: bool
    sop: str = ""
    reader: str = ""
    units: frozenset[str] = frozenset()

    def load(self, otherwise: Reason) -> Dataset:
        """Its content; raises RefusedError, with the reason given."""
        try:
            return dicom.read(self.path, self.size)
        except RefusedError as refused:
            raise RefusedError(otherwise, str(refused)) from None

    def uid(self, keys: Keys) -> Callable[[str], str]:
        """How a UID in this object becomes the name by which the site knows it."""
        return str if self.cleaned else keys.uid


class ObjectIndex:
    """The objects of some SOP classes in a folder and among the sources, by the units that they refer to."""

    def __init__(
        self,
        folder: Path | None,
        classes: frozenset[str],
        annotations: Iterable[Annotation],
        keys: Keys,
        *,
        reader: Callable[[Dataset], str],
    ) -> None:
        """Index objects.

        Args:
            folder: with objects at any depth, or None.
            classes: the SOP Class UIDs that are taken.
            annotations: objects among the sources, of any class.
            keys: of the site.
            reader: who made an object, or ''.

        Raises:
            DataError: a folder cannot be read.
        """
        self._classes, self._keys, self._reader = classes, keys, reader
        self._where = folder
        self._damaged: list[str] = []
        self._named: set[str] = set()
        self._asked = False
        objects: dict[str, list[Found]] = {}
        for path, cleaned in (*_annotated(annotations, classes), *(_walked(folder) if folder else ())):
            found = self._look(path, cleaned=cleaned)
            if found is not None and not any(_is_copy(found, other) for other in objects.get(found.sop, ())):
                objects.setdefault(found.sop, []).append(found)
        self._all = [found for sop in sorted(objects) for found in objects[sop]]
        self._by_unit: dict[str, list[Found]] = {}
        for found in self._all:
            for unit in found.units:
                self._by_unit.setdefault(unit, []).append(found)

    def __iter__(self) -> Iterator[Found]:
        return iter(self._all)

    def of(self, unit: Unit) -> tuple[Found, ...]:
        """The objects that refer to a unit, in the order of their SOP Instance UIDs."""
        self._asked = True
        objects = tuple(self._by_unit.get(unit.key, ()))
        self._named.update(found.sop for found in objects)
        return objects

    def stamp(self, unit: Unit, setting: str) -> str | None:
        """By what a change of a unit's objects, or of how they are read, is seen; None if it is no DICOM image.

        Raises:
            RefusedError: mask_missing.
        """
        if not unit.known.series:
            return None
        objects = self.of(unit)
        if not objects:
            raise RefusedError(Reason.MASK_MISSING)
        seen = [setting, *(f"{found.sop} {found.size} {found.mtime_ns}" for found in objects)]
        return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]

    def unmatched(self) -> list[str]:
        """The name of every object that refers to none of the units asked for, and of every file that is none."""
        return [*(found.name for found in self._all if found.sop not in self._named), *self._damaged]

    @property
    def missed_all(self) -> bool:
        """Whether there are objects, units were asked for, and not one object refers to a unit."""
        return self._asked and bool(self._all) and not self._named

    def _look(self, path: Path, *, cleaned: bool) -> Found | None:
        name = self._name(path)
        try:
            size, changed = _status(path)
            dataset = dicom.read(path, size)
            self._check(dataset)
            with damage_is(Reason.UNREADABLE, "references"):
                return self._found(dataset, Found(path, name, size, changed, cleaned=cleaned))
        except RefusedError as refused:
            self._damaged.append(f"{name} ({refused.reason})")
            return None

    def _check(self, dataset: Dataset) -> None:
        with damage_is(Reason.UNREADABLE, "header"):
            kind = text(dataset, "SOPClassUID")
        if kind not in self._classes:
            raise RefusedError(Reason.UNSUPPORTED_OBJECT)

    def _found(self, dataset: Dataset, file: Found) -> Found:
        uid = file.uid(self._keys)
        units = frozenset(
            dicom.unit_of(sop_class, Known(series=uid(series)), uid(sop))
            for series, sop_class, sop in references(dataset)
        )
        # What a cleaned object says of its maker is a dummy, the same for all.
        maker = "" if file.cleaned else self._reader(dataset).strip()
        reader = keyed(self._keys.names, "reader", maker).hex()[:8] if maker else ""
        return replace(file, sop=uid(text(dataset, "SOPInstanceUID")), reader=reader, units=units)

    def _name(self, path: Path) -> str:
        inside = self._where is not None and path.is_relative_to(self._where)
        return str(path.relative_to(self._where) if inside and self._where else path.name)


def _is_copy(one: Found, other: Found) -> bool:
    """Whether two files of one SOP Instance UID are one object: the same bytes, or before and after cleaning."""
    if one.cleaned != other.cleaned:
        return True
    try:
        return one.size == other.size and filecmp.cmp(one.path, other.path, shallow=False)
    except OSError:
        return False


def _status(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, 0
    return (status.st_size if path.is_file() else -1), status.st_mtime_ns


def _annotated(annotations: Iterable[Annotation], classes: frozenset[str]) -> Iterator[tuple[Path, bool]]:
    for annotation in annotations:
        if annotation.sop_class in classes:
            yield annotation.path, annotation.cleaned


def _walked(folder: Path) -> Iterator[tuple[Path, bool]]:
    for parent, folders, files in os.walk(folder, onerror=_unreadable_folder):
        folders.sort()
        for file in sorted(files):
            yield Path(parent, file), False


def _unreadable_folder(error: OSError) -> NoReturn:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}", "mend its access rights")


def references(dataset: Dataset) -> Iterator[tuple[str, str, str]]:
    """(series UID, SOP class, SOP Instance UID) of what an object refers to; a series alone without the last two.

    These are the Common Instance Reference module (PS3.3 C.12.2), an SR's evidence (C.17.2) and the Referenced Frame
    of Reference Sequence of an RT Structure Set (C.8.8.5).
    """
    series = list(dataset.get("ReferencedSeriesSequence") or ())
    for name in _LISTS:
        for study in dataset.get(name) or ():
            series += study.get("ReferencedSeriesSequence") or ()
    for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            series += study.get("RTReferencedSeriesSequence") or ()
    for listed in series:
        yield from _instances(listed)


def _instances(series: Dataset) -> Iterator[tuple[str, str, str]]:
    uid = str(series.SeriesInstanceUID)
    yield uid, "", ""
    for name in ("ReferencedInstanceSequence", "ReferencedSOPSequence", "ContourImageSequence"):
        for instance in series.get(name) or ():
            yield uid, str(instance.get("ReferencedSOPClassUID", "")), str(instance.get("ReferencedSOPInstanceUID", ""))


def code_name(item: Dataset) -> str:
    """A coded concept as SCHEME:CODE, as :func:`standard` has it."""
    scheme = str(item.get("CodingSchemeDesignator", "")).strip()
    # Code Value, Long Code Value or URN Code Value (PS3.3 8.1).
    value = item.get("CodeValue") or item.get("LongCodeValue") or item.get("URNCodeValue") or ""
    return standard(f"{scheme}:{str(value).strip()}")


def standard(code: str) -> str:
    """SCHEME:CODE with the scheme's usual name; a code of SNOMED's old style as the SCT it became (PS3.16 annex O)."""
    scheme, colon, value = code.partition(":")
    if scheme in {"SRT", "SNM3", "99SDM"}:
        return f"SCT:{snomed['SRT'][value]}" if value in snomed["SRT"] else f"SRT:{value}"
    return f"{scheme_of(scheme)}:{value}" if colon else code
