"""A real Orthanc for tests, images with identifiers planted in them, and certificates.

Rules:
  * One that is shared holds the studies of all tests: each loads its own, asks by accession numbers, and removes them.
  * Where Orthanc cannot run, tests are skipped and say why; with LOCUM_NEEDS_ORTHANC set they fail.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from openjpeg.utils import encode_array
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    CTImageStorage,
    EncapsulatedPDFStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
)

from locum.simulations.benchmarks.orthanc import Orthanc, Setting, missing, running

#: What stands in the images of :class:`Study` and must stand nowhere below a store.
PLANTED = ("Quuxberg", "Zebedee", "PID-77", "ACC-", "St. Elsewhere", "19610704", "Dr Foo", "1.2.826.0.1.3680043.10.9")
_ROOT = "1.2.826.0.1.3680043.10.9"
CALLING = "LOCUM"


@dataclass(frozen=True)
class Study:
    """A study of one series, unless `over` says otherwise; `number` makes it unlike any other."""

    number: int
    slices: int = 4
    modality: str = "CT"
    body_part: str = "CHEST"
    day: str = "20240305"
    shape: tuple[int, int] = (16, 12)
    series: int = 1
    first: int = 0
    syntax: UID = ExplicitVRLittleEndian
    over: dict[str, Any] = field(default_factory=dict)

    @property
    def accession(self) -> str:
        return f"ACC-{self.number}"

    @property
    def patient(self) -> str:
        return f"PID-77{self.number}"

    @property
    def uid(self) -> str:
        return f"{_ROOT}.{self.number}"

    @property
    def series_uid(self) -> str:
        return f"{self.uid}.{self.series}"

    def sop(self, index: int) -> str:
        return f"{self.series_uid}.{index + 1}"

    def files(self) -> list[bytes]:
        return [encoded(self.image(index)) for index in range(self.first, self.first + self.slices)]

    def image(self, index: int) -> Dataset:
        image = Dataset()
        image.SpecificCharacterSet = "ISO_IR 192"
        image.SOPClassUID = MRImageStorage if self.modality == "MR" else CTImageStorage
        image.SOPInstanceUID, image.StudyInstanceUID, image.SeriesInstanceUID = (
            self.sop(index),
            self.uid,
            self.series_uid,
        )
        image.FrameOfReferenceUID = f"{self.uid}.99"
        image.Modality, image.BodyPartExamined = self.modality, self.body_part
        image.StudyDate = image.SeriesDate = self.day
        image.PatientID, image.PatientName, image.PatientBirthDate = self.patient, "Quuxberg^Zebedee", "19610704"
        image.PatientSex, image.AccessionNumber = "F", self.accession
        image.InstitutionName, image.ReferringPhysicianName = "St. Elsewhere", "Dr Foo"
        image.Manufacturer, image.ManufacturerModelName = "ACME", "One"
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.InstanceNumber = index + 1
        image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, 2.5 * index], [1, 0, 0, 0, 1, 0]
        image.PixelSpacing, image.SliceThickness = [0.7, 0.7], 2.5
        image.RescaleSlope, image.RescaleIntercept = 1, -1024
        image.Rows, image.Columns = self.shape
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
        image.PixelData = self.plane(index).tobytes()
        inner = Dataset()
        inner.PatientName, inner.StudyInstanceUID = "Quuxberg^Zebedee", self.uid
        image.RequestAttributesSequence = [inner]
        block = image.private_block(0x0009, "ACME PRIVATE", create=True)
        block.add_new(0x01, "LO", f"{self.patient} Quuxberg")
        for name, value in self.over.items():
            setattr(image, name, value)
        _add_meta(image)
        if self.syntax == JPEG2000Lossless:
            image.PixelData = encapsulate([encode_array(self.plane(index), bits_stored=12, codec_format=0)])
            image.file_meta.TransferSyntaxUID = JPEG2000Lossless
        elif self.syntax != ExplicitVRLittleEndian:
            image.compress(self.syntax, generate_instance_uid=False)
        return image

    def plane(self, index: int) -> np.ndarray:
        return np.random.default_rng((self.number, self.series, index)).integers(0, 4096, self.shape).astype(np.uint16)


def document(study: Study, series: int = 8) -> bytes:
    """A PDF in DICOM, in a series of its own."""
    pdf = replace(study, series=series).image(0)
    for keyword in ("PixelData", "Rows", "Columns", "BitsAllocated"):
        delattr(pdf, keyword)
    pdf.SOPClassUID, pdf.Modality, pdf.MIMETypeOfEncapsulatedDocument = EncapsulatedPDFStorage, "DOC", "application/pdf"
    pdf.SOPInstanceUID = f"{pdf.SeriesInstanceUID}.999"
    pdf.EncapsulatedDocument = b"%PDF-1.4 Quuxberg "
    _add_meta(pdf)
    return encoded(pdf)


def encoded(image: Dataset) -> bytes:
    buffer = io.BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _add_meta(image: Dataset) -> None:
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID


# --- PACSs


@dataclass
class Pacs:
    """An Orthanc with what a test has loaded into it.

    Attributes:
        listen: the port to which it moves images.
    """

    orthanc: Orthanc
    listen: int
    loaded: list[str] = field(default_factory=list)

    def load(self, *studies: Study) -> None:
        for study in studies:
            self.orthanc.load(study.files())
            self.loaded.append(study.accession)

    def remove(self, accession: str) -> None:
        query = f'{{"Level": "Study", "Query": {{"AccessionNumber": "{accession}"}}}}'
        for found in self.orthanc.rest("POST", "/tools/find", query.encode()).json():
            self.orthanc.rest("DELETE", f"/studies/{found}").raise_for_status()

    def source(self, way: str, **keys: Any) -> dict[str, Any]:
        """The source of a site file: `dicomweb`, `get` or `move`."""
        if way == "dicomweb":
            return {"kind": "dicomweb", "url": self.orthanc.url, "rate": 100_000, **keys}
        moving = {"fetch": "move", "listen": self.listen} if way == "move" else {}
        place = {"host": "127.0.0.1", "port": self.orthanc.dimse, "title": "ORTHANC", "calling": CALLING}
        return {"kind": "dimse", **place, **moving, "rate": 100_000, **keys}


Start = Callable[[Setting], AbstractContextManager[Orthanc]]


@pytest.fixture(scope="session")
def start_orthanc() -> Start:
    """Starts an Orthanc; skips where none can run."""
    if reason := missing():
        if os.environ.get("LOCUM_NEEDS_ORTHANC"):
            pytest.fail(reason)
        pytest.skip(reason)
    return running


@pytest.fixture(scope="session")
def one_orthanc(start_orthanc: Start) -> Iterator[tuple[Orthanc, int]]:
    port = free_port()
    with start_orthanc(Setting(stations={CALLING: port})) as orthanc:
        yield orthanc, port


@pytest.fixture
def orthanc(one_orthanc: tuple[Orthanc, int]) -> Iterator[Pacs]:
    """The shared PACS; what the test loads is taken away after it."""
    pacs = Pacs(*one_orthanc)
    yield pacs
    for accession in pacs.loaded:
        pacs.remove(accession)


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- certificates


@dataclass(frozen=True)
class Authority:
    """A certificate authority of a test; `certificate` is its own, PEM."""

    folder: Path
    certificate: Path
    _key: ec.EllipticCurvePrivateKey
    _name: x509.Name

    @classmethod
    def made(cls, folder: Path, name: str = "Test Authority") -> Authority:
        key, title = ec.generate_private_key(ec.SECP256R1()), _name(name)
        path = folder / f"{name.replace(' ', '-')}.pem"
        found = cls(folder, path, key, title)
        certificate = found._sign(title, key, days=(-1, 30), is_authority=True)
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return found

    def server(self, name: str = "localhost", *, days: tuple[int, int] = (-1, 30)) -> Path:
        """Certificate and key of a server in one file (PEM), valid from and to so many days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(_name(name), key, days=days, host=name)
        path = self.folder / f"{name}{days[0]}{days[1]}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
        return path

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        days: tuple[int, int],
        host: str = "",
        is_authority: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        draft = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if host:
            draft = draft.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return draft.sign(self._key, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.made(tmp_path)


def texts(paths: Sequence[Path]) -> bytes:
    """All bytes of some files, one after the other."""
    return b"\n".join(path.read_bytes() for path in paths)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found
