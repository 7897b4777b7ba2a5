"""Epochs from the prepared store against MONAI reading the same series as DICOM, in one run.

Both give the same voxels to the same loader, one image at a time: once with no transform but what makes them tensors,
once with those of the demo's plan. The store is read through the dataset of training: without a cache, in the epoch
that fills it, and in those after.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from monai.data import DataLoader, Dataset, list_data_collate
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, LoadImaged
from pydicom.dataset import Dataset as Header
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from locum.common import build
from locum.common.plan import Plan, changed, load_plan
from locum.simulations.benchmarks.rows import Row
from locum.simulations.cli import shipped
from locum.simulations.scans import uid
from locum.site_client.imaging.catalog import Case, Catalog
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site
from locum.site_client.training import data

_SERIES, _SLICES, _SIDE, _REPEATS = 10, 60, 256, 3
_EVERYTHING = 4 << 30


def measure() -> list[Row]:
    """Images a second of each way, medians of one run, and the ratios to MONAI's."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(folder)
        series = [_write(root / "dicom" / f"series{number}", number) for number in range(_SERIES)]
        began = time.perf_counter()
        cases = _ingested(root)
        preparing = time.perf_counter() - began
        _check_same(_theirs(_bare(), series), data.dataset(_bare(), cases, augment=False, budget_bytes=0))
        bare = _rows("reading only", _bare(), series, cases)
        whole = _rows("the demo's transforms", load_plan(shipped("plans")), series, cases)
    return [*bare, *whole, Row("ingest, once", _SERIES / preparing, "images/s")]


def _rows(name: str, plan: Plan, series: Sequence[Path], cases: Sequence[Case]) -> list[Row]:
    theirs, ours = _theirs(plan, series), data.dataset(plan, cases, augment=False, budget_bytes=0)
    columns = [
        (_epoch(theirs), _epoch(_loader(ours)), *_cached(plan, cases)) for _ in range(_REPEATS)
    ]  # fmt: skip
    dicom, uncached, filling, cached = (statistics.median(column) for column in zip(*columns, strict=True))
    return [
        Row(f"{name}: MONAI, PydicomReader over series folders", _SERIES / dicom, "images/s"),
        Row(f"{name}: store, nothing cached", _SERIES / uncached, "images/s"),
        Row(f"{name}: store, the epoch that fills the cache", _SERIES / filling, "images/s"),
        Row(f"{name}: store, every epoch after it", _SERIES / cached, "images/s"),
        Row(f"{name}: nothing cached / MONAI", dicom / uncached, "×"),
        Row(f"{name}: epochs after the first / MONAI", dicom / cached, "×"),
        Row(f"{name}: twenty epochs / MONAI", 20 * dicom / (filling + 19 * cached), "×"),
    ]


def _write(folder: Path, number: int) -> Path:
    """A CT series of noise, as a scanner gives it: plain pixels of 12 bits."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(number)
    name = f"reading {number}"
    for index in range(_SLICES):
        image = Header()
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, uid(f"{name} {index}")
        image.StudyInstanceUID, image.SeriesInstanceUID = uid(f"{name} study"), uid(name)
        image.FrameOfReferenceUID = uid(f"{name} frame")
        image.Modality, image.PatientID, image.AccessionNumber = "CT", f"P{number}", f"A{number}"
        image.ImageType, image.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], index + 1
        image.ImagePositionPatient, image.ImageOrientationPatient = [-120.0, -120.0, 3.0 * index], [1, 0, 0, 0, 1, 0]
        image.PixelSpacing, image.SliceThickness = [0.9, 0.9], 3.0
        image.RescaleSlope, image.RescaleIntercept = 1, -1024
        image.Rows = image.Columns = _SIDE
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
        image.PixelData = rng.integers(0, 4096, (_SIDE, _SIDE)).astype("<u2").tobytes()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.save_as(folder / f"IM{index:04d}.dcm", enforce_file_format=True)
    return folder


def _ingested(root: Path) -> tuple[Case, ...]:
    table = "\n".join(f"A{number},{number % 2}" for number in range(_SERIES))
    (root / "labels.csv").write_text(f"accession,lesion\n{table}\n")
    labels = {"file": "labels.csv", "key": "accession", "key_column": "accession", "label_column": "lesion",
              "classes": {"0": "no_lesion", "1": "lesion"}}  # fmt: skip
    sources = [{"kind": "dicom", "path": "dicom"}]
    site = load_site({"name": "reading", "root": str(root), "sources": sources, "labels": labels})
    ingest(site, root / "store", keys=Keys.of(bytes(32)))
    with closing(Catalog.open(root / "store")) as catalog:
        return tuple(catalog.cases((0.6, 0.1, 0.3)))


def _bare() -> Plan:
    """The demo's plan without a transform, for images as large as these."""
    plan = load_plan(shipped("plans"))
    training = {**plan.model_dump(mode="json")["training"], "input_size": [_SIDE, _SIDE, _SLICES]}
    return changed(plan, transforms={"prepare": [], "augment": []}, training=training)


def _theirs(plan: Plan, series: Sequence[Path]) -> DataLoader:
    pipeline = Compose(
        [
            LoadImaged(["image"], reader="PydicomReader"),
            EnsureChannelFirstd(["image"]),
            *build.transforms(plan, "prepare"),
            EnsureTyped(["image"], dtype=torch.float32, track_meta=False),
        ]
    )
    return _loader(Dataset([{"image": str(folder)} for folder in series], pipeline))


def _loader(images: Dataset) -> DataLoader:
    return DataLoader(images, batch_size=1, collate_fn=list_data_collate)


def _cached(plan: Plan, cases: Sequence[Case]) -> tuple[float, float]:
    """Seconds of the epoch that fills the cache and of the one after it."""
    began = time.perf_counter()
    kept = _loader(data.dataset(plan, cases, augment=False, budget_bytes=_EVERYTHING))
    _epoch(kept)
    return time.perf_counter() - began, _epoch(kept)


def _epoch(loader: DataLoader) -> float:
    """Seconds until the loader has given every image, as a tensor of its own: neither way reads late."""
    began = time.perf_counter()
    given = sum(len(batch["image"]) for batch in loader)
    took = time.perf_counter() - began
    if given != _SERIES:
        raise RuntimeError(f"{given} images of {_SERIES}")
    return took


def _check_same(theirs: DataLoader, ours: Dataset) -> None:
    """Both ways give the same images: the same voxels."""
    one = sorted(float(batch["image"].sum(dtype=torch.float64)) for batch in theirs)
    other = sorted(float(item["image"].sum(dtype=torch.float64)) for item in ours)
    if one != other:
        raise RuntimeError("the two ways do not give the same images")
