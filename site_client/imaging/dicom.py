"""Reading DICOM: one file to one dataset, and what its header alone decides (PS3.3, PS3.10).

Rules:
  * Whatever a file holds, reading it ends in a dataset or in a reason; it never raises anything else.
  * What is no image of the volume (report, localizer, screen save) leaves its series; what is wrong with an
    image of the volume (no pixels, no patient, burned-in text) spoils the whole series, because a series
    without that slice would be another volume.
  * Sizes are checked before anything is unpacked.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.tag import Tag
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EncapsulatedCDAStorage,
    EncapsulatedMTLStorage,
    EncapsulatedOBJStorage,
    EncapsulatedPDFStorage,
    EncapsulatedSTLStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    EnhancedSRStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    PositronEmissionTomographyImageStorage,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    XRayAngiographicImageStorage,
    XRayRadiofluoroscopicImageStorage,
)

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.headers import frames, image_type, text, voxels
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.known import NOBODY, Known
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.ultrasound import regions

SLICES = frozenset({CTImageStorage, MRImageStorage, PositronEmissionTomographyImageStorage})
MULTI_FRAME = frozenset(
    {
        EnhancedCTImageStorage,
        EnhancedMRImageStorage,
        EnhancedPETImageStorage,
        LegacyConvertedEnhancedCTImageStorage,
        LegacyConvertedEnhancedMRImageStorage,
        LegacyConvertedEnhancedPETImageStorage,
    }
)
RADIOGRAPHS = frozenset(
    {
        ComputedRadiographyImageStorage,
        DigitalMammographyXRayImageStorageForPresentation,
        DigitalMammographyXRayImageStorageForProcessing,
        DigitalXRayImageStorageForPresentation,
        DigitalXRayImageStorageForProcessing,
        XRayAngiographicImageStorage,
        XRayRadiofluoroscopicImageStorage,
    }
)
#: With the two that they replaced (PS3.6 annex A, retired), which older devices still write.
ULTRASOUND = frozenset(
    {
        UltrasoundImageStorage,
        UltrasoundMultiFrameImageStorage,
        "1.2.840.10008.5.1.4.1.1.6",
        "1.2.840.10008.5.1.4.1.1.3",
    }
)
CAPTURES = frozenset(
    {
        MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        MultiFrameSingleBitSecondaryCaptureImageStorage,
        MultiFrameTrueColorSecondaryCaptureImageStorage,
        SecondaryCaptureImageStorage,
    }
)
#: Images that are no slices of a volume: each is a case of its own.
SINGLE = RADIOGRAPHS | ULTRASOUND | CAPTURES
DOCUMENTS = frozenset(
    {
        EncapsulatedCDAStorage,
        EncapsulatedMTLStorage,
        EncapsulatedOBJStorage,
        EncapsulatedPDFStorage,
        EncapsulatedSTLStorage,
    }
)
#: Label Map Segmentation Storage (PS3.4 B.5, 2024), which pydicom has no name for.
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
#: Objects that say something of images: they are read where labels and masks come from.
ANNOTATIONS = frozenset(
    {
        Comprehensive3DSRStorage,
        ComprehensiveSRStorage,
        EnhancedSRStorage,
        RTStructureSetStorage,
        SegmentationStorage,
        LABEL_MAP,
    }
)

_MAMMOGRAMS = frozenset(
    {DigitalMammographyXRayImageStorageForPresentation, DigitalMammographyXRayImageStorageForProcessing}
)
#: Modalities whose pixels often carry text: there BurnedInAnnotation (0028,0301) must say NO.
_TEXT_IS_LIKELY = frozenset({"US", "SC", "XA", "RF", "CR", "DX", "OT"})
#: What a person who has looked at the picture can overrule; the other reasons stand.
RELEASABLE = frozenset({Reason.BURNED_IN, Reason.DERIVED, Reason.NO_REGIONS, Reason.SECONDARY_CAPTURE})

MAX_FILE = 4 << 30
MAX_UNPACKED = 512 << 20
MAX_VOXELS = 1 << 29
_READ_WHOLE = 1 << 20
_HEAD = 1 << 10
_DEFER = 64 << 10
_PIXEL_DATA = Tag("PixelData")
_DEFLATED = b"1.2.840.10008.1.2.1.99"


@dataclass(frozen=True, slots=True)
class Sighting:
    """What the header of one item says.

    Attributes:
        unit: the series it belongs to (a keyed UID), or None if it belongs to none.
        sop: SOP Instance UID, keyed.
        known: what is kept of its patient and study.
        reason: why it is refused, or None.
        spoils: the refusal holds for the whole unit, not for this item alone.
        multi_frame: it is an enhanced multi-frame object.
        annotation: it is no image but says something of images: SEG, SR or RTSTRUCT.
        file: by what a table may name an image that is no DICOM: the stem of its file, or its row.
    """

    item: Item
    unit: str | None = None
    sop: str = ""
    sop_class: str = ""
    known: Known = NOBODY
    file: str = ""
    reason: Reason | None = None
    detail: str = ""
    spoils: bool = False
    multi_frame: bool = False
    annotation: bool = False


def read(path: Path, size: int) -> Dataset:
    """Read one file; large pixel data stays on disk until it is asked for.

    Raises:
        RefusedError: not_an_image, unreadable or too_large.
    """
    check_size(size)
    with damage_is(Reason.UNREADABLE):
        return _read(path, size)


def check_size(size: int) -> None:
    """Refuse, as unreadable or too_large, a file of which the size alone says so."""
    if size < 0:
        raise RefusedError(Reason.UNREADABLE, "not a regular file, or no permission")
    if size > MAX_FILE:
        raise RefusedError(Reason.TOO_LARGE, f"{size >> 20} MiB")


def _read(path: Path, size: int) -> Dataset:
    try:
        if path.suffix == ".gz":
            return pydicom.dcmread(io.BytesIO(_gunzip(path)))
        whole = size <= _READ_WHOLE
        with path.open("rb", buffering=0) as file:
            head = file.read(size if whole else _HEAD)
        if _DEFLATED in head[:_HEAD]:
            if size > MAX_UNPACKED:
                raise RefusedError(Reason.TOO_LARGE, f"{size >> 20} MiB deflated")
            check_inflated(path.read_bytes(), MAX_UNPACKED)
        if whole:
            return pydicom.dcmread(io.BytesIO(head))
        return pydicom.dcmread(path, defer_size=_DEFER)
    except InvalidDicomError:
        raise RefusedError(Reason.NOT_AN_IMAGE) from None


def _gunzip(path: Path) -> bytes:
    with gzip.open(path) as file:
        head = file.read(132)
        if head[128:] != b"DICM":
            raise RefusedError(Reason.NOT_AN_IMAGE)
        rest = file.read(MAX_UNPACKED + 1)
    if len(rest) > MAX_UNPACKED:
        raise RefusedError(Reason.TOO_LARGE, f"unpacks to more than {MAX_UNPACKED >> 20} MiB")
    return head + rest


def check_inflated(content: bytes, most: int) -> None:
    """Refuse, as too_large, a deflated file that unpacks to more than `most` bytes.

    PS3.5 A.5: all after the file meta information is one deflate stream, which pydicom unpacks unbounded.
    """
    meta_length = struct.unpack_from("<I", content, 140)[0]
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    if len(stream.decompress(content[144 + meta_length :], most + 1)) > most:
        raise RefusedError(Reason.TOO_LARGE, f"unpacks to more than {most >> 20} MiB")


def look(item: Item, dataset: Dataset, known: Known, sop: str, released: Collection[Reason] = ()) -> Sighting:
    """What a header decides; the first reason that holds is the one given.

    Args:
        item: where it was found.
        dataset: its header, original or cleaned.
        known: what is kept of its patient and study.
        sop: its keyed SOP Instance UID.
        released: reasons from which a person at the site has released it; only those of `RELEASABLE` count.

    Raises:
        RefusedError: unreadable.
    """
    with damage_is(Reason.UNREADABLE, "header"):
        return _look(item, dataset, known, sop, released)


def unit_of(sop_class: str, known: Known, sop: str) -> str:
    """The unit that an image belongs to: its series, or for a picture itself."""
    # Several pictures of one series (frontal, lateral) are several images.
    return f"{known.series}/{sop}" if sop_class in SINGLE else known.series


def _look(item: Item, dataset: Dataset, known: Known, sop: str, released: Collection[Reason]) -> Sighting:
    sop_class = text(dataset, "SOPClassUID")
    if not (sop_class and sop and known.series):
        return Sighting(item, reason=Reason.INCOMPLETE_HEADER)
    if sop_class in ANNOTATIONS:
        return Sighting(item, sop=sop, sop_class=sop_class, known=known, annotation=True)
    overruled = _overruled(dataset, released)
    reason = _first(_reasons_to_leave(sop_class, dataset), overruled)
    spoils = None if reason else _first(_reasons_to_spoil(sop_class, dataset), overruled)
    return Sighting(
        item=item,
        unit=unit_of(sop_class, known, sop),
        sop=sop,
        sop_class=sop_class,
        known=known,
        reason=reason or spoils,
        detail=f"SOP class {sop_class}" if reason is Reason.UNSUPPORTED_OBJECT else "",
        spoils=spoils is not None,
        multi_frame=sop_class in MULTI_FRAME,
    )


def _overruled(dataset: Dataset, released: Collection[Reason]) -> frozenset[Reason]:
    overruled = RELEASABLE.intersection(released)
    if overruled and text(dataset, "BurnedInAnnotation").upper() != "YES":
        # Nothing but a suspicion is left of burned-in text, and a person has looked at the picture.
        return overruled | {Reason.BURNED_IN}
    return overruled


def _first(found: Iterable[tuple[Reason, bool]], overruled: Collection[Reason]) -> Reason | None:
    return next((reason for reason, holds in found if holds and reason not in overruled), None)


def _reasons_to_leave(sop_class: str, dataset: Dataset) -> Iterator[tuple[Reason, bool]]:
    """Why an object is no image of its series."""
    kind = image_type(dataset)
    yield Reason.DOCUMENT, sop_class in DOCUMENTS
    yield Reason.UNSUPPORTED_OBJECT, sop_class not in SLICES | MULTI_FRAME | SINGLE
    yield Reason.SECONDARY_CAPTURE, sop_class in CAPTURES
    yield Reason.LOCALIZER, "LOCALIZER" in kind
    derived = kind[:2] == ("DERIVED", "SECONDARY") or any("SCREEN SAVE" in part for part in kind)
    yield Reason.DERIVED, derived


def _reasons_to_spoil(sop_class: str, dataset: Dataset) -> Iterator[tuple[Reason, bool]]:
    """Why an image must not be used, nor the series that would lack it."""
    yield Reason.NO_PATIENT_ID, not text(dataset, "PatientID")
    yield Reason.NO_PIXELS, _PIXEL_DATA not in dataset or voxels(dataset) == 0
    yield Reason.COLOUR, sop_class not in ULTRASOUND | CAPTURES and not _is_grey(dataset)
    yield Reason.MOSAIC, "MOSAIC" in image_type(dataset)
    yield Reason.SEVERAL_VOLUMES, _has_odd_frames(sop_class, dataset)
    yield Reason.TOO_LARGE, voxels(dataset) > MAX_VOXELS
    # Last: these a person may overrule, and should be asked only of what can be used then.
    yield Reason.NO_REGIONS, sop_class in ULTRASOUND and not regions(dataset)
    yield Reason.BURNED_IN, _may_be_burned_in(sop_class, dataset)


def _is_grey(dataset: Dataset) -> bool:
    return text(dataset, "PhotometricInterpretation").startswith("MONOCHROME")


def _may_be_burned_in(sop_class: str, dataset: Dataset) -> bool:
    """As the image says; if it does not say, by its kind (the class, for many captures have no modality)."""
    said = text(dataset, "BurnedInAnnotation").upper()
    likely = sop_class in SINGLE - _MAMMOGRAMS or text(dataset, "Modality") in _TEXT_IS_LIKELY
    return said == "YES" or (said != "NO" and likely)


def _has_odd_frames(sop_class: str, dataset: Dataset) -> bool:
    if sop_class in MULTI_FRAME:
        return "InConcatenationNumber" in dataset
    return frames(dataset) != 1
