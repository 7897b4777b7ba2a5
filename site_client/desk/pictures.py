"""What a file in quarantine looks like: one picture and a few facts of its header, for a person who decides.

Rules:
  * Files in quarantine may be damaged or malicious: they are decoded in a process of its own, with limits on time and
    memory. If that process dies, the page says so and the next picture gets another process.
  * One frame is decoded, never a whole film. The window of the header is applied, or 1 % to 99 % of the values.
  * Facts are those that name nobody: no name, ID, date or number of the patient, and no free text but the series'.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from locum.site_client.desk.png import png
from locum.site_client.imaging.reasons import SENTENCE, Reason, RefusedError
from locum.site_client.imaging.split import Fold

#: Pixels of a picture, at most: 512 MiB in the eight bytes of a float.
_MOST_PIXELS = 1 << 26
_MOST_MEMORY = 6 << 30
_MOST_BYTES = 512 << 20
_SECONDS = 60
_START = 300
#: Values by which a window is found, about: more do not change it.
_SAMPLE = 1 << 16
#: Longest side of the small pictures of a list.
SMALL = 192

Array = npt.NDArray[Any]
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Picture:
    """One picture of a file.

    Attributes:
        content: a PNG; empty if the file cannot be shown.
        rows: of the whole image, in pixels, as `columns`; the PNG may be smaller.
        facts: name to value, from the header.
        problem: why there is no picture, one sentence; empty if there is one.
    """

    content: bytes = b""
    rows: int = 0
    columns: int = 0
    facts: dict[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Wanted:
    """Which picture: of a file (or a row of an .npz), its longest side at most `side` pixels."""

    path: Path
    size: int
    row: tuple[Fold, int] | None = None
    side: int = 2048


@dataclass(frozen=True)
class Solid:
    """The volume that files make: a .nii file, or why there is none, one sentence."""

    content: bytes = b""
    problem: str = ""


class Studio:
    """Makes pictures and volumes in a process of its own; close it at the end."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._turn = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def picture(self, wanted: Wanted) -> Picture:
        """A picture, or one without content that says why."""
        made = self._made(lambda pool: pool.submit(draw, wanted))
        return Picture(problem=made) if isinstance(made, str) else made

    def solid(self, wanted: Sequence[Wanted]) -> Solid:
        """The volume of the files of one unit, or why there is none."""
        made = self._made(lambda pool: pool.submit(build, tuple(wanted)))
        return Solid(problem=made) if isinstance(made, str) else made

    def _made(self, ask: Callable[[ProcessPoolExecutor], Future[_Made]]) -> _Made | str:
        with self._turn:
            try:
                return ask(self._process()).result(self._seconds)
            except TimeoutError:
                problem = f"It was not ready within {self._seconds:g} seconds."
            except BrokenProcessPool:
                problem = "The file ended the program that draws pictures: it is damaged."
            self._end()
            return problem

    def close(self) -> None:
        """End the process."""
        with self._turn:
            self._end()

    def _process(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_limit)
            self._pool.submit(os.getpid).result(_START)  # a file's time begins when the process is there
        return self._pool

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        processes = list((pool._processes or {}).values())  # noqa: SLF001 (until 3.14, no other way to end one that hangs)
        for process in processes:
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


def _limit() -> None:
    """Of the process that draws: its memory, and that the codecs' remarks on files stay off the terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: it is for the desk, which then ends this process
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def draw(wanted: Wanted) -> Picture:
    """A picture of a file, in this process."""
    try:
        array, facts = _reader(wanted)(wanted)
    except RefusedError as refused:
        return Picture(problem=SENTENCE[refused.reason])
    rows, columns = array.shape[:2]
    step = max(1, -(-max(rows, columns) // wanted.side))
    return Picture(png(np.ascontiguousarray(array[::step, ::step])), rows, columns, facts)


def build(wanted: Sequence[Wanted]) -> Solid:
    """The volume of files, in this process; of what is in quarantine for another reason than its geometry."""
    from locum.site_client.imaging import dicom, nifti
    from locum.site_client.imaging.geometry import volume_of

    first = wanted[0]
    if first.row is not None or sum(one.size for one in wanted) > _MOST_BYTES:
        return Solid(problem="There is no volume to look at: it is a row of a table, or too large.")
    try:
        if first.path.name.endswith((".nii", ".nii.gz")):
            volume = nifti.read_image(first.path, first.size)
        else:
            volume = volume_of([dicom.read(one.path, one.size) for one in wanted])
    except RefusedError as refused:
        return Solid(problem=SENTENCE[refused.reason])
    return Solid(nifti.encode(volume))


def _reader(wanted: Wanted) -> Callable[[Wanted], tuple[Array, dict[str, str]]]:
    if wanted.row is not None:
        return _row
    if wanted.path.name.endswith((".nii", ".nii.gz")):
        return _nifti
    return _dicom


def _row(wanted: Wanted) -> tuple[Array, dict[str, str]]:
    from locum.common.errors import DataError
    from locum.site_client.imaging import npz

    try:
        array = npz.row(wanted.path, *(wanted.row or ("train", 0)))[0]
    except (DataError, OSError, LookupError):
        raise RefusedError(Reason.UNREADABLE) from None
    plane = array[len(array) // 2] if array.ndim == 3 and array.shape[-1] != 3 else array
    return grey(plane) if plane.ndim == 2 else plane.astype(np.uint8), {"size": _times(array.shape)}


def _nifti(wanted: Wanted) -> tuple[Array, dict[str, str]]:
    from locum.site_client.imaging.nifti import read_image

    array = read_image(wanted.path, wanted.size).array
    plane = array if array.ndim == 2 else array[:, :, array.shape[2] // 2]
    plane = plane if plane.ndim == 2 else plane[..., 0]
    # The store's axes are column, row with rows upwards; a page shows rows, columns from above.
    return grey(plane.T[::-1]), {"size": _times(array.shape)}


def _dicom(wanted: Wanted) -> tuple[Array, dict[str, str]]:
    from locum.site_client.imaging import dicom, headers
    from locum.site_client.imaging.damage import damage_is

    dataset = dicom.read(wanted.path, wanted.size)
    with damage_is(Reason.UNREADABLE):
        if "PixelData" not in dataset:
            raise RefusedError(Reason.NO_PIXELS)
        if headers.voxels(dataset) // headers.frames(dataset) > _MOST_PIXELS:
            raise RefusedError(Reason.TOO_LARGE)
    with damage_is(Reason.DECODE_FAILED):
        return _shown(dataset), _facts(dataset)


def _shown(dataset: Any) -> Array:
    """The middle frame as a person sees it (PS3.3 C.7.6.3, C.11.1 and C.11.2)."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    from locum.site_client.imaging.headers import frames, text

    number = frames(dataset)
    plane = pixel_array(dataset, index=number // 2) if number > 1 else pixel_array(dataset)
    kind = text(dataset, "PhotometricInterpretation")
    if kind == "PALETTE COLOR":
        plane = apply_color_lut(plane, dataset)
    if plane.ndim == 3:
        return colour(plane, 8 * plane.dtype.itemsize if kind == "PALETTE COLOR" else int(dataset.BitsStored))
    shown = grey(np.asarray(apply_modality_lut(plane, dataset), np.float32), _window(dataset))
    return np.asarray(255 - shown if kind == "MONOCHROME1" else shown)


def _window(dataset: Any) -> tuple[float, float] | None:
    """Lowest and highest value of the header's first window; None without one."""
    center, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    return (center - width / 2, center + width / 2) if center is not None and width else None


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)


def grey(plane: Array, window: tuple[float, float] | None = None) -> npt.NDArray[np.uint8]:
    """Values as grey levels from 0 to 255: those of a window (lowest, highest), or from 1 % to 99 % of them."""
    values = np.nan_to_num(np.asarray(plane, np.float32))
    low, high = window or tuple(np.percentile(values.ravel()[:: 1 + values.size // _SAMPLE], (1, 99)))
    scaled = (values - low) * (255 / max(high - low, 1e-6))
    levels: npt.NDArray[np.uint8] = np.clip(scaled, 0, 255).astype(np.uint8)
    return levels


def colour(plane: Array, bits: int) -> npt.NDArray[np.uint8]:
    """RGB of any depth as RGB of 8 bits."""
    levels: npt.NDArray[np.uint8] = np.clip(plane[..., :3].astype(np.int64) >> max(0, bits - 8), 0, 255).astype(
        np.uint8
    )
    return levels


_SHOWN = {
    "modality": "Modality",
    "manufacturer": "Manufacturer",
    "model": "ManufacturerModelName",
    "body part": "BodyPartExamined",
    "series description": "SeriesDescription",
    "image type": "ImageType",
    "burned-in annotation": "BurnedInAnnotation",
    "photometric interpretation": "PhotometricInterpretation",
    "frames": "NumberOfFrames",
}


def _facts(dataset: Any) -> dict[str, str]:
    facts = {name: _words(dataset.get(keyword)) for name, keyword in _SHOWN.items()}
    facts["object"] = str(getattr(dataset.get("SOPClassUID", ""), "name", ""))
    facts["size"] = _times((dataset.Columns, dataset.Rows))
    return {name: value for name, value in facts.items() if value}


def _words(value: Any) -> str:
    if value is None:
        return ""
    several = hasattr(value, "__iter__") and not isinstance(value, str)
    return " \\ ".join(map(str, value)) if several else str(value)


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(str(length) for length in shape)
