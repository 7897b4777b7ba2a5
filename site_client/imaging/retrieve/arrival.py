"""One instance as it comes from a PACS: what is kept of it, and under which names.

Rules:
  * What comes is bytes in memory, and what is kept of it is cleaned: nothing of the original is written anywhere.
  * Whatever the bytes are, the end is an arrival with a file or with a reason.
  * An object that nothing at the site can use (a document, a waveform) is counted and not kept.
  * An instance of another series than the one asked for is not what was asked for: it is passed over.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from hashlib import sha256

import pydicom
from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset
from pydicom.uid import (
    EncapsulatedCDAStorage,
    EncapsulatedPDFStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from locum.site_client.imaging import dicom
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.headers import text
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import Known, known_of
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.retrieve.peer import MAX_INSTANCE, Series
from locum.site_client.imaging.retrieve.query import is_outside
from locum.site_client.imaging.sources import Query

#: Captures of screens come too: a person may release one from quarantine.
TAKEN = (
    dicom.SLICES
    | dicom.MULTI_FRAME
    | dicom.SINGLE
    | dicom.ANNOTATIONS
    | {
        MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        MultiFrameSingleBitSecondaryCaptureImageStorage,
        MultiFrameTrueColorSecondaryCaptureImageStorage,
        SecondaryCaptureImageStorage,
        UltrasoundImageStorage,
        UltrasoundMultiFrameImageStorage,
    }
)
_DOCUMENTS = frozenset({EncapsulatedCDAStorage, EncapsulatedPDFStorage})
_DEFLATED = b"1.2.840.10008.1.2.1.99"
#: Where the length of the file meta information stands, and where what it counts begins (PS3.10 7.1).


@dataclass(frozen=True, slots=True)
class Arrival:
    """What is kept of one instance; all names are keyed.

    Attributes:
        sop: keyed SOP Instance UID.
        known: what is known of its patient and study; `series` is empty if the object is no part of its series.
        content: the cleaned file, or None.
        reason: why there is none, with `detail`.
        outside: it is not what the query names, and only itself could say so: counted, and no more.
    """

    sop: str
    known: Known
    content: bytes | None = None
    reason: Reason | None = None
    detail: str = ""
    outside: bool = False


@dataclass(frozen=True)
class Desk:
    """What judging an instance needs besides the instance.

    Attributes:
        withdrawn: the pseudonyms of patients whose images may not be used.
    """

    query: Query
    keys: Keys
    cleaner: Deidentifier
    withdrawn: frozenset[str]

    @property
    def asked(self) -> str:
        """What of the query an image itself is asked for."""
        return repr((self.query.modalities, self.query.body_parts))


def arrived(content: bytes, series: Series, desk: Desk) -> Arrival | None:
    """What is kept of an instance that came when `series` was asked for; None if it is of another series."""
    place = Known(study=desk.keys.uid(series.study), series=desk.keys.uid(series.uid))
    sop, known = "", place
    try:
        with damage_is(Reason.UNREADABLE):
            dataset = parsed(content)
            sop, known = desk.keys.uid(text(dataset, "SOPInstanceUID")), known_of(dataset, desk.keys)
        if not (sop and known.study and known.series):
            return _unnamed(content, place, desk, Reason.INCOMPLETE_HEADER)
        if (known.study, known.series) != (place.study, place.series):
            return None
        return _judged(dataset, sop, known, desk)
    except RefusedError as refused:
        if not sop:
            return _unnamed(content, place, desk, refused.reason, refused.detail)
        return Arrival(sop, known, reason=refused.reason, detail=refused.detail)


def _unnamed(content: bytes, place: Known, desk: Desk, reason: Reason, detail: str = "") -> Arrival:
    """What has no UID that could be read: it is known again by its bytes."""
    return Arrival(desk.keys.uid(f"damaged {sha256(content).hexdigest()}"), place, reason=reason, detail=detail)


def _judged(dataset: Dataset, sop: str, known: Known, desk: Desk) -> Arrival:
    with damage_is(Reason.UNREADABLE):
        sop_class = text(dataset, "SOPClassUID")
        outside = is_outside(desk.query, text(dataset, "Modality"), text(dataset, "BodyPartExamined"))
    if outside:
        return Arrival(sop, Known(study=known.study), detail=desk.asked, outside=True)
    if known.patient in desk.withdrawn:
        return Arrival(sop, Known(patient=known.patient), reason=Reason.CONSENT_WITHDRAWN)
    if sop_class not in TAKEN:
        return unusable(sop, sop_class, known.study)
    with damage_is(Reason.UNREADABLE, "cleaning"):
        return Arrival(sop, known, desk.cleaner.file(dataset))


def is_of_no_use(sop_class: str) -> bool:
    """Whether an object is of a class that nothing at the site reads; a class that is not told may be of use."""
    return bool(sop_class) and sop_class not in TAKEN


def unusable(sop: str, sop_class: str, study: str) -> Arrival:
    """An object of no use, fetched or not; it is no part of its series, so it does not spoil the images beside it."""
    reason = Reason.DOCUMENT if sop_class in _DOCUMENTS else Reason.UNSUPPORTED_OBJECT
    detail = f"SOP class {sop_class}" if sop_class in UID_dictionary else "a SOP class of somebody's own"
    return Arrival(sop, Known(study=study), reason=reason, detail=detail)


def parsed(content: bytes) -> Dataset:
    """A Part 10 file in memory as a dataset; pixel data stays as it is.

    Raises:
        RefusedError: too_large.
        Exception: whatever pydicom raises at damage (see `damage.py`).
    """
    if len(content) > MAX_INSTANCE:
        raise RefusedError(Reason.TOO_LARGE, f"{len(content) >> 20} MiB")
    if _DEFLATED in content[: 1 << 10]:
        dicom.check_inflated(content, MAX_INSTANCE)
    return pydicom.dcmread(io.BytesIO(content))
