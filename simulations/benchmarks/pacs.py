"""From a real PACS to the catalog, against bare retrieval and bare conversion in the same run.

Orthanc holds one CT series of 500 slices, 512 × 512, uncompressed. A whole retrieval of ours is question, fetch,
count, clean, files flushed to the disk, rows committed; a whole ingest goes on through the checks to the volume and the
catalog.
Bare retrieval is dicomweb-client, which parses each image and keeps nothing, and plain requests, which reads the bytes
and does not look at them. Bare conversion is pydicom and nibabel over a folder of the same files: pixels, slope,
intercept, one NIfTI file.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import requests
from dicomweb_client import DICOMwebClient
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from locum.simulations.benchmarks.orthanc import TITLE, Orthanc, Setting, running
from locum.simulations.benchmarks.rows import Row
from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.retrieve.pacs import retrieve
from locum.site_client.imaging.retrieve.spool import spooled
from locum.site_client.imaging.sources import SiteData, load_site
from locum.site_client.imaging.store import exclusive

SLICES, _SHAPE, _REPEATS = 500, (512, 512), 3
_SERIES = "1.2.826.0.1.3680043.10.1347.1"
_STUDY = "1.2.826.0.1.3680043.10.1347.2"
_ACCEPT = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
_CALLING = "LOCUM"
_BARE, _CONVERT = "bare retrieval: dicomweb-client, parsed", "bare conversion: pydicom and nibabel, from a folder"
_WHOLE = "locum, from Orthanc to the catalog"


def measure() -> list[Row]:
    """Slices a second of each way: medians of three, alternating."""
    with loaded() as orthanc, tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(_files(SLICES)):
            Path(folder, f"{number:04}.dcm").write_bytes(content)
        ways: dict[str, Callable[[], int]] = {
            "plain requests, bytes only": lambda: _by_requests(orthanc),
            _BARE: lambda: _by_client(orthanc),
            _CONVERT: lambda: _converted(Path(folder)),
            "locum, DICOMweb, cleaned and written": lambda: _by_locum(web_site(orthanc)),
            "locum, C-GET, cleaned and written": lambda: _by_locum(dimse_site(orthanc)),
            _WHOLE: lambda: _to_catalog(web_site(orthanc)),
        }
        measured: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_REPEATS):
            for name, way in ways.items():
                measured[name].append(_rate(way))
    medians = {name: statistics.median(rates) for name, rates in measured.items()}
    slower = min(medians[_BARE], medians[_CONVERT])
    return [
        *(Row(name, rate, "slices/s") for name, rate in medians.items()),
        Row("to catalog: seconds / those of the slower bare one", slower / medians[_WHOLE], "×"),
    ]


@contextmanager
def loaded(slices: int = SLICES) -> Iterator[Orthanc]:
    """An Orthanc that holds one CT series of so many slices of 512 × 512.

    Raises:
        RunError: Orthanc cannot be started here.
    """
    with running(Setting(stations={_CALLING: None})) as orthanc:
        orthanc.load(_files(slices))
        yield orthanc


def web_site(orthanc: Orthanc) -> SiteData:
    """A site that retrieves from it by DICOMweb, at no pace."""
    return _site({"kind": "dicomweb", "url": orthanc.url})


def dimse_site(orthanc: Orthanc) -> SiteData:
    """A site that retrieves from it by C-GET, at no pace."""
    place = {"host": "127.0.0.1", "port": orthanc.dimse, "title": TITLE, "calling": _CALLING}
    return _site({"kind": "dimse", **place})


def _site(source: dict[str, Any]) -> SiteData:
    return load_site({"name": "benchmark", "sources": [{**source, "rate": 100_000}]})


def _rate(way: Callable[[], int]) -> float:
    began = time.perf_counter()
    count = way()
    return count / (time.perf_counter() - began)


def _by_requests(orthanc: Orthanc) -> int:
    place = f"{orthanc.url}/studies/{_STUDY}/series/{_SERIES}"
    with requests.get(place, headers=_ACCEPT, stream=True, timeout=60) as response:
        size = sum(len(chunk) for chunk in response.iter_content(1 << 20))
    return size // (2 * _SHAPE[0] * _SHAPE[1])


def _by_client(orthanc: Orthanc) -> int:
    client = DICOMwebClient(orthanc.url)
    return sum(1 for _ in client.iter_series(_STUDY, _SERIES, media_types=(("application/dicom", "*"),)))


def _by_locum(site: SiteData) -> int:
    keys = Keys.of(bytes(32))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        with exclusive(store):
            retrieve(site, store, keys, Deidentifier(site.deidentification, keys), lambda _: None)
        return sum(item.refused is None for item in spooled(store, 0))


def _to_catalog(site: SiteData) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return ingest(site, Path(folder), keys=Keys.of(bytes(32))).stored


def _converted(folder: Path) -> int:
    images = [pydicom.dcmread(path) for path in folder.iterdir()]
    images.sort(key=lambda image: float(image.ImagePositionPatient[2]))
    planes = [(image.pixel_array * int(image.RescaleSlope) + int(image.RescaleIntercept)).T for image in images]
    volume = np.stack(planes, axis=-1).astype(np.int16)
    with tempfile.TemporaryDirectory() as out:
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([0.7, 0.7, 2.5, 1.0])), Path(out, "volume.nii"))
    return len(images)


def _files(slices: int) -> Iterator[bytes]:
    noise = np.random.default_rng(0).normal(0, 40, _SHAPE)
    for index in range(slices):
        yield _file(index, (noise + index).astype(np.int16))


def _file(index: int, plane: np.ndarray[Any, Any]) -> bytes:
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, f"{_SERIES}.{index + 1}"
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = _STUDY, _SERIES, f"{_STUDY}.1"
    image.PatientID, image.PatientName, image.AccessionNumber = "P1", "Secret^Name", "A1"
    image.Modality, image.BodyPartExamined, image.StudyDate = "CT", "CHEST", "20240102"
    image.ImageType, image.Manufacturer = ["ORIGINAL", "PRIMARY", "AXIAL"], "ACME"
    image.InstanceNumber = index + 1
    image.ImagePositionPatient, image.ImageOrientationPatient = [0, 0, 2.5 * index], [1, 0, 0, 0, 1, 0]
    image.PixelSpacing, image.SliceThickness = [0.7, 0.7], 2.5
    image.RescaleSlope, image.RescaleIntercept = 1, -1024
    image.Rows, image.Columns = _SHAPE
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.PixelData = plane.tobytes()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID, image.file_meta.MediaStorageSOPInstanceUID = (
        CTImageStorage,
        image.SOPInstanceUID,
    )
    whole = io.BytesIO()
    image.save_as(whole, enforce_file_format=True)
    return whole.getvalue()
