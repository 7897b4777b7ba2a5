"""From DICOM to the catalog, against a bare conversion of the same files, and what an ingest takes in memory.

The bare conversion reads with pydicom, sorts by position, rescales and writes NIfTI: no grouping, no check of the
geometry, no de-identification, no catalog. Both take turns, in one run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pydicom

from locum.simulations.benchmarks.memory import above, alone
from locum.simulations.benchmarks.rows import Row
from locum.simulations.phantoms import Grid
from locum.simulations.scans import VENDORS, Patient, Protocol, Storage, Study, series
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import SiteData, load_site

_STUDIES, _SLICES, _REPEATS = 5, 100, 3
_KEYS = Keys.of(bytes(range(32)))


def measure() -> list[Row]:
    """Slices a second of both, their ratio, and the memory for some and for three times as many studies."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_studies(folder / "dicom", studies=_STUDIES, slices=_SLICES, side=512)
        pairs = [(_ours(folder, number), _bare(folder, number)) for number in range(_REPEATS)]
    ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    count = _STUDIES * _SLICES
    small, large = (alone(_memory, studies) for studies in (300, 900))
    return [
        Row(f"locum: {count} CT slices to the catalog, cleaned", count / ours, "slices/s"),
        Row("bare conversion to NIfTI", count / bare, "slices/s"),
        Row("locum / bare", statistics.median(a / b for a, b in pairs), "× the time"),
        Row("memory of an ingest of 300 studies", small, "MiB above the libraries"),
        Row("memory of an ingest of 900 studies", large, "MiB above the libraries"),
    ]


def slices(*, studies: int, slices: int, side: int) -> Iterator[tuple[str, bytes]]:
    """CT images of as many patients: the name of the study, and a whole file."""
    grid = Grid((slices, side, side), (2.0, 0.7, 0.7))
    protocol = Protocol("CT", VENDORS["siemens"], Storage(), "ISO_IR 100", "Musterklinik")
    generator = np.random.default_rng(0)
    for number in range(studies):
        study = Study(
            f"s{number}", Patient(f"ID-{number:06}", "Muster^Erika", "19600102", "F"), f"A{number}", "20240305"
        )
        volume = generator.integers(-1000, 2000, grid.shape).astype(np.float32)
        for instance in series(study, volume, grid, protocol):
            yield study.key, instance.data


def write_studies(folder: Path, **size: int) -> None:
    """The images of :func:`slices`, a folder a study."""
    for number, (study, content) in enumerate(slices(**size)):
        place = folder / study
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06}").write_bytes(content)


def _site(folder: Path) -> SiteData:
    return load_site({"name": "north", "root": str(folder), "sources": [{"kind": "dicom", "path": "dicom"}]})


def _ours(folder: Path, number: int) -> float:
    began = time.perf_counter()
    counts = ingest(_site(folder), folder / f"store{number}", keys=_KEYS)
    if counts.cases != _STUDIES:
        raise RuntimeError(f"{counts.cases} cases of {_STUDIES}")
    return time.perf_counter() - began


def _bare(folder: Path, number: int) -> float:
    target = folder / f"bare{number}"
    target.mkdir()
    began = time.perf_counter()
    for study in sorted((folder / "dicom").iterdir()):
        images = sorted(map(pydicom.dcmread, study.iterdir()), key=lambda image: float(image.ImagePositionPatient[2]))
        planes = [image.pixel_array * float(image.RescaleSlope) + float(image.RescaleIntercept) for image in images]
        volume = np.stack(planes).astype(np.int16).T
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), target / f"{study.name}.nii")
    return time.perf_counter() - began


def _memory(studies: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_studies(folder / "dicom", studies=studies, slices=20, side=64)
        site = _site(folder)
        return above(lambda: ingest(site, folder / "store", keys=_KEYS))
