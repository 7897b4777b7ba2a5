"""Any history: whatever became of a hospital's files and tables, and wherever ingests were cut off, the store ends as
one that was made anew from what lies there now."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import ComputedRadiographyImageStorage

from locum.common.errors import DataError, RunError
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site

KEYS = Keys.of(bytes(range(32)))
SPLIT = (0.6, 0.2, 0.2)
FOLDERS = ("a", "b", "b/deep")
#: Where the site file may look: apart, in another order, one alone, one within the other.
SOURCES = (("a", "b"), ("b", "a"), ("a",), ("b",), (".",), ("a", "."), ("b", "b/deep"))
LABELS = ("MASS", "NORM", "ODD", "")
#: Python functions and built-ins that a small ingest calls, about: within so many it is cut off.
CALLS = 60_000


@dataclass
class World:
    """A hospital that changes, and the site file as it is now."""

    hospital: object
    series: type
    chance: Random
    moved: Path
    sources: tuple[str, ...] = SOURCES[0]
    defaced: bool = False
    keep_dicom: bool = False
    masks: str | None = None
    tables: dict[str, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.hospital.dicom.rglob("*") if path.is_file())

    def site(self):
        kinds = [{"kind": "dicom", "path": f"dicom/{place}"} for place in self.sources]
        parts = {"sources": kinds, "defaced": self.defaced, "deidentification": {"keep_dicom": self.keep_dicom}}
        if "labels" in self.tables:
            parts["labels"] = {
                "file": "labels.csv", "key": "accession", "key_column": "acc", "label_column": "code",
                "classes": {"MASS": "lesion", "NORM": "none"},
            }  # fmt: skip
        if "roll" in self.tables:
            parts["table"] = {
                "file": "roll.csv", "key": "patient", "key_column": "patient", "where": {"site": "north"},
                "fold_column": "fold",
            }  # fmt: skip
        if "consent" in self.tables:
            parts["consent"] = {"withdrawn": "consent.txt"}
        if self.masks:
            parts["masks"] = {"path": self.masks, "key": "accession"}
        return load_site(self.hospital.site(**parts))

    def edit(self) -> None:
        name, edit = self.chance.choice(EDITS)
        self.told.append(name)
        edit(self)

    def table(self, name: str, lines: list[str] | None) -> None:
        if lines is None:
            self.tables.pop(name, None)
            return
        self.tables[name] = "\n".join(lines) + "\n"
        suffix = "txt" if name == "consent" else "csv"
        self.hospital.table(f"{name}.{suffix}", self.tables[name])

    def a_path(self) -> Path:
        return self.hospital.dicom / self.chance.choice(FOLDERS) / f"f{self.chance.randrange(30):02}"


def add_series(world):
    number = world.chance.randrange(1, 7)
    patient = f"P{(number + 1) // 2}"
    images = world.series(number, patient=patient, accession=f"A{number}", slices=3, shape=(4, 5)).images()
    for index, image in enumerate(images):
        path = world.hospital.dicom / world.chance.choice(FOLDERS) / f"s{number}-{index}"
        image.save_as(path, enforce_file_format=True)


def remove(world):
    for path in world.files[:: world.chance.choice((1, 3, 7))][:4]:
        path.unlink()


def on_a_file(change):
    def edit(world):
        files = world.files
        if files:
            change(world, world.chance.choice(files))

    return edit


def rename(world, path):
    path.replace(world.a_path())


def set_aside_and_back(world, path):
    aside = world.moved / f"{world.chance.randrange(4)}"
    if aside.exists():
        aside.replace(world.a_path())
    else:
        path.replace(aside)


def copy(world, path):
    target = world.a_path()
    if target != path:
        (shutil.copy2 if world.chance.random() < 0.5 else shutil.copy)(path, target)


def touch(world, path):
    path.touch()


def spoil(world, path):
    content = path.read_bytes()
    path.write_bytes(world.chance.choice((content[:-7], b"junk", b"", content[:300])))


def alter(world, path):
    try:
        image = pydicom.dcmread(path)
    except (pydicom.errors.InvalidDicomError, EOFError):
        image = pydicom.Dataset()
    if "SOPInstanceUID" not in image or "PixelData" not in image:
        path.unlink()
        return
    world.chance.choice(ALTERATIONS)(world, image)
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.save_as(path, enforce_file_format=True)


def _set(**values):
    def change(_, image):
        for name, value in values.items():
            setattr(image, name, value)

    return change


def to_another_series(world, image):
    other = world.series(world.chance.randrange(1, 7))
    image.SeriesInstanceUID, image.StudyInstanceUID = other.uid, f"{other.uid}.2"


def another_patient(world, image):
    image.PatientID = f"P{world.chance.randrange(1, 4)}"


def other_pixels(world, image):
    pixels = np.frombuffer(image.PixelData, np.uint16).copy()
    pixels[0] = world.chance.randrange(4096)
    image.PixelData = pixels.tobytes()


ALTERATIONS = (
    _set(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    _set(ImageType=["ORIGINAL", "PRIMARY", "AXIAL"]),
    _set(SOPClassUID=ComputedRadiographyImageStorage, Modality="CR", BurnedInAnnotation="NO"),
    _set(BurnedInAnnotation="YES"),
    _set(BurnedInAnnotation="NO"),
    _set(PatientID=""),
    _set(AccessionNumber=""),
    _set(PatientSex="F", PatientAge="093Y", StudyDate="20240229"),
    _set(ImagePositionPatient=[-10.0, 20.0, 55.0]),
    to_another_series,
    another_patient,
    other_pixels,
)


def labels(world):
    lines = [f"A{n},{world.chance.choice(LABELS)}" for n in range(1, 7) if world.chance.random() < 0.8]
    twice = world.chance.sample(lines, min(len(lines), world.chance.randrange(2)))
    known = "elsewhere,MASS"  # a table without any known code is an error of its own
    world.table("labels", world.chance.choice((None, ["acc,code", known, *lines, *twice], ["acc,code", known, *lines])))


def roll(world):
    lines = [
        f"P{n},{world.chance.choice(('north', 'north', 'south'))},{world.chance.choice(('train', 'test', ''))}"
        for n in range(1, 4)
    ]
    world.table("roll", world.chance.choice((None, ["patient,site,fold", *lines])))


def consent(world):
    lines = [f"P{n}" for n in range(1, 4) if world.chance.random() < 0.3]
    world.table("consent", world.chance.choice((None, ["# withdrawn", *lines])))


def masks(world):
    world.masks = world.chance.choice((None, "masks", "masks2"))
    if world.masks is None or world.chance.random() < 0.3:
        return
    for number in world.chance.sample(range(1, 7), 3):
        array = np.full((5, 4, 3), world.chance.randrange(3), np.uint8)
        affine = np.diag([-0.8, -0.5, 2.5, 1.0])
        affine[:3, 3] = (10.0, -20.0, 30.0)
        nibabel.Nifti1Image(array, affine).to_filename(world.hospital.folder / world.masks / f"A{number}.nii")


def sources(world):
    world.sources = world.chance.choice(SOURCES)


def settings(world):
    world.defaced, world.keep_dicom = world.chance.random() < 0.3, world.chance.random() < 0.5


_EDITS = (
    *(add_series,) * 5, remove, *map(on_a_file, (rename, rename, copy, copy, touch, spoil, set_aside_and_back)),
    *(on_a_file(alter),) * 6, labels, labels, roll, consent, masks, masks, sources, settings,
)  # fmt: skip
EDITS = tuple((getattr(edit, "__name__", ""), edit) for edit in _EDITS)


def outcome(world, store: Path) -> str:
    """What an ingest says in the end; empty if it ended well."""
    try:
        ingest(world.site(), store, keys=KEYS)
    except DataError as error:
        return str(error).replace(str(store), "STORE")
    return ""


def cut_off(world, store: Path) -> None:
    """An ingest in a child that ends at any call of any function, or where a file grows too large to be written."""
    calls = world.chance.randrange(CALLS)
    limit = world.chance.choice((0, 0, 0, world.chance.randrange(300, 200_000)))
    world.told.append(f"cut off after {calls} calls" if not limit else f"full at {limit} bytes")
    site = world.site()
    child = os.fork()
    if child == 0:
        _die_somewhere(site, store, calls, limit)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "an ingest ended with an error that is none of ours"


def _die_somewhere(site, store: Path, calls: int, limit: int) -> None:
    left = calls

    def count(*_):
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        else:
            sys.setprofile(count)
        ingest(site, store, keys=KEYS)
    except (DataError, RunError):
        os._exit(0)
    except BaseException:  # noqa: BLE001 (a child that may not return to the test)
        sys.setprofile(None)
        import traceback

        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def everything(store: Path) -> dict[str, object]:
    """All that a store holds besides what people decided: rows of the catalog, and files by their digests."""
    found: dict[str, object] = {}
    with closing(sqlite3.connect(store / "catalog.sqlite")) as connection:
        for table in ("meta", "items", "units", "cases", "codes"):
            rows = connection.execute(f"SELECT * FROM {table} ORDER BY 1, 2")  # noqa: S608
            names = [column[0] for column in rows.description]
            for row in rows:
                found[f"{table} {row[:2] if table == 'codes' else row[0]}"] = dict(zip(names, row, strict=True))
    for folder in ("volumes", "masks", "dicom"):
        for path in sorted((store / folder).rglob("*")):
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(path.relative_to(store))] = content
    return found


def check(world, store: Path, fresh: Path) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    said, anew = outcome(world, store), outcome(world, fresh)
    assert said == anew, world.told
    if said:
        return
    ours, theirs = everything(store), everything(fresh)
    different = {
        name: (ours.get(name), theirs.get(name)) for name in ours | theirs if ours.get(name) != theirs.get(name)
    }
    assert not different, world.told
    with closing(Catalog.open(store)) as catalog:
        counts, cases = catalog.counts(), catalog.cases(SPLIT)
        held = catalog.quarantine()
    assert counts.found == counts.stored + len(held)
    fold_of = {case.patient: case.fold for case in cases}
    assert all(case.fold == fold_of[case.patient] for case in cases)
    reached = {path for place in world.sources for path in (world.hospital.dicom / place).rglob("*") if path.is_file()}
    if "roll" not in world.tables:
        assert counts.found == len(reached)


def live(hospital, series, seed: int, *, rounds: int) -> None:
    """A history of so many rounds: edits, ingests that are cut off, edits, an ingest, and the comparison."""
    moved = hospital.folder / "moved"
    for place in (
        *(hospital.dicom / name for name in FOLDERS),
        hospital.folder / "masks",
        hospital.folder / "masks2",
        moved,
    ):
        place.mkdir(parents=True, exist_ok=True)
    world = World(hospital, series, Random(seed), moved)
    for _ in range(4):
        add_series(world)
    for _ in range(rounds):
        for _ in range(world.chance.randrange(3)):
            for _ in range(world.chance.randrange(4)):
                world.edit()
            cut_off(world, hospital.store)
        for _ in range(world.chance.randrange(4)):
            world.edit()
        check(world, hospital.store, hospital.folder / "fresh")


@pytest.mark.parametrize("seed", range(7))
def test_a_store_is_what_lies_in_the_sources_now_whatever_lay_there_and_whatever_was_cut_off(hospital, series, seed):
    live(hospital, series, seed, rounds=12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_a_store_is_what_lies_there_now_after_long_histories(hospital, series, seed):
    live(hospital, series, seed, rounds=25)
