"""What it costs to clean one DICOM file: a CT slice of 512 × 512 pixels with about a hundred elements.

Rules:
  * The floor is what nobody can avoid who changes a header: pydicom reads the file and writes it again, in the same run
    and by turns.
  * Seconds of the processor, medians; the file is in memory, so that the disk is not measured.
  * The cleaned file is checked: an identifier that is left is an error.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Iterator

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from locum.common.errors import RunError
from locum.simulations.benchmarks.rows import Row
from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import Deidentification

_TURNS = 300
_ROOT = "1.2.826.0.1.3680043.10.9"
_TEXTS = [
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "StationName",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "PatientAddress",
    "PatientComments",
    "AdditionalPatientHistory",
    "RequestedProcedureDescription",
    "PerformedProcedureStepDescription",
    "ImageComments",
    "Manufacturer",
    "ManufacturerModelName",
    "SoftwareVersions",
    "ConvolutionKernel",
    "DeviceSerialNumber",
    "FilterType",
    "StudyID",
    "PerformedProcedureStepID",
    "RequestedProcedureID",
]
_NAMES = ["ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "NameOfPhysiciansReadingStudy"]
_NUMBERS = [
    "SliceThickness",
    "KVP",
    "DataCollectionDiameter",
    "SpacingBetweenSlices",
    "ReconstructionDiameter",
    "DistanceSourceToDetector",
    "DistanceSourceToPatient",
    "GantryDetectorTilt",
    "TableHeight",
    "ExposureTime",
    "XRayTubeCurrent",
    "Exposure",
    "GeneratorPower",
    "FocalSpots",
    "SingleCollimationWidth",
    "TotalCollimationWidth",
    "TableSpeed",
    "TableFeedPerRotation",
    "SpiralPitchFactor",
    "CTDIvol",
    "SeriesNumber",
    "AcquisitionNumber",
    "InstanceNumber",
    "SliceLocation",
    "WindowCenter",
    "WindowWidth",
    "RescaleIntercept",
    "RescaleSlope",
]
_CODES = [
    "BodyPartExamined",
    "PatientPosition",
    "ScanOptions",
    "RotationDirection",
    "ExposureModulationType",
    "RescaleType",
]
_MOMENTS = ("Study", "Series", "Acquisition", "Content", "InstanceCreation")


def slice_of_ct() -> bytes:
    """A CT slice as a scanner writes it, with the patient wherever a scanner puts them."""
    image = Dataset()
    image.ImageType, image.SOPClassUID, image.SOPInstanceUID = (
        ["ORIGINAL", "PRIMARY", "AXIAL"],
        CTImageStorage,
        f"{_ROOT}.1",
    )
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = (
        f"{_ROOT}.2",
        f"{_ROOT}.3",
        f"{_ROOT}.4",
    )
    image.PatientName, image.PatientID, image.PatientBirthDate = "Kowalska^Zofia", "MRN-4711-08", "19480905"
    image.PatientSex, image.PatientAge, image.PatientWeight, image.AccessionNumber = "F", "071Y", "70", "ACC20190007"
    image.Modality = "CT"
    for moment in _MOMENTS:
        setattr(image, f"{moment}Date", "20190923")
        setattr(image, f"{moment}Time", "101112.5")
    for number, name in enumerate(_TEXTS):
        setattr(image, name, f"text {number}")
    for name in _NAMES:
        setattr(image, name, "Brzezinski^Adam")
    for number, name in enumerate(_NUMBERS):
        setattr(image, name, float(number + 1) if dictionary_VR(name) == "FD" else str(number + 1))
    for name in _CODES:
        setattr(image, name, "CODE")
    image.ImagePositionPatient, image.ImageOrientationPatient = [-250, -250, 100.5], [1, 0, 0, 0, 1, 0]
    image.ProcedureCodeSequence, image.RequestAttributesSequence = Sequence([_code()]), Sequence([Dataset()])
    image.ReferencedImageSequence = Sequence([_reference(number) for number in range(3)])
    image.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", bytes(2000))
    _with_pixels(image)
    buffer = io.BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _code() -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "39607008", "SCT", "Lung"
    return code


def _reference(number: int) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = CTImageStorage, f"{_ROOT}.5.{number}"
    return reference


def _with_pixels(image: Dataset) -> None:
    image.Rows, image.Columns, image.SamplesPerPixel, image.PhotometricInterpretation = 512, 512, 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    image.PixelSpacing = [0.7, 0.7]
    image.PixelData = np.random.default_rng(1).integers(0, 4096, (512, 512)).astype(np.uint16).tobytes()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def measure(turns: int = _TURNS) -> Iterator[Row]:
    """Measures `turns` files; raises RunError if an identifier is left in one."""
    content = slice_of_ct()
    engine = Deidentifier(Deidentification(), Keys.of(bytes(32)))
    _check(engine.file(_read(content)))
    floors, wholes, alones = zip(*(_turn(engine, content) for _ in range(turns)), strict=True)
    floor, whole = statistics.median(floors), statistics.median(wholes)
    yield Row("elements of the file, nested ones too", sum(1 for _ in _read(content).iterall()), "")
    yield Row("a file read, cleaned, searched and written, of a processor", whole * 1e3, "ms")
    yield Row("the same without the reading", statistics.median(alones) * 1e3, "ms")
    yield Row("floor: pydicom reads it and writes it again", floor * 1e3, "ms")
    yield Row("file / floor", whole / floor, "×")


def _turn(engine: Deidentifier, content: bytes) -> tuple[float, float, float]:
    """Seconds of the processor: the floor, a file from bytes to bytes, and without the reading."""
    start = time.process_time()
    _read(content).save_as(io.BytesIO())
    written = time.process_time()
    engine.file(_read(content))
    whole = time.process_time()
    dataset = _read(content)
    read = time.process_time()
    engine.file(dataset)
    return written - start, whole - written, time.process_time() - read


def _read(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content))


def _check(cleaned: bytes) -> None:
    left = [
        secret for secret in (b"Kowalska", b"MRN-4711", b"19480905", b"Brzezinski", b"ACC2019") if secret in cleaned
    ]
    if left:
        raise RunError("an identifier is left in a cleaned file", "do not use this version")
