"""Files with changed bytes, cut ends, foreign parts and wrong lengths: each ends in a case or a reason, in its time."""

from __future__ import annotations

import gzip
import io
import selectors
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from locum.common.errors import DataError
from locum.site_client.imaging import npz
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site
from tests.site_client.imaging.cases import thirteen
from tests.site_client.imaging.conftest import SHARED, Series

#: Seconds for one file, of a few hundred kilobytes at most: twice the patience with a codec, and the rest.
LIMIT = 75.0
#: MiB that the process may ever have taken.
MEMORY = 3000
LARGEST = 300_000


def seeds() -> list[tuple[str, bytes]]:
    """Suffix and content of sound files: generated ones, and where they are the real ones of every syntax."""
    found = list(_generated())
    for folder in ("dicom_codecs_objects", "deid_burned_in/presidio", "deid_burned_in/deid-data"):
        paths = sorted((SHARED / folder).rglob("*.dcm"))
        found += [(".dcm", path.read_bytes()) for path in paths if path.stat().st_size <= LARGEST]
    return found


def _generated() -> Iterator[tuple[str, bytes]]:
    for syntax in (None, RLELossless, JPEGLSLossless, DeflatedExplicitVRLittleEndian):
        for image in [Series(slices=1, shape=(32, 32)).images()[0], thirteen(Series)["enhanced multi-frame"].images[0]]:
            if syntax == DeflatedExplicitVRLittleEndian:
                image.file_meta.TransferSyntaxUID = syntax
            elif syntax is not None:
                image.compress(syntax)
            content = io.BytesIO()
            image.save_as(content, enforce_file_format=True)
            yield ".dcm", content.getvalue()
    array = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)
    plain = nibabel.Nifti1Image(array, np.eye(4)).to_bytes()
    yield ".nii", plain
    content = io.BytesIO()
    yield ".nii.gz", gzip.compress(plain)
    Image.fromarray(array[0].astype(np.uint16)).save(content, "PNG")
    yield ".png", content.getvalue()
    for save in (np.savez, np.savez_compressed):
        content = io.BytesIO()
        parts = {f"{part}_{what}": array[:, :, 0] if what == "labels" else array for part in ("train", "val", "test")
                 for what in ("images", "labels")}  # fmt: skip
        save(content, **{name: value[:, :1] if name.endswith("labels") else value for name, value in parts.items()})
        yield ".npz", content.getvalue()


def mutated(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes of one file; `other` gives foreign parts."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, max(len(changed), 1)))
        # Most of what decides stands in front.
        place = place % 2048 if rng.random() < 0.5 else place
        length = int(rng.integers(1, 200))
        match rng.integers(0, 8):
            case 0:
                changed[place : place + 1] = rng.bytes(1)
            case 1:
                changed[place : place + length] = rng.bytes(length)
            case 2:
                del changed[place:]
            case 3:
                del changed[place : place + length]
            case 4:
                start = int(rng.integers(0, max(len(other), 1)))
                changed[place : place + length] = other[start : start + 4 * length]
            case 5:
                changed[place : place + length] = bytes(length)
            case 6:  # a length, a size or a count
                value = rng.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE, int(rng.integers(0, 1 << 32))])
                width = int(rng.choice([2, 4]))
                changed[place : place + width] = (int(value) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            case 7:  # a part twice
                changed[place:place] = changed[place : place + 4 * length]
    return bytes(changed)


class Watchdog:
    """Feeds files to a process of its own; told is what it says, or 'crashed' or 'hung'."""

    def __init__(self) -> None:
        self.crashes = 0
        self.most = 0
        self._start()

    def _start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("eater.py"))]
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._child.stdout, selectors.EVENT_READ)

    def feed(self, path: Path) -> str:
        print(path, file=self._child.stdin, flush=True)
        if not self._selector.select(LIMIT + 60 * (self.most == 0)):
            self.end()
            self._start()
            return "hung"
        line = self._child.stdout.readline()
        if not line:
            told = f"crashed: {self._child.stderr.read()[-400:]}"
            self.end()
            self._start()
            return told
        outcome, memory = line.split()
        self.most = max(self.most, int(memory))
        return outcome

    def end(self) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._child.stderr):
            stream.close()


def eat(folder: Path, number: int) -> tuple[Counter[str], list[str], int]:
    """Outcomes of so many mutated files, what went wrong with the file's number, and the most memory in MiB."""
    found, outcomes, wrong = seeds(), Counter(), []
    watchdog = Watchdog()
    try:
        for index in range(number):
            rng = np.random.default_rng(index)
            suffix, content = found[index % len(found)]
            path = folder / f"m{index}{suffix}"
            path.write_bytes(mutated(content, found[rng.integers(0, len(found))][1], rng))
            outcome = watchdog.feed(path)
            path.unlink()
            outcomes[outcome.split(":")[0]] += 1
            if outcome == "hung" or outcome.startswith("crashed"):
                wrong.append(f"{index}: {outcome}")
    finally:
        watchdog.end()
    return outcomes, wrong, watchdog.most


@pytest.mark.parametrize("number", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_mutated_file_crashes_hangs_or_fills_the_memory(tmp_path, number):
    outcomes, wrong, most = eat(tmp_path, number)
    sys.stdout.write(f"{dict(outcomes.most_common())}, at most {most} MiB\n")
    assert wrong == []
    assert sum(outcomes.values()) == number
    assert outcomes["stored"] > 0
    assert most < MEMORY


def test_an_ingest_of_mutated_files_adds_up(tmp_path):
    found = [(suffix, content) for suffix, content in seeds() if suffix == ".dcm"]
    (tmp_path / "data").mkdir()
    for index in range(80):
        rng = np.random.default_rng(index)
        content = mutated(found[index % len(found)][1], found[0][1], rng)
        (tmp_path / f"data/{index}.dcm").write_bytes(content)
    site = load_site({"name": "m", "root": str(tmp_path / "data"), "sources": [{"kind": "dicom", "path": "."}]})
    counts = ingest(site, tmp_path / "store", keys=Keys.of(bytes(32)))
    assert counts.found == 80 == counts.stored + counts.annotations + sum(counts.quarantined.values())


def test_an_array_that_claims_more_than_there_is_memory_is_told(tmp_path):
    path = tmp_path / "a.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,), }"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(DataError, match="cannot be read"):
        npz.row_counts(path)
