"""Arrays with a place: the one kind of image that leaves this folder, and what every reader of images does to it.

Rules:
  * Arrays are (column, row[, slice[, channel]]) with RAS affines, as NIfTI has them.
  * Values are kept in the smallest of int16, uint16, int32 and float32 that changes none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from locum.site_client.imaging.reasons import Reason, RefusedError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
#: A rectangle of pixels: left, top, width, height.
Box = tuple[int, int, int, int]

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Volume:
    """An image on a grid.

    Attributes:
        array: (column, row), (column, row, slice) or (column, row, slice, channel).
        affine: (4, 4), index to millimetres in RAS (right, anterior, superior).
    """

    array: Array
    affine: Floats

    @property
    def spacing(self) -> tuple[float, ...]:
        """Millimetres between neighbours along each axis of space that the array has."""
        axes = min(self.array.ndim, 3)
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :axes], axis=0))


def picture(array: Array) -> Volume:
    """An image without place or size: (rows, columns[, 3]) or (slices, rows, columns), at 1 mm.

    Three colours become the channels of one slice: (column, row, 1, 3).
    """
    if array.ndim == 3 and array.shape[2] == 3:
        return at_spacing(narrow(array.transpose(1, 0, 2)[:, :, None, :]), (1.0, 1.0))
    return at_spacing(squeeze(narrow(array.T)), (1.0, 1.0))


def at_spacing(array: Array, spacing: tuple[float, float]) -> Volume:
    """A picture whose rows and columns are so many millimetres apart; it has no place in the patient."""
    return Volume(array, np.diag([-spacing[1], -spacing[0], 1.0, 1.0]))


def cropped(volume: Volume, box: Box) -> Volume:
    """The part of an image within a rectangle of its columns and rows, in every slice; its voxels keep their places.

    Raises:
        RefusedError: burned_in: the rectangle does not lie within the image, so that nobody has looked at this part.
    """
    left, top, width, height = box
    columns, rows = volume.array.shape[:2]
    if min(left, top) < 0 or min(width, height) < 1 or left + width > columns or top + height > rows:
        raise RefusedError(Reason.BURNED_IN, f"the crop {box} is not within {columns} × {rows} pixels")
    affine = volume.affine.copy()
    affine[:, 3] = volume.affine @ (left, top, 0, 1)
    return Volume(volume.array[left : left + width, top : top + height], affine)


def to_ras(affine: Floats) -> Floats:
    """From LPS and (slice, row, column) to RAS and (column, row, slice)."""
    return np.asarray(_LPS_TO_RAS @ affine[:, [2, 1, 0, 3]], dtype=np.float64)


def narrow(array: Array) -> Array:
    """The same values in int16, uint16 or int32 if they are whole numbers that fit, else in float32.

    Raises:
        RefusedError: a value is infinite or no number.
    """
    if array.size == 0:
        raise RefusedError(Reason.NO_PIXELS)
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise RefusedError(Reason.NOT_FINITE)
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        return array.astype(np.float32, copy=False)
    for kind in (np.int16, np.uint16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return array.astype(kind, copy=False)
    return array.astype(np.float32, copy=False)


def squeeze(array: Array) -> Array:
    """An image of one slice as a two-dimensional array; all others as they are."""
    return array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array


def floats(values: Sequence[float], count: int) -> tuple[float, ...]:
    """So many finite numbers; raises RefusedError: no_geometry."""
    numbers = tuple(float(value) for value in values)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise RefusedError(Reason.NO_GEOMETRY, f"{len(numbers)} values where {count} belong, or not finite")
    return numbers


def pixel_spacing(values: Sequence[float]) -> tuple[float, float]:
    """Millimetres between rows and between columns; raises RefusedError: no_geometry."""
    rows, columns = floats(values, 2)
    if min(rows, columns) <= 0:
        raise RefusedError(Reason.NO_GEOMETRY, f"pixel spacing {(rows, columns)} mm")
    return rows, columns
