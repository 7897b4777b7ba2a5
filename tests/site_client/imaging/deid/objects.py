"""An engine with fixed keys, small data sets to clean, and the files of a folder."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.reasons import RefusedError
from locum.site_client.imaging.sources import Deidentification, DeidOption

KEYS = Keys(bytes(range(32)), bytes(range(32, 64)))
#: Explicit VRs with a length of four bytes.
LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
#: All that do not keep an identifier on purpose.
ALL_OPTIONS = tuple(sorted({*get_args(DeidOption)} - {"retain_uids", "institution_identity"}))


def engine(*options: str) -> Deidentifier:
    return Deidentifier(Deidentification.model_validate({"options": options}), KEYS)


def image(**over: Any) -> Dataset:
    """A small CT image; `over` sets or, with None, removes attributes."""
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, "1.2.826.0.1.3680043.10.7.1"
    made.StudyInstanceUID, made.SeriesInstanceUID = "1.2.826.0.1.3680043.10.7.2", "1.2.826.0.1.3680043.10.7.3"
    made.FrameOfReferenceUID = "1.2.826.0.1.3680043.10.7.4"
    made.PatientID, made.PatientName, made.PatientBirthDate = "MRN-4711-08", "Kowalska^Zofia", "19480905"
    made.PatientSex, made.PatientAge, made.AccessionNumber = "F", "071Y", "ACC20190007"
    made.StudyDate, made.StudyTime, made.AcquisitionDateTime = "20190923", "101112", "20190923101112.5+0200"
    made.ReferringPhysicianName, made.InstitutionName = "Brzezinski^Adam", "St. Elsewhere Hospital"
    made.Modality, made.Manufacturer, made.ManufacturerModelName = "CT", "ACME", "One"
    made.StudyDescription, made.DeviceSerialNumber = "CT thorax of Kowalska", "SN-90210"
    made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.ImagePositionPatient, made.PixelSpacing = [-10.5, 20, 30.25], [0.5, 0.5]
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 2, 3, 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.PixelData = bytes(range(12))
    for name, value in over.items():
        if value is None:
            made.pop(name, None)
        else:
            setattr(made, name, value)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    return made


def saved(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def loaded(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def cleaned(dataset: Dataset, *options: str) -> Dataset:
    """A data set written, read, cleaned, written and read again."""
    return loaded(engine(*options).file(loaded(saved(dataset))))


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every DICOM file below a folder, unpacked."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        try:
            pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        except (InvalidDicomError, EOFError):
            continue
        yield str(path.relative_to(folder)), content


def outcome(call: Callable[[], bytes]) -> bytes | RefusedError:
    """What a call gives, or why it refuses."""
    try:
        return call()
    except RefusedError as error:
        return error


# --- bytes that pydicom would not write


def element(tag: int, vr: bytes, value: bytes, *, implicit: bool = False) -> bytes:
    """One element, little-endian; odd values are padded."""
    value += b" " * (len(value) % 2)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<I", len(value)) + value
    if vr in LONG:
        return head + vr + struct.pack("<HI", 0, len(value)) + value
    return head + vr + struct.pack("<H", len(value)) + value


def level(elements: dict[int, tuple[bytes, bytes]], *, implicit: bool = False) -> bytes:
    """The elements of one level, in order."""
    return b"".join(element(tag, *elements[tag], implicit=implicit) for tag in sorted(elements))


def item(content: bytes) -> bytes:
    """One item of a sequence."""
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def spliced(dataset: Dataset, tag: int, vr: bytes, value: bytes) -> bytes:
    """A file of a data set with one more element, explicit and little-endian, whatever it holds."""
    content = saved(dataset)
    after = next(raw for raw in loaded(content).values() if int(raw.tag) > tag)
    start = after.value_tell - (12 if after.VR.encode() in LONG else 8)
    return content[:start] + element(tag, vr, value) + content[start:]


def with_elements(elements: dict[int, tuple[bytes, bytes]]) -> bytes:
    """A file of these elements and a patient, explicit and little-endian."""
    usual = {
        0x00080016: (b"UI", b"1.2.840.10008.5.1.4.1.1.2"),
        0x00080018: (b"UI", b"1.2.826.0.1.3680043.10.77.1"),
        0x00100010: (b"PN", b"Kowalska^Zofia"),
        0x00100020: (b"LO", b"MRN-4711-08"),
    }
    meta = element(0x00020010, b"UI", b"1.2.840.10008.1.2.1\0")
    length = element(0x00020000, b"UL", struct.pack("<I", len(meta)))
    return b"\0" * 128 + b"DICM" + length + meta + level({**usual, **elements})
