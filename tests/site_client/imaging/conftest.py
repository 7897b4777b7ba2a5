"""A small hospital that a test fills with real DICOM files and ingests."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from locum.site_client.imaging.catalog import Catalog, Counts
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site

KEYS = Keys.of(bytes(range(32)))
SHARED = Path(__file__).parents[4] / "shared" / "data"

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Series:
    """One series to write; `over` sets or, with None, removes attributes of every image."""

    number: int = 1
    patient: str = "P1"
    accession: str = "A1"
    slices: int = 5
    shape: tuple[int, int] = (6, 7)
    orientation: tuple[float, ...] = AXIAL
    origin: tuple[float, float, float] = (-10.0, 20.0, 30.0)
    step: tuple[float, float, float] = (0.0, 0.0, 2.5)
    spacing: tuple[float, float] = (0.5, 0.8)
    over: dict[str, Any] = field(default_factory=dict)

    @property
    def uid(self) -> str:
        return f"1.2.826.0.1.3680043.10.{self.number}"

    def pixels(self) -> np.ndarray:
        rng = np.random.default_rng(self.number)
        return rng.integers(0, 4096, (self.slices, *self.shape)).astype(np.uint16)

    def images(self) -> list[Dataset]:
        return [self._image(index, plane) for index, plane in enumerate(self.pixels())]

    def _image(self, index: int, plane: np.ndarray) -> Dataset:
        image = Dataset()
        image.SOPClassUID = CTImageStorage
        image.SOPInstanceUID = f"{self.uid}.1.{index + 1}"
        image.StudyInstanceUID = f"{self.uid}.2"
        image.SeriesInstanceUID = self.uid
        image.FrameOfReferenceUID = f"{self.uid}.3"
        image.Modality = "CT"
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.PatientID, image.PatientName = self.patient, "Secret^Name"
        image.AccessionNumber = self.accession
        image.Manufacturer, image.ManufacturerModelName = "ACME", "One"
        image.ImagePositionPatient = [o + index * s for o, s in zip(self.origin, self.step, strict=True)]
        image.ImageOrientationPatient = list(self.orientation)
        image.PixelSpacing = list(self.spacing)
        image.SliceThickness = 2.5
        image.RescaleSlope, image.RescaleIntercept = 1, -1024
        image.Rows, image.Columns = self.shape
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
        image.PixelData = plane.tobytes()
        for name, value in self.over.items():
            if value is None:
                delattr(image, name)
            else:
                setattr(image, name, value)
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        return image


@dataclass(frozen=True)
class Hospital:
    """A folder of DICOM, and the store that it is ingested into."""

    folder: Path

    @property
    def dicom(self) -> Path:
        return self.folder / "dicom"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def write(self, series: Series | list[Dataset], place: str = "") -> list[Path]:
        images = series if isinstance(series, list) else series.images()
        folder = self.dicom / (place or f"s{images[0].SeriesInstanceUID[-6:]}")
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"IM{index:05d}" for index in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save_as(path, enforce_file_format=True)
        return paths

    def site(self, **parts: Any) -> dict[str, Any]:
        self.dicom.mkdir(exist_ok=True)
        plain = {"name": "north", "root": str(self.folder), "sources": [{"kind": "dicom", "path": "dicom"}]}
        return plain | parts

    def ingest(self, **parts: Any) -> Counts:
        return ingest(load_site(self.site(**parts)), self.store, keys=KEYS)

    def catalog(self) -> Catalog:
        return Catalog.open(self.store)

    def table(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path)


@pytest.fixture(scope="session")
def series() -> type[Series]:
    return Series


@pytest.fixture(scope="session")
def new_hospital() -> type[Hospital]:
    return Hospital


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the real data of {SHARED.name} is not beside this checkout")
    return SHARED
