"""One mask out of the regions that DICOM objects state, each region on a plane of the image's own grid.

Rules:
  * A plane is placed by permuting and flipping axes only: its pixels are the image's voxels, or it does not match.
  * A voxel that two segments of different value claim is refused, unless the site says that the later one wins.
  * Two objects that state the same segment differently are refused, unless the site says how readers agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from locum.site_client.imaging.grids import Array, Floats, Volume
from locum.site_client.imaging.labels.objects import standard
from locum.site_client.imaging.labels.readers import consensus_mask
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import ObjectMasks

Region = npt.NDArray[np.bool_]

#: Largest distance, in voxels, between a pixel of a plane and its voxel: rounding of positions and spacings.
OFF_GRID = 0.1
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Plane:
    """Where a picture of rows and columns lies: the Image Plane module (PS3.3 C.7.6.2).

    Attributes:
        position: of the centre of the first pixel, mm in LPS.
        orientation: direction cosines of a row, and of a column.
        spacing: mm between rows, and between columns.
    """

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]

    def affine(self) -> Floats:
        """(4, 3): from (column, row, 1) to millimetres in LPS; raises ValueError if a number is no number."""
        matrix = np.zeros((4, 3))
        matrix[:3, 0] = np.asarray(self.orientation[:3]) * self.spacing[1]
        matrix[:3, 1] = np.asarray(self.orientation[3:]) * self.spacing[0]
        matrix[:3, 2] = self.position
        matrix[3, 2] = 1
        if not np.isfinite(matrix).all():
            raise ValueError("a position, orientation or spacing is not finite")
        return matrix


class Canvas:
    """A mask in the making, on the grid of an image."""

    def __init__(self, image: Volume, *, later_wins: bool) -> None:
        self._shape = image.array.shape[:3]
        # A slice lies in one piece: planes are drawn ten times as fast.
        self._array = np.zeros((*self._shape, 1)[:3], dtype=np.uint8, order="F")
        self._to_index = np.linalg.inv(image.affine) @ _LPS_TO_RAS
        self._later_wins = later_wins

    @property
    def shape(self) -> tuple[int, int, int]:
        """(column, row, slice)."""
        columns, rows, slices = self._array.shape
        return columns, rows, slices

    def mask(self) -> Array:
        """What was drawn, in the shape of the image."""
        return self._array.reshape(self._shape, order="F")

    def indices(self, points: Floats) -> Floats:
        """(n, 3) points in millimetres, LPS, as (n, 3) indices of the image."""
        return np.asarray(points @ self._to_index[:3, :3].T + self._to_index[:3, 3], dtype=np.float64)

    def plane(self, plane: Plane, size: tuple[int, int]) -> Array:
        """The voxels, (row, column), on which a plane of so many rows and columns lies.

        Raises:
            RefusedError: mask_mismatch.
        """
        move = (self._to_index @ plane.affine())[:3]
        axes, signs = _axes(move)
        extent = (size[1], size[0])
        start = np.rint(move[:, 2]).astype(int)
        _check_on_grid(move, axes, signs, extent)
        index: list[slice | int] = [int(number) for number in start]
        for axis, sign, length in zip(axes, signs, extent, strict=True):
            first = int(start[axis]) if sign > 0 else int(start[axis]) - length + 1
            if first < 0 or first + length > self._array.shape[axis]:
                raise RefusedError(Reason.MASK_MISMATCH, "a plane lies outside the image")
            index[axis] = slice(first, first + length)
        across = ({0, 1, 2} - set(axes)).pop()
        if not 0 <= start[across] < self._array.shape[across]:
            raise RefusedError(Reason.MASK_MISMATCH, "a plane lies on no slice of the image")
        view = self._array[tuple(index)]
        # The voxels have the axes of the image in rising order: the column's comes first unless it is the later one.
        columns_first = view if axes[0] < axes[1] else view.T
        return columns_first[:: signs[0], :: signs[1]].T

    def picture(self, size: tuple[int, int]) -> Array:
        """The pixels, (row, column), of an image that has no place in the patient; raises RefusedError."""
        if self.shape != (size[1], size[0], 1):
            raise RefusedError(Reason.MASK_MISMATCH, f"{size[0]} rows and {size[1]} columns, unlike the image")
        return self._array[:, :, 0].T

    def put(self, voxels: Array, region: Region, value: int) -> None:
        """Give some voxels of a plane or slice a value.

        Raises:
            RefusedError: conflicting_labels.
        """
        if not self._later_wins:
            claimed = int(np.count_nonzero(region & (voxels != 0) & (voxels != value)))
            if claimed:
                raise RefusedError(Reason.CONFLICTING_LABELS, f"segments overlap in {claimed} voxels of a slice")
        voxels[region] = value

    def slice(self, number: int) -> Array:
        """The voxels, (column, row), of one slice."""
        return self._array[:, :, number]


def _axes(move: Floats) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a plane's columns and rows: the axis of the image along which they run, and +1 or -1."""
    turn = np.rint(move[:, :2])
    if not np.array_equal(turn.T @ turn, np.eye(2)):
        raise RefusedError(Reason.MASK_MISMATCH, "its pixels are not the voxels of the image")
    first, second = (int(np.abs(turn[:, step]).argmax()) for step in (0, 1))
    return (first, second), (int(turn[first, 0]), int(turn[second, 1]))


def _check_on_grid(move: Floats, axes: tuple[int, int], signs: tuple[int, int], extent: tuple[int, int]) -> None:
    exact = np.zeros((3, 3))
    exact[axes[0], 0], exact[axes[1], 1] = signs
    exact[:, 2] = np.rint(move[:, 2])
    corners = np.array([[0, extent[0] - 1, 0, extent[0] - 1], [0, 0, extent[1] - 1, extent[1] - 1], [1, 1, 1, 1]])
    off = float(np.abs((move - exact) @ corners).max())
    if off > OFF_GRID:
        raise RefusedError(Reason.MASK_MISMATCH, f"a plane lies up to {off:.3g} voxels off the grid of the image")


class Drawing(Protocol):
    """What one object states."""

    @property
    def names(self) -> frozenset[str]:
        """Those keys of `segments` that it has."""
        ...

    def paint(self, name: str, value: int, canvas: Canvas) -> None:
        """Draw what it has under a key; raises RefusedError."""
        ...


def one_mask(drawings: Sequence[tuple[str, Drawing]], masks: ObjectMasks, image: Volume) -> Volume:
    """The mask of an image, out of (reader, drawing) of each of its objects.

    Raises:
        RefusedError: mask_missing, mask_mismatch, mask_unreadable or conflicting_labels.
    """
    if masks.consensus is None:
        return _merged([drawing for _, drawing in drawings], masks, image)
    return consensus_mask(list(masks_by_reader(drawings, masks, image).values()), masks.consensus)


def masks_by_reader(drawings: Sequence[tuple[str, Drawing]], masks: ObjectMasks, image: Volume) -> dict[str, Volume]:
    """The mask that each reader drew of an image; an object that names no reader is a reader of its own."""
    grouped: dict[str, list[Drawing]] = {}
    for number, (reader, drawing) in enumerate(drawings, start=1):
        if drawing.names:
            grouped.setdefault(reader or f"object {number}", []).append(drawing)
    if not grouped:
        raise _nothing()
    return {reader: _merged(own, masks, image) for reader, own in grouped.items()}


def _merged(drawings: Sequence[Drawing], masks: ObjectMasks, image: Volume) -> Volume:
    having = [drawing for drawing in drawings if drawing.names]
    if not having:
        raise _nothing()
    if sum(len(drawing.names) for drawing in having) == len(frozenset().union(*(each.names for each in having))):
        return _drawn(having, masks, image)
    volumes = [_drawn([drawing], masks, image) for drawing in having]
    if any(not np.array_equal(volume.array, volumes[0].array) for volume in volumes):
        raise RefusedError(Reason.CONFLICTING_LABELS, f"{len(having)} objects draw the same segment differently")
    return volumes[0]


def _nothing() -> RefusedError:
    return RefusedError(Reason.MASK_MISSING, "its objects have none of the segments named")


def _drawn(drawings: Sequence[Drawing], masks: ObjectMasks, image: Volume) -> Volume:
    canvas = Canvas(image, later_wins=masks.overlap == "later")
    for name, value in masks.segments.items():
        for drawing in drawings:
            if name in drawing.names:
                drawing.paint(name, value, canvas)
    return Volume(canvas.mask(), image.affine)


def chosen(named: Mapping[int, frozenset[str]], segments: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Key of `segments` to the numbers of the segments that it names, out of all names of each number.

    Raises:
        RefusedError: conflicting_labels, if keys of different value name one segment.
    """
    keys: dict[str, list[int]] = {}
    for number, names in named.items():
        matching = [key for key in segments if key in names or standard(key) in names]
        if len({segments[key] for key in matching}) > 1:
            raise RefusedError(Reason.CONFLICTING_LABELS, f"two keys of `segments` name segment {number}")
        if matching:
            keys.setdefault(matching[0], []).append(number)
    return {key: tuple(numbers) for key, numbers in keys.items()}
