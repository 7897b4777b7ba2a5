"""MedMNIST-style .npz files: {train,val,test}_images (N, rows, columns[, 3]) or (N, slices, rows, columns).

Rules:
  * Pickled arrays are refused, and so is a file that unpacks to more than this software accepts.
  * The official parts are the folds: train, val as validation, test.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from locum.common.errors import DataError
from locum.site_client.imaging.split import Fold

_PARTS: dict[str, Fold] = {"train": "train", "val": "validation", "test": "test"}
_MAX_UNPACKED = 4 << 30

Arrays = Mapping[tuple[Fold, str], npt.NDArray[np.generic]]


def row_counts(path: Path) -> dict[Fold, int]:
    """The number of rows of each part.

    Raises:
        DataError: the file cannot be read, lacks an array, or its images and labels differ in number.
    """
    arrays = _arrays(path, path.stat().st_mtime_ns)
    return {fold: len(array) for (fold, what), array in arrays.items() if what == "images"}


def row(path: Path, fold: Fold, index: int) -> tuple[npt.NDArray[np.generic], str]:
    """One image, axes as in the file, and its label as text."""
    arrays = _arrays(path, path.stat().st_mtime_ns)
    label = arrays[fold, "labels"][index].reshape(-1)[0]
    return arrays[fold, "images"][index], str(label)


@lru_cache(maxsize=2)
def _arrays(path: Path, mtime_ns: int) -> Arrays:  # noqa: ARG001 (a changed file is another key of the cache)
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(member.file_size for member in archive.infolist()))
        with np.load(path, allow_pickle=False) as file:
            loaded = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", "download or copy the file again") from None
    return MappingProxyType({key: array for part in _PARTS for key, array in _part(path, loaded, part)})


def _part(
    path: Path, loaded: dict[str, npt.NDArray[np.generic]], part: str
) -> list[tuple[tuple[Fold, str], npt.NDArray[np.generic]]]:
    names = {what: f"{part}_{what}" for what in ("images", "labels")}
    for name in names.values():
        if name not in loaded:
            raise DataError(f"{path} has no array '{name}'", f"it has the arrays: {', '.join(sorted(loaded))}")
    images, labels = loaded[names["images"]], loaded[names["labels"]]
    _check_shapes(path, part, images, labels)
    return [((_PARTS[part], "images"), images), ((_PARTS[part], "labels"), labels)]


def _check_size(path: Path, unpacked: int) -> None:
    if unpacked > _MAX_UNPACKED:
        raise DataError(
            f"{path} unpacks to {unpacked >> 20} MiB, more than {_MAX_UNPACKED >> 20}", "split the file into several"
        )


def _check_shapes(path: Path, part: str, images: npt.NDArray[np.generic], labels: npt.NDArray[np.generic]) -> None:
    if images.ndim not in (3, 4) or images.dtype.kind not in "iuf":
        raise DataError(
            f"{path}, {part}_images has shape {images.shape} and type {images.dtype}",
            "images are (N, rows, columns[, 3]) or (N, slices, rows, columns) numbers",
        )
    if len(images) != len(labels) or labels.size != len(labels):
        raise DataError(
            f"{path}, {part}_labels has shape {labels.shape} for {len(images)} images",
            "give one label for each image",
        )
