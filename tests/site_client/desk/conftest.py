"""A hospital with images in quarantine and in its store, a desk that runs as a hospital runs it, and a browser."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import nibabel
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DigitalXRayImageStorageForPresentation

from tests.browser import Browser, browser, program
from tests.site_client.imaging.conftest import Hospital, Series

#: What a file, a header and a label may hold when somebody wants to run a script at the steward's desk.
SCRIPT = "<script>document.title='owned'</script>"
LABELS = "acc,code\nA1,lesion\nA2,<img src=x onerror=alert(1)>\nA3,lesion\nA11,lesion\nA12,lesion\n"
RADIOGRAPH = (120, 200)


def ramp() -> np.ndarray:
    """Rows × columns: another value in each pixel, brighter to the right and below, and a dark corner."""
    rows, columns = RADIOGRAPH
    plane = (np.arange(rows)[:, None] * 10 + np.arange(columns)[None, :] * 12).astype(np.uint16)
    plane[:20, :40] = 0
    return plane


def radiograph(number: int = 11, **over: Any) -> list[Dataset]:
    """A picture of the chest that does not deny that text is burned into it."""
    given = {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX", "SeriesDescription": SCRIPT}
    series = Series(number, f"P{number}", f"A{number}", slices=1, shape=RADIOGRAPH, over={**given, **over})
    image = series.images()[0]
    image.PixelData = ramp().tobytes()
    return [image]


def fill(hospital: Hospital) -> None:
    """Three volumes, of which one has a mask, a radiograph and a series in quarantine, and a file that is no image."""
    for number in (1, 2, 3):
        hospital.write(Series(number, f"P{number}", f"A{number}", slices=7, shape=(24, 32)))
    hospital.write(radiograph())
    hospital.write(Series(12, "P12", "A12", over={"BurnedInAnnotation": "YES"}))
    (hospital.dicom / "notes<b>.txt").write_text("no image")
    hospital.table("labels.csv", LABELS)


def ingest(hospital: Hospital, **parts: Any) -> Any:
    labels = {"file": "labels.csv", "key": "accession", "key_column": "acc", "label_column": "code"}
    return hospital.ingest(labels=labels, **parts)


def mask_of(shape: tuple[int, ...]) -> np.ndarray:
    """A box of 1 and, beside it, a box of 2."""
    mask = np.zeros(shape, np.uint8)
    mask[4:10, 5:12, 2:5] = 1
    mask[20:26, 5:12, 2:5] = 2
    return mask


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A hospital that tests do not change."""
    hospital = Hospital(tmp_path_factory.mktemp("hospital"))
    fill(hospital)
    ingest(hospital)
    return hospital


@pytest.fixture
def own(filled: Hospital, tmp_path: Path) -> Hospital:
    """Another with the same files, which a test may change."""
    shutil.copytree(filled.folder, tmp_path / "own", ignore=shutil.ignore_patterns("store"))
    hospital = Hospital(tmp_path / "own")
    ingest(hospital)
    return hospital


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    """A hospital of one volume with a mask."""
    hospital = Hospital(tmp_path_factory.mktemp("masked"))
    hospital.write(Series(1, "P1", "A1", slices=7, shape=(24, 32)))
    hospital.ingest()
    volume = nibabel.load(next((hospital.store / "volumes").glob("*.nii")))
    (hospital.folder / "masks").mkdir()
    nibabel.save(nibabel.Nifti1Image(mask_of(volume.shape), volume.affine), hospital.folder / "masks" / "A1.nii.gz")
    hospital.ingest(masks={"path": "masks", "key": "accession"})
    return hospital


@dataclass
class Desk:
    """A running `locum site desk`."""

    process: subprocess.Popen[str]
    link: str
    cookie: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return self.link.partition("/enter")[0]

    @property
    def port(self) -> int:
        return int(urlsplit(self.link).port or 0)

    def ask(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of one request, exactly as given: no client mends the path."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Cookie": self.cookie} if self.cookie else {}
        connection.request(method, path, body, {**given, **(headers or {})})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def enter(self) -> Desk:
        """Exchange the token for the cookie, as a browser does."""
        _, headers, _ = self.ask(self.link.removeprefix(self.base))
        self.cookie = headers["set-cookie"].partition(";")[0]
        return self

    def csrf(self) -> str:
        """The token of the forms."""
        _, _, page = self.ask("/quarantine")
        handle = re.search(rb'href="(/quarantine/[0-9a-f]{16})"', page)
        assert handle is not None
        found = re.search(rb'name="csrf" value="([^"]+)"', self.ask(handle[1].decode())[2])
        assert found is not None
        return found[1].decode()

    def decide(self, **fields: str) -> tuple[int, bytes]:
        """Send a form."""
        kind = {"Content-Type": "application/x-www-form-urlencoded"}
        given = {"csrf": self.csrf(), "by": "Dr. Ada", **fields}
        status, _, page = self.ask("/decide", method="POST", headers=kind, body=urlencode(given).encode())
        return status, page


@contextmanager
def desk_of(store: Path) -> Iterator[Desk]:
    command = [
        sys.executable,
        "-c",
        "from locum.common.cli import main; main()",
        "site",
        "desk",
        "--store",
        str(store),
        "--no-browser",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None, process.stdout.read()
        yield Desk(process, found[0])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def open_desk() -> Callable[[Path], Any]:
    return desk_of


@pytest.fixture(scope="session")
def tab() -> Iterator[Browser]:
    """A browser. Where the machine has none, its tests are skipped; with LOCUM_NEEDS_CHROMIUM set they fail."""
    if program() is None and not os.environ.get("LOCUM_NEEDS_CHROMIUM"):
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with browser() as opened:
        yield opened
