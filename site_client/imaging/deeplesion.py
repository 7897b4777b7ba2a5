"""DeepLesion's layout: DL_info.csv beside Images_png/PATIENT_STUDY_SERIES/NNN.png.

K. Yan et al., "DeepLesion: automated mining of large-scale lesion annotations and universal lesion detection with deep
learning", J Med Imaging 5(3), 2018; names of columns and values as in the data set's own description.

Rules:
  * A case is a key slice with its neighbours within `context` slices; several lesions of one slice are one case.
  * HU = value - 32768. Pixels have the size, slices the distance that the table states. Where the slices lie in the
    patient is not stated: the grid starts at zero.
  * The split is the published one. The label is the coarse type of the lesion; in the training part none is stated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from locum.common.errors import DataError
from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.dicom import MAX_VOXELS
from locum.site_client.imaging.grids import Array, Volume, floats, narrow, squeeze
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.known import OLDEST, Known
from locum.site_client.imaging.protocol import Loaded, Protocol, placed
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sheets import read_sheet
from locum.site_client.imaging.sources import DeepLesionSource, SiteData
from locum.site_client.imaging.split import Fold

_TABLE = "DL_info.csv"
_IMAGES = "Images_png"
_HU_OFFSET = 32768
#: Train_Val_Test.
_FOLDS: Mapping[str, Fold] = {"1": "train", "2": "validation", "3": "test"}
#: Coarse_lesion_type; -1 is unknown.
_TYPES = {"1": "bone", "2": "abdomen", "3": "mediastinum", "4": "liver", "5": "lung", "6": "kidney", "7": "soft tissue",
          "8": "pelvis"}  # fmt: skip
_COLUMNS = ("File_name", "Patient_index", "Coarse_lesion_type", "Spacing_mm_px_", "Patient_gender", "Patient_age",
            "Train_Val_Test")  # fmt: skip

Rows = Sequence[Mapping[str, str]]


def items(site: SiteData, source: DeepLesionSource, number: int, keys: Keys) -> Iterator[Item]:
    """The key slices of the table, by name.

    Raises:
        DataError: the table is missing, is none, or names a file in another way.
    """
    for name, rows in sorted(_lesions(source).items()):
        path = source.path / _IMAGES / name
        person, patient = rows[0], f"DeepLesion {rows[0]['Patient_index']}"
        age = person["Patient_age"].partition(".")[0]
        known = Known(
            patient=keys.patient(patient),
            place=keys.place(patient),
            sex=person["Patient_gender"] if person["Patient_gender"] in {"F", "M"} else "",
            age=min(int(age), OLDEST) if age.isdigit() else None,
        )
        yield _item(site.root, path, number, source.context, known)


def load(source: DeepLesionSource, item: Item) -> Loaded:
    """One key slice and its neighbours, in Hounsfield units.

    Raises:
        RefusedError: missing_slices: a neighbour is not there; or a file cannot be read, or the spacing is impossible.
    """
    rows = _lesions(source)[_name(item)]
    with damage_is(Reason.NO_GEOMETRY, "Spacing_mm_px_"):
        across, down, between = floats([float(part) for part in rows[0]["Spacing_mm_px_"].split(",")], 3)
    if min(across, down, between) <= 0:
        raise RefusedError(Reason.NO_GEOMETRY, f"spacing {across}, {down}, {between} mm")
    planes = [_plane(path) for path in _slices(item.path, source.context)]
    if any(plane.shape != planes[0].shape for plane in planes):
        raise RefusedError(Reason.MIXED_GEOMETRY, "slices of different numbers of rows or columns")
    array = narrow(np.stack(planes).T.astype(np.int32) - _HU_OFFSET)
    volume = Volume(squeeze(array), np.diag([-across, -down, between, 1.0]))
    return Loaded(volume, "CT", protocol=placed(Protocol(parameters={"SpacingBetweenSlices": between}), volume))


def fold(source: DeepLesionSource, item: Item) -> Fold | None:
    """The published part that a key slice is in."""
    return _FOLDS.get(_lesions(source)[_name(item)][0]["Train_Val_Test"])


def label(source: DeepLesionSource, item: Item) -> str | None:
    """The type of a slice's lesions; None if it is not stated.

    Raises:
        RefusedError: conflicting_labels: they are of several types.
    """
    found = {_TYPES[row["Coarse_lesion_type"]] for row in _lesions(source)[_name(item)]
             if row["Coarse_lesion_type"] in _TYPES}  # fmt: skip
    if len(found) > 1:
        raise RefusedError(Reason.CONFLICTING_LABELS, f"lesions of {len(found)} types in one slice")
    return next(iter(found), None)


def mask(source: DeepLesionSource, item: Item) -> None:
    """The layout has boxes, and no masks."""


def _name(item: Item) -> str:
    return f"{item.path.parent.name}/{item.path.name}"


def _lesions(source: DeepLesionSource) -> Mapping[str, Rows]:
    """By 'PATIENT_STUDY_SERIES/NNN.png', the rows of the table."""
    path = source.path / _TABLE
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "it belongs beside Images_png") from None


@lru_cache(maxsize=2)
def _read(path: Path, mtime_ns: int) -> Mapping[str, Rows]:  # noqa: ARG001 (a changed file is another key)
    sheet = read_sheet(path)
    sheet.require(_COLUMNS)
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in sheet.rows:
        series, _, file = row.cells["File_name"].rpartition("_")
        if not series or not file.removesuffix(".png").isdigit() or "/" in series or os.sep in series:
            raise DataError(
                f"{path}, line {row.line}: '{row.cells['File_name']}' is no PATIENT_STUDY_SERIES_NNN.png",
                "take DL_info.csv as it was published",
            )
        found.setdefault(f"{series}/{file}", []).append({name: row.cells[name] for name in _COLUMNS})
    return found


def _slices(path: Path, context: int) -> list[Path]:
    """The files of a key slice and its neighbours, in the order of their numbers."""
    key, width = int(path.stem), len(path.stem)
    return [path.with_name(f"{key + step:0{width}}.png") for step in range(-context, context + 1)]


def _item(root: Path, path: Path, number: int, context: int, known: Known) -> Item:
    """The key slice; its size and time are those of all its files, so that a change of a neighbour is seen."""
    name = os.path.relpath(path, root)
    try:
        states = [file.stat() for file in _slices(path, context)]
    except FileNotFoundError:
        refused = (Reason.MISSING_SLICES, f"not all of {2 * context + 1} slices")
        return Item(name, path, number, -1, 0, known=known, refused=refused)
    except OSError:
        return Item(name, path, number, -1, 0, known=known)
    newest = max(state.st_mtime_ns for state in states)
    return Item(name, path, number, sum(state.st_size for state in states), newest, known=known)


def _plane(path: Path) -> Array:
    """One slice, (row, column), uint16."""
    try:
        with damage_is(Reason.UNREADABLE), Image.open(path, formats=["PNG"]) as image:
            if image.mode not in {"I;16", "I;16B", "I"}:
                raise RefusedError(Reason.COLOUR, f"a PNG of mode {image.mode}")
            if image.width * image.height > MAX_VOXELS:
                raise RefusedError(Reason.TOO_LARGE, f"{image.width} × {image.height} pixels")
            return np.asarray(image, dtype=np.uint16)
    except (SyntaxError, Image.DecompressionBombError, UnidentifiedImageError) as error:
        # What Pillow raises for damage besides the usual.
        raise RefusedError(Reason.UNREADABLE, type(error).__name__) from None
