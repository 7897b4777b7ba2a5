"""Masks in RT Structure Sets (PS3.3 A.19): closed planar contours, filled on the grid of the image.

Rules:
  * A structure is chosen by its ROI Name, or by the code of its observation, written SCHEME:CODE.
  * A voxel belongs to a structure if its centre lies inside an odd number of its contours on that slice: contours
    inside others are holes (PS3.3 C.8.8.6.3). A centre on an edge belongs to one side of it, so that structures which
    share an edge share no voxel.
  * Every contour lies on a slice of the image, or the object does not match; a contour on every second slice or fewer
    would have to be interpolated, which would be a guess.
  * Contours of one structure that cross each other are refused: whether that is a hole is not said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import RTStructureSetStorage

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.dicom import MAX_VOXELS
from locum.site_client.imaging.grids import Array, Floats
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.labels.canvas import (
    OFF_GRID,
    Canvas,
    Drawing,
    Region,
    chosen,
)
from locum.site_client.imaging.labels.drawn import DrawnMasks
from locum.site_client.imaging.labels.given import Annotation
from locum.site_client.imaging.labels.objects import Found, ObjectIndex, code_name
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import ObjectMasks

CLASSES = frozenset({str(RTStructureSetStorage)})

#: Columns and rows.
Box = tuple[slice, slice]

_CONTOUR_DATA = Tag("ContourData")
_CLOSED = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})

#: By how many voxels a contour may reach beyond the centres of the outermost voxels.
_BEYOND = 1.0
#: Contours of one structure on one slice, at most: each is compared with each.
_MOST = 1000
#: The part of the smaller of two contours that may lie across the other's edge: a hole drawn up to the outline.
_ACROSS = 0.01


def rtstruct_masks(masks: ObjectMasks, keys: Keys, annotations: Iterable[Annotation]) -> DrawnMasks:
    """The masks of a site in RT Structure Sets."""

    def drawing(found: Found, _unit: Unit) -> Drawing:
        structures = open_structures(found.load(Reason.MASK_UNREADABLE), masks.segments)
        if found.cleaned and structures.nameless:
            raise RefusedError(
                Reason.MASK_MISSING, "de-identification emptied the names of its structures: option clean_descriptors"
            )
        return structures

    return DrawnMasks(masks, ObjectIndex(masks.path, CLASSES, annotations, keys, reader=_operator), drawing)


def _operator(dataset: Dataset) -> str:
    return str(dataset.get("OperatorsName") or "")


def open_structures(dataset: Dataset, segments: Mapping[str, int]) -> Structures:
    """An RT Structure Set, ready to be drawn.

    Raises:
        RefusedError: mask_unreadable or conflicting_labels.
    """
    with damage_is(Reason.MASK_UNREADABLE):
        contours = {
            int(item.ReferencedROINumber): list(item.get("ContourSequence") or ())
            for item in dataset.get("ROIContourSequence") or ()
        }
        named = {number: names for number, names in _names(dataset).items() if contours.get(number)}
        return Structures(chosen(named, segments), contours, named=any(any(names) for names in named.values()))


def _names(dataset: Dataset) -> dict[int, frozenset[str]]:
    """Of each ROI by number: its name and its codes."""
    codes: dict[int, set[str]] = {}
    for item in dataset.get("RTROIObservationsSequence") or ():
        found = {code_name(code) for code in item.get("RTROIIdentificationCodeSequence") or ()}
        codes.setdefault(int(item.ReferencedROINumber), set()).update(found)
    return {
        int(item.ROINumber): frozenset({str(item.get("ROIName", "")).strip(), *codes.get(int(item.ROINumber), ())})
        for item in dataset.get("StructureSetROISequence") or ()
    }


class Structures:
    """What one RT Structure Set states."""

    def __init__(
        self, numbers: Mapping[str, Sequence[int]], contours: Mapping[int, Sequence[Dataset]], *, named: bool
    ) -> None:
        """Structures.

        Args:
            numbers: key of `segments` to the numbers of the ROIs that it names.
            contours: of each ROI by number.
            named: whether any ROI with contours has a name or a code.
        """
        self._numbers = numbers
        self._contours = contours
        self._named = named

    @property
    def nameless(self) -> bool:
        """Whether no ROI with contours has a name or a code."""
        return not self._named

    @property
    def names(self) -> frozenset[str]:
        """As :attr:`Drawing.names`."""
        return frozenset(self._numbers)

    def paint(self, name: str, value: int, canvas: Canvas) -> None:
        """As :meth:`Drawing.paint`."""
        for number in self._numbers[name]:
            with damage_is(Reason.MASK_UNREADABLE, "contours"):
                outlines = _on_slices([_points(contour) for contour in self._contours[number]], canvas)
            for place, polygons in outlines.items():
                box = _box(polygons, canvas.shape[:2])
                canvas.put(canvas.slice(place)[box], filled(polygons, box), value)


def _points(contour: Dataset) -> Floats:
    """(n, 3), mm in LPS, of one contour."""
    kind = str(contour.get("ContourGeometricType", "")).strip()
    if kind not in _CLOSED:
        raise RefusedError(Reason.MASK_UNREADABLE, "a structure with contours that are not CLOSED_PLANAR")
    raw = contour.get_item(_CONTOUR_DATA).value
    # pydicom's own conversion of a number takes twenty times as long, and there are thousands a structure.
    numbers = raw.decode("ascii").strip(" \0").split("\\") if isinstance(raw, bytes) else raw
    points = np.asarray(numbers, dtype=np.float64).reshape(-1, 3)
    if len(points) != int(contour.NumberOfContourPoints) or not np.isfinite(points).all():
        raise RefusedError(Reason.MASK_UNREADABLE, "a contour's points are not as many as it says, or not finite")
    return points


def _on_slices(contours: Iterable[Floats], canvas: Canvas) -> dict[int, list[Floats]]:
    """By number of the slice: the polygons on it, each (n, 2) of column and row.

    Raises:
        RefusedError: mask_mismatch.
    """
    placed: dict[int, list[Floats]] = {}
    for points in contours:
        indices = canvas.indices(points)
        place = int(np.rint(np.median(indices[:, 2])))
        off = float(np.abs(indices[:, 2] - place).max())
        if off > OFF_GRID or not 0 <= place < canvas.shape[2]:
            raise RefusedError(Reason.MASK_MISMATCH, "a contour lies on no slice of the image")
        outside = np.maximum(-indices[:, :2], indices[:, :2] - np.asarray(canvas.shape[:2]) + 1).max()
        if outside > _BEYOND:
            raise RefusedError(Reason.MASK_MISMATCH, f"a contour reaches {outside:.3g} voxels beyond the image")
        placed.setdefault(place, []).append(indices[:, :2])
    _check_dense(sorted(placed))
    return placed


def _check_dense(places: Sequence[int]) -> None:
    """Refuse a structure of three slices or more of which no two are neighbours."""
    steps = np.diff(places)
    if len(steps) > 1 and steps.min() > 1:
        raise RefusedError(Reason.MASK_MISMATCH, f"contours lie on every {steps.min()}th slice at most")


def _box(polygons: Sequence[Floats], shape: tuple[int, int]) -> Box:
    """The pixels, in columns and rows, among which those inside polygons are."""
    low = np.min([polygon.min(axis=0) for polygon in polygons], axis=0)
    high = np.max([polygon.max(axis=0) for polygon in polygons], axis=0)
    first = np.clip(np.floor(low), 0, shape).astype(int)
    behind = np.clip(np.ceil(high) + 1, 0, shape).astype(int)
    return slice(int(first[0]), int(behind[0])), slice(int(first[1]), int(behind[1]))


def filled(polygons: Sequence[Floats], box: Box) -> Region:
    """(column, row): the pixels of a box whose centres lie inside an odd number of polygons.

    Args:
        polygons: each (n, 2): column and row, in pixels; closed from the last point to the first.
        box: columns and rows.

    Raises:
        RefusedError: mask_unreadable, if two polygons cross.
    """
    boxes = [_box([polygon], (box[0].stop, box[1].stop)) for polygon in polygons]
    if len(boxes) > _MOST or sum(map(_area, boxes)) > MAX_VOXELS:
        raise RefusedError(Reason.MASK_UNREADABLE, f"{len(boxes)} contours of one structure on one slice")
    pieces = [_Piece(own, _inside(polygon, own)) for own, polygon in zip(boxes, polygons, strict=True)]
    for one, other in _meeting(boxes):
        _check_nested(pieces[one], pieces[other])
    whole = np.zeros((box[0].stop - box[0].start, box[1].stop - box[1].start), dtype=bool)
    for piece in pieces:
        whole[_within(piece.box, box)] ^= piece.region
    return whole


@dataclass(frozen=True)
class _Piece:
    """The pixels inside one polygon, in its own box."""

    box: Box
    region: Region

    @cached_property
    def size(self) -> int:
        return int(np.count_nonzero(self.region))


def _area(box: Box) -> int:
    return int((box[0].stop - box[0].start) * (box[1].stop - box[1].start))


def _within(box: Box, other: Box) -> Box:
    """Where a box lies in the array of another, which holds it."""
    columns, rows = (
        slice(own.start - outer.start, own.stop - outer.start) for own, outer in zip(box, other, strict=True)
    )
    return columns, rows


def _meeting(boxes: Sequence[Box]) -> Iterator[tuple[int, int]]:
    """The pairs of boxes that share a pixel."""
    first, behind = (
        np.array([[getattr(axis, end) for axis in box] for box in boxes]).reshape(-1, 2) for end in ("start", "stop")
    )
    meet = np.logical_and.reduce(first[:, None] < behind[None], axis=2)
    for one, other in np.argwhere(np.triu(meet & meet.T, k=1)):
        yield int(one), int(other)


def _check_nested(one: _Piece, other: _Piece) -> None:
    """Refuse two contours that overlap in part, or are the same: the odd rule would say what nobody drew.

    Their boxes meet.
    """
    columns, rows = (
        slice(max(first.start, second.start), min(first.stop, second.stop))
        for first, second in zip(one.box, other.box, strict=True)
    )
    common, smaller = (columns, rows), min(one.size, other.size)
    shared = int(np.count_nonzero(one.region[_within(common, one.box)] & other.region[_within(common, other.box)]))
    if shared > _ACROSS * smaller and (smaller - shared > _ACROSS * smaller or one.size == other.size):
        raise RefusedError(Reason.MASK_UNREADABLE, "two contours of one structure cross, or are the same")


def _inside(polygon: Floats, box: Box) -> Region:
    """(column, row): the pixels of a box whose centres lie inside one polygon, by the even-odd rule along each row."""
    toggles = np.zeros((box[0].stop - box[0].start + 1, box[1].stop - box[1].start), dtype=np.int32)
    np.add.at(toggles, _crossings(polygon, box), 1)
    return np.asarray(np.cumsum(toggles, axis=0)[:-1] % 2 == 1)


def _crossings(polygon: Floats, box: Box) -> tuple[Array, Array]:
    """Where edges cross the centre lines of rows: the first pixel at or behind each crossing, and its row, in a box."""
    x0, y0 = polygon.T
    x1, y1 = np.roll(polygon, -1, axis=0).T
    columns, rows = box
    # Half-open, so that a corner on a row's centre line counts once.
    first = np.clip(np.ceil(np.minimum(y0, y1)), rows.start, rows.stop).astype(np.intp)
    behind = np.clip(np.ceil(np.maximum(y0, y1)), rows.start, rows.stop).astype(np.intp)
    length = behind - first
    edge = np.repeat(np.arange(len(polygon)), length)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(length) - length, length)
    across = x0[edge] + (row - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    column = np.clip(np.ceil(across), columns.start, columns.stop).astype(np.intp)
    return column - columns.start, row - rows.start
