"""Scans: a volume as the DICOM files that a hospital's scanner would have written.

Rules:
  * Files are complete DICOM Part 10 objects (PS3.10), explicit VR little endian, of the CT, MR, CR or DX IOD.
  * Every UID is made from a text by hashing (2.25.…, PS3.5 B.2): the same seed writes the same bytes.
  * A series is encoded by pydicom once; the four elements that change from slice to slice have fixed widths
    in it and are filled in per slice. It is several times faster, and a test reads every file back.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from locum.simulations.phantoms import Array, Grid, vector

if TYPE_CHECKING:
    from collections.abc import Iterator

Pixels = NDArray[np.int16] | NDArray[np.uint16]

_SOP_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
}
#: PS3.5 B.2: a UUID as a decimal; 39 digits, so that every UID has one width.
_UID_LOW, _UID_RANGE = 10**38, 2**128 - 10**38

# Valid values of the right width that occur nowhere else; one per element that changes from slice to slice.
_INSTANCE = "2.25.999999999999999999999999999999999999999"
_NUMBER = "2012345678"
_POSITION = ("1111111111111111", "2222222222222222", "3333333333333333")
_LOCATION = "4444444444444444"


def uid(text: str) -> str:
    """A UID that depends on `text` and on nothing else, always 44 characters."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    return f"2.25.{_UID_LOW + number % _UID_RANGE}"


@dataclass(frozen=True)
class Vendor:
    """A make of scanner and its habits.

    Attributes:
        manufacturer: as it writes (0008,0070).
        model: as it writes (0008,1090).
        software: as it writes (0018,1020).
        kernels: its names for a smooth, a standard and a sharp reconstruction.
        creator: private creator of its block (PS3.5 7.8.1).
        group: odd group number of that block.
        elements: the block's elements: (offset, VR, value).
    """

    manufacturer: str
    model: str
    software: str
    kernels: tuple[str, str, str]
    creator: str
    group: int
    elements: tuple[tuple[int, str, str | int | float | bytes], ...]


VENDORS = {
    "siemens": Vendor(
        "SIEMENS",
        "SOMATOM Definition AS+",
        "syngo CT VA48A",
        ("B20f", "B40f", "B70f"),
        "SIEMENS CSA HEADER",
        0x0029,
        ((0x08, "CS", "SOM 7"), (0x09, "LO", "VA48A simulated")),
    ),
    "ge": Vendor(
        "GE MEDICAL SYSTEMS",
        "Discovery CT750 HD",
        "gmp_hde.155",
        ("SOFT", "STANDARD", "BONE"),
        "GEMS_PARM_01",
        0x0043,
        ((0x10, "US", 400), (0x1F, "SL", 0), (0x25, "SS", 12)),
    ),
    "philips": Vendor(
        "Philips",
        "Ingenuity Core 128",
        "4.1.7",
        ("A", "B", "YC"),
        "Philips Imaging DD 001",
        0x2001,
        ((0x01, "FL", 0.0), (0x03, "FL", 1.25), (0x0B, "CS", "TRANSVERSAL")),
    ),
    "canon": Vendor(
        "CANON_MEC",
        "Aquilion ONE",
        "V10.02ER001",
        ("FC08", "FC18", "FC52"),
        "TOSHIBA_MEC_CT3",
        0x7005,
        ((0x00, "OB", b"simulated "), (0x0B, "SH", "AIDR 3D")),
    ),
}


@dataclass(frozen=True)
class Storage:
    """How measured values become stored pixels: value = stored x slope + intercept (PS3.3 C.11.1).

    Attributes:
        bits: BitsStored, 12 to 16 of 16 allocated.
        signed: PixelRepresentation.
        slope: RescaleSlope; written for CT only.
        intercept: RescaleIntercept; written for CT only.
        inverted: MONOCHROME1: the largest stored value is black.
    """

    bits: int = 12
    signed: bool = False
    slope: float = 1.0
    intercept: float = -1024.0
    inverted: bool = False

    def limits(self) -> tuple[int, int]:
        """Least and largest stored value."""
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    def stored(self, volume: Array) -> Pixels:
        """The pixels of a volume, clipped to what the bits can hold."""
        low, high = self.limits()
        pixels = np.clip(np.rint((volume - self.intercept) / self.slope), low, high)
        if self.inverted:
            pixels = low + high - pixels
        stored: Pixels = pixels.astype("<i2") if self.signed else pixels.astype("<u2")
        return stored


class Patient(NamedTuple):
    """Who was scanned: all of it invented."""

    id: str
    name: str
    born: str
    sex: str


class Study(NamedTuple):
    """One examination of one patient, with one series.

    Attributes:
        key: text that all its UIDs are made from.
        patient: who.
        accession: AccessionNumber.
        date: YYYYMMDD.
    """

    key: str
    patient: Patient
    accession: str
    date: str

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID."""
        return uid(f"series {self.key}")


class Protocol(NamedTuple):
    """What all series of one hospital share.

    Attributes:
        modality: CT, MR, CR or DX.
        vendor: the scanner's make.
        storage: how pixels are stored.
        charset: SpecificCharacterSet, empty for ASCII.
        institution: InstitutionName.
        kernel: index into the vendor's kernels.
        feet_first: instances are numbered against the slice direction.
    """

    modality: str
    vendor: Vendor
    storage: Storage
    charset: str
    institution: str
    kernel: int = 1
    feet_first: bool = False


class Instance(NamedTuple):
    """One file of a series.

    Attributes:
        uid: SOPInstanceUID.
        number: InstanceNumber, from 1.
        data: the whole file.
    """

    uid: str
    number: int
    data: bytes


def series(study: Study, volume: Array, grid: Grid, protocol: Protocol) -> list[Instance]:
    """The files of a study's series, one a slice, by instance number.

    Args:
        study: whose and when.
        volume: measured values, (slices, rows, columns).
        grid: where the voxels lie.
        protocol: the hospital's.
    """
    header = _header(study, grid, protocol)
    numbers = range(len(volume), 0, -1) if protocol.feet_first else range(1, len(volume) + 1)
    places = [_place(study.key, number, grid, index) for index, number in enumerate(numbers)]
    return sorted(_encode(header, places, protocol.storage.stored(volume)), key=lambda made: made.number)


def repeated(instance: Instance, study: Study, number: int) -> Instance:
    """The same picture at the same position under a new UID and number, as a faulty export repeats it."""
    new = uid(f"repeated {study.key} {number}")
    old_number, new_number = (f"{value:<10}".encode() for value in (instance.number, number))
    marker = b"\x20\x00\x13\x00IS\x0a\x00"
    data = instance.data.replace(instance.uid.encode(), new.encode())
    return Instance(new, number, data.replace(marker + old_number, marker + new_number, 1))


def localizer(study: Study, volume: Array, grid: Grid, protocol: Protocol) -> Instance:
    """A scout across all slices that carries the series' own UID (some scanners do so)."""
    number = len(volume) + 1
    scout = Grid(
        shape=(1, *grid.shape[1:]),
        spacing=grid.spacing,
        row=grid.row,
        column=vector(grid.normal),
        centre=grid.centre,
    )
    header = _header(study, scout, protocol)
    header.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    pixels = protocol.storage.stored(volume.mean(axis=0, keepdims=True))
    return next(_encode(header, [_place(study.key, number, scout, 0)], pixels))


class _Place(NamedTuple):
    """What tells one slice of a series from the next."""

    uid: str
    number: int
    position: tuple[float, ...]
    location: float


def _place(key: str, number: int, grid: Grid, index: int) -> _Place:
    position = grid.origin + grid.steps[:, 0] * index
    return _Place(uid(f"instance {key} {number}"), number, tuple(position.tolist()), float(position @ grid.normal))


def _encode(header: Dataset, places: list[_Place], pixels: Pixels) -> Iterator[Instance]:
    """One file a slice, in the order of `pixels`, from one encoded header."""
    template = _template(header, pixels[0].nbytes)
    for place, picture in zip(places, pixels, strict=True):
        start = template.replace(_INSTANCE.encode(), place.uid.encode())
        start = start.replace(_NUMBER.encode(), f"{place.number:<10}".encode())
        for mark, value in zip((*_POSITION, _LOCATION), (*place.position, place.location), strict=True):
            start = start.replace(mark.encode(), f"{value + 0.0:<16.6f}".encode())
        yield Instance(place.uid, place.number, start + picture.tobytes())


def _template(header: Dataset, size: int) -> bytes:
    """The encoded file up to its pixels, with marks where slices differ."""
    header.SOPInstanceUID = _INSTANCE
    header.InstanceNumber = _NUMBER
    if "ImageOrientationPatient" in header:
        header.ImagePositionPatient = list(_POSITION)
        header.SliceLocation = _LOCATION
    header.add_new("PixelData", "OW", bytes(size))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = header.SOPClassUID
    meta.MediaStorageSOPInstanceUID = _INSTANCE
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta = meta
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()[:-size]


def _header(study: Study, grid: Grid, protocol: Protocol) -> Dataset:
    """Everything of a series that its slices share."""
    header = Dataset()
    if protocol.charset:
        header.SpecificCharacterSet = protocol.charset
    header.SOPClassUID = _SOP_CLASSES[protocol.modality]
    header.ImageType = ["ORIGINAL", "PRIMARY"] + (["AXIAL"] if protocol.modality == "CT" else [])
    _add_study(header, study)
    _add_equipment(header, protocol)
    _add_acquisition(header, protocol)
    _add_plane(header, grid, projection=protocol.modality in {"CR", "DX"})
    _add_pixels(header, grid, protocol)
    return header


def _add_study(header: Dataset, study: Study) -> None:
    """Patient, General Study and General Series modules (PS3.3 C.7.1 to C.7.3)."""
    header.PatientName, header.PatientID = study.patient.name, study.patient.id
    header.PatientBirthDate, header.PatientSex = study.patient.born, study.patient.sex
    header.StudyInstanceUID, header.SeriesInstanceUID = uid(f"study {study.key}"), study.series_uid
    header.FrameOfReferenceUID = uid(f"frame {study.key}")
    header.PositionReferenceIndicator = ""
    header.StudyID, header.SeriesNumber = "1", "2"
    header.AccessionNumber = study.accession
    header.StudyDate = header.SeriesDate = header.AcquisitionDate = header.ContentDate = study.date
    header.StudyTime = header.SeriesTime = header.AcquisitionTime = header.ContentTime = "101500"
    header.ReferringPhysicianName = ""
    header.PatientPosition = "HFS"


def _add_equipment(header: Dataset, protocol: Protocol) -> None:
    """General Equipment module (PS3.3 C.7.5.1) and the vendor's private block."""
    vendor = protocol.vendor
    header.Modality = protocol.modality
    header.Manufacturer, header.ManufacturerModelName = vendor.manufacturer, vendor.model
    header.SoftwareVersions, header.InstitutionName = vendor.software, protocol.institution
    header.StationName = "SIMULATED"
    block = header.private_block(vendor.group, vendor.creator, create=True)
    for offset, vr, value in vendor.elements:
        block.add_new(offset, vr, value)


def _add_acquisition(header: Dataset, protocol: Protocol) -> None:
    """What the modality's own module asks for (PS3.3 C.8.2.1, C.8.3.1, C.8.11)."""
    kernel = protocol.vendor.kernels[protocol.kernel]
    match protocol.modality:
        case "CT":
            header.KVP, header.XRayTubeCurrent, header.ConvolutionKernel = "120", "210", kernel
            header.AcquisitionNumber = "1"
        case "MR":
            header.ScanningSequence, header.SequenceVariant, header.ScanOptions = "SE", "SK", ""
            header.MRAcquisitionType, header.EchoTime, header.RepetitionTime = "2D", "85", "4200"
            header.EchoTrainLength, header.MagneticFieldStrength = "15", "1.5"
        case _:
            header.KVP, header.BodyPartExamined, header.ViewPosition = "110", "CHEST", "PA"
            header.BurnedInAnnotation, header.PatientOrientation = "NO", ["L", "F"]
    if protocol.modality == "DX":
        header.PresentationIntentType, header.PresentationLUTShape = (
            "FOR PRESENTATION",
            "INVERSE" if protocol.storage.inverted else "IDENTITY",
        )
        header.PixelIntensityRelationship, header.PixelIntensityRelationshipSign = "LOG", -1
        header.ImageLaterality, header.LossyImageCompression = "U", "00"


def _add_plane(header: Dataset, grid: Grid, *, projection: bool) -> None:
    """Image Plane module (PS3.3 C.7.6.2), or the detector's spacing of a projection."""
    _, row, column = grid.spacing
    if projection:
        header.ImagerPixelSpacing = [_decimal(row), _decimal(column)]
        return
    header.PixelSpacing = [_decimal(row), _decimal(column)]
    header.SliceThickness = header.SpacingBetweenSlices = _decimal(grid.spacing[0])
    header.ImageOrientationPatient = [_decimal(value) for value in (*grid.row, *grid.column)]


def _add_pixels(header: Dataset, grid: Grid, protocol: Protocol) -> None:
    """Image Pixel, Modality LUT and VOI LUT modules (PS3.3 C.7.6.3, C.11.1, C.11.2)."""
    storage = protocol.storage
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME1" if storage.inverted else "MONOCHROME2"
    header.Rows, header.Columns = grid.shape[1:]
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, storage.bits, storage.bits - 1
    header.PixelRepresentation = int(storage.signed)
    if protocol.modality in {"CT", "DX"}:
        header.RescaleIntercept, header.RescaleSlope = _decimal(storage.intercept), _decimal(storage.slope)
        header.RescaleType = "HU" if protocol.modality == "CT" else "US"
    if protocol.modality == "CT":
        header.WindowCenter, header.WindowWidth = "40", "400"


def _decimal(value: float) -> str:
    """A decimal string (VR DS, at most 16 characters)."""
    return f"{value + 0.0:.10f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))
