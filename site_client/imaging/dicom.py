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
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    LegacyConvertedEnhancedPETImageStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.reasons import Reason, RefusedError

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
    }
)

#: Modalities whose pixels often carry text: there BurnedInAnnotation (0028,0301) must say NO.
_TEXT_IS_LIKELY = frozenset({"US", "SC", "XA", "RF", "CR", "DX", "OT"})

#: The attributes that are read of every file.
_ATTRIBUTES = (
    "AccessionNumber",
    "BitsAllocated",
    "BitsStored",
    "BurnedInAnnotation",
    "Columns",
    "FrameOfReferenceUID",
    "HighBit",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "ImagerPixelSpacing",
    "Manufacturer",
    "ManufacturerModelName",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "SliceThickness",
    "SpacingBetweenSlices",
    "StudyInstanceUID",
)

MAX_FILE = 4 << 30
MAX_UNPACKED = 512 << 20
MAX_VOXELS = 1 << 29
_READ_WHOLE = 1 << 20
_HEAD = 1 << 10
_DEFER = 64 << 10
_TAGS = {name: Tag(name) for name in _ATTRIBUTES}
_PIXEL_DATA = Tag("PixelData")
_DEFLATED = b"1.2.840.10008.1.2.1.99"


@dataclass(frozen=True, slots=True)
class Sighting:
    """What the header of one item says.

    Attributes:
        unit: the series it belongs to, or None if it belongs to none.
        sop: SOP Instance UID.
        patient: Patient ID as in the file; it is replaced by a pseudonym before anything is kept.
        reason: why it is refused, or None.
        spoils: the refusal holds for the whole unit, not for this item alone.
        multi_frame: it is an enhanced multi-frame object.
        file: by what a table may name an image that is no DICOM: the stem of its file, or its row.
    """

    item: Item
    unit: str | None = None
    sop: str = ""
    patient: str = ""
    accession: str = ""
    study: str = ""
    series: str = ""
    file: str = ""
    reason: Reason | None = None
    detail: str = ""
    spoils: bool = False
    multi_frame: bool = False


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
            _check_inflated(path, size)
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


def _check_inflated(path: Path, size: int) -> None:
    """PS3.5 A.5: all after the file meta information is one deflate stream, which pydicom unpacks unbounded."""
    if size > MAX_UNPACKED:
        raise RefusedError(Reason.TOO_LARGE, f"{size >> 20} MiB deflated")
    raw = path.read_bytes()
    meta_length = struct.unpack_from("<I", raw, 140)[0]
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    if len(stream.decompress(raw[144 + meta_length :], MAX_UNPACKED + 1)) > MAX_UNPACKED:
        raise RefusedError(Reason.TOO_LARGE, f"unpacks to more than {MAX_UNPACKED >> 20} MiB")


def look(item: Item, dataset: Dataset) -> Sighting:
    """What a header decides; the first reason that holds is the one given.

    Raises:
        RefusedError: unreadable.
    """
    with damage_is(Reason.UNREADABLE, "header"):
        return _look(item, dataset)


def _look(item: Item, dataset: Dataset) -> Sighting:
    sop_class = text(dataset, "SOPClassUID")
    sop, series = text(dataset, "SOPInstanceUID"), text(dataset, "SeriesInstanceUID")
    if not (sop_class and sop and series):
        return Sighting(item, reason=Reason.INCOMPLETE_HEADER)
    # Several radiographs of one series (frontal, lateral) are several images, not slices of a volume.
    unit = f"{series}/{sop}" if sop_class in RADIOGRAPHS else series
    reason = _leaves_series(sop_class, dataset)
    spoils = None if reason else _spoils_series(sop_class, dataset)
    return Sighting(
        item=item,
        unit=unit,
        sop=sop,
        patient=text(dataset, "PatientID"),
        accession=text(dataset, "AccessionNumber"),
        study=text(dataset, "StudyInstanceUID"),
        series=series,
        reason=reason or spoils,
        detail=f"SOP class {sop_class}" if reason is Reason.UNSUPPORTED_OBJECT else "",
        spoils=spoils is not None,
        multi_frame=sop_class in MULTI_FRAME,
    )


def text(dataset: Dataset, keyword: str) -> str:
    """An attribute as text without blanks at its ends; several values are joined by a backslash; empty if absent."""
    element = dataset.get_item(_TAGS[keyword])
    if element is None:
        return ""
    raw = element.value
    if isinstance(raw, bytes) and raw.isascii() and b"\x1b" not in raw:
        # Most values: a tenth of the time of pydicom's conversion, which the other values need.
        return raw.decode("ascii").strip(" \0")
    value = dataset[_TAGS[keyword]].value
    values = value if isinstance(value, MultiValue) else [value]
    return "\\".join("" if part is None else str(part) for part in values).strip()


def numbers(dataset: Dataset, keyword: str) -> tuple[float, ...]:
    """The numbers of an attribute that holds them as text (DS, IS); none if it is absent or empty.

    Raises:
        ValueError: a value is no number.
    """
    whole = text(dataset, keyword)
    return tuple(float(part) for part in whole.split("\\")) if whole else ()


def count(dataset: Dataset, keyword: str) -> int:
    """The number of an attribute that holds one binary whole number (US); 0 if it is absent."""
    element = dataset.get_item(_TAGS[keyword])
    if element is None:
        return 0
    if isinstance(element.value, bytes):
        return int.from_bytes(element.value, "little" if element.is_little_endian else "big")
    return int(element.value or 0)


def frames(dataset: Dataset) -> int:
    """Number of Frames (0028,0008); 1 if it is absent."""
    return int(*numbers(dataset, "NumberOfFrames") or (1,))


def voxels(dataset: Dataset) -> int:
    """Frames × rows × columns, as the header says."""
    return frames(dataset) * count(dataset, "Rows") * count(dataset, "Columns")


def image_type(dataset: Dataset) -> tuple[str, ...]:
    """Image Type (0008,0008), in capitals."""
    return tuple(part.strip() for part in text(dataset, "ImageType").upper().split("\\"))


def _leaves_series(sop_class: str, dataset: Dataset) -> Reason | None:
    if sop_class not in SLICES | MULTI_FRAME | RADIOGRAPHS:
        return Reason.UNSUPPORTED_OBJECT
    kind = image_type(dataset)
    if "LOCALIZER" in kind:
        return Reason.LOCALIZER
    if kind[:2] == ("DERIVED", "SECONDARY") or any("SCREEN SAVE" in part for part in kind):
        return Reason.DERIVED
    return None


def _spoils_series(sop_class: str, dataset: Dataset) -> Reason | None:
    checks = (
        (Reason.NO_PATIENT_ID, not text(dataset, "PatientID")),
        (Reason.BURNED_IN, _may_be_burned_in(dataset)),
        (Reason.NO_PIXELS, _PIXEL_DATA not in dataset or voxels(dataset) == 0),
        (Reason.COLOUR, not text(dataset, "PhotometricInterpretation").startswith("MONOCHROME")),
        (Reason.MOSAIC, "MOSAIC" in image_type(dataset)),
        (Reason.SEVERAL_VOLUMES, _has_odd_frames(sop_class, dataset)),
        (Reason.TOO_LARGE, voxels(dataset) > MAX_VOXELS),
    )
    return next((reason for reason, holds in checks if holds), None)


def _may_be_burned_in(dataset: Dataset) -> bool:
    said = text(dataset, "BurnedInAnnotation").upper()
    return said == "YES" or (said != "NO" and text(dataset, "Modality") in _TEXT_IS_LIKELY)


def _has_odd_frames(sop_class: str, dataset: Dataset) -> bool:
    if sop_class in MULTI_FRAME:
        return "InConcatenationNumber" in dataset
    return frames(dataset) != 1
