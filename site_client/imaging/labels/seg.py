"""Masks in DICOM Segmentation objects (PS3.3 A.51): BINARY, FRACTIONAL and LABELMAP.

Rules:
  * A segment is chosen by its label or by the code of its property type or category, written SCHEME:CODE.
  * Each frame is placed by its own position: frames may lie in any order, on some slices only, and may show a part
    of a slice. One that lies on no slice refuses the whole object. Slices without a frame are background.
  * Of a FRACTIONAL segment, what is at least half of the Maximum Fractional Value belongs to it.
  * A segmentation of a radiograph has no positions: it must have the image's rows and columns.
  * Tiled objects (whole slides) and parts of a concatenation are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import highdicom
import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.decoding import decoded
from locum.site_client.imaging.dicom import LABEL_MAP, MAX_VOXELS
from locum.site_client.imaging.grids import Array
from locum.site_client.imaging.headers import count, voxels
from locum.site_client.imaging.items import Unit
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.labels.canvas import Canvas, Drawing, Plane, Region, chosen
from locum.site_client.imaging.labels.drawn import DrawnMasks
from locum.site_client.imaging.labels.given import Annotation
from locum.site_client.imaging.labels.objects import (
    Found,
    ObjectIndex,
    code_name,
)
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import ObjectMasks

CLASSES = frozenset({str(SegmentationStorage), LABEL_MAP})

#: The least part of the Maximum Fractional Value that belongs to a segment.
FRACTION = 0.5
_GROUPS = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")


def seg_masks(masks: ObjectMasks, keys: Keys, annotations: Iterable[Annotation]) -> DrawnMasks:
    """The masks of a site in DICOM Segmentation objects."""

    def drawing(found: Found, unit: Unit) -> Drawing:
        dataset = found.load(Reason.MASK_UNREADABLE)
        return open_segmentation(dataset, masks.segments, placeless="/" in unit.key)

    return DrawnMasks(masks, ObjectIndex(masks.path, CLASSES, annotations, keys, reader=_creator), drawing)


def _creator(dataset: Dataset) -> str:
    return str(dataset.get("ContentCreatorName") or "")


def open_segmentation(dataset: Dataset, segments: Mapping[str, int], *, placeless: bool) -> SegDrawing:
    """A Segmentation object, ready to be drawn.

    Args:
        dataset: the object; it is changed.
        segments: label or SCHEME:CODE to value.
        placeless: whether its image has no place in the patient.

    Raises:
        RefusedError: mask_unreadable, mask_mismatch, conflicting_labels.
    """
    with damage_is(Reason.MASK_UNREADABLE):
        _check(dataset)
        segmentation = highdicom.seg.Segmentation.from_dataset(dataset, copy=False)
        return SegDrawing(segmentation, segments, placeless=placeless)


def _check(dataset: Dataset) -> None:
    if "TotalPixelMatrixRows" in dataset:
        raise RefusedError(Reason.MASK_MISMATCH, "a tiled segmentation, of a whole slide")
    if "InConcatenationNumber" in dataset:
        raise RefusedError(Reason.MASK_UNREADABLE, "a part of a concatenation")
    if not 0 < voxels(dataset) <= MAX_VOXELS:
        raise RefusedError(Reason.MASK_UNREADABLE, f"{voxels(dataset)} pixels")
    if len(dataset.get("PerFrameFunctionalGroupsSequence") or ()) != int(dataset.NumberOfFrames):
        raise RefusedError(Reason.MASK_UNREADABLE, "frames and their descriptions differ in number")


class SegDrawing:
    """What one Segmentation object states."""

    def __init__(
        self, segmentation: highdicom.seg.Segmentation, segments: Mapping[str, int], *, placeless: bool
    ) -> None:
        self._object = segmentation
        self._placeless = placeless
        self._size = (count(segmentation, "Rows"), count(segmentation, "Columns"))
        self._kind = str(segmentation.SegmentationType)
        self._numbers = chosen(
            {int(each.SegmentNumber): _names(each) for each in segmentation.SegmentSequence}, segments
        )
        self._of_segment = self._frames()
        self._stack: Array | None = None
        if self._kind == "FRACTIONAL" and int(segmentation.MaximumFractionalValue) < 1:
            raise RefusedError(Reason.MASK_UNREADABLE, "the maximum fractional value is 0")

    @property
    def names(self) -> frozenset[str]:
        """As :attr:`Drawing.names`."""
        return frozenset(self._numbers)

    def paint(self, name: str, value: int, canvas: Canvas) -> None:
        """As :meth:`Drawing.paint`."""
        for number in self._numbers[name]:
            for frame in self._of_segment.get(number, ()):
                with damage_is(Reason.MASK_UNREADABLE):
                    region = self._region(frame, number)
                    where = self._place(frame, canvas)
                canvas.put(where, region, value)

    def _frames(self) -> dict[int, list[int]]:
        """By number of a segment, the indices of its frames; of a label map, all frames for each of them."""
        groups = self._object.PerFrameFunctionalGroupsSequence
        if self._kind == "LABELMAP":
            wanted = (number for numbers in self._numbers.values() for number in numbers)
            return {number: list(range(len(groups))) for number in wanted}
        frames: dict[int, list[int]] = {}
        for index in range(len(groups)):
            number = int(self._group(index, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            frames.setdefault(number, []).append(index)
        return frames

    def _region(self, frame: int, number: int) -> Region:
        stored = self._stored(frame)
        if self._kind == "LABELMAP":
            return np.asarray(stored == number)
        if self._kind == "FRACTIONAL":
            return np.asarray(stored >= FRACTION * int(self._object.MaximumFractionalValue))
        return np.asarray(stored != 0)

    def _stored(self, frame: int) -> Array:
        """The stored values of a frame, (row, column)."""
        if self._stack is None and (self._kind == "LABELMAP" or self._object.transfer_syntax_uid.is_encapsulated):
            # Each segment of a label map is drawn out of all frames; and codecs run in a process of their own.
            self._stack = _all_frames(self._object)
        if self._stack is not None:
            return np.asarray(self._stack[frame])
        return np.asarray(self._object.get_stored_frame(frame, as_index=True))

    def _place(self, frame: int, canvas: Canvas) -> Array:
        if self._placeless:
            return canvas.picture(self._size)
        position, orientation, measures = (self._group(frame, name) for name in _GROUPS)
        plane = Plane(
            position=tuple(map(float, position.ImagePositionPatient)),
            orientation=tuple(map(float, orientation.ImageOrientationPatient)),
            spacing=tuple(map(float, measures.PixelSpacing)),
        )
        return canvas.plane(plane, self._size)

    def _group(self, frame: int, name: str) -> Dataset:
        """A functional group (PS3.3 C.7.6.16) of a frame, or the one that all frames share."""
        own = self._object.PerFrameFunctionalGroupsSequence[frame].get(name)
        return (own or self._object.SharedFunctionalGroupsSequence[0][name].value)[0]


def _all_frames(segmentation: highdicom.seg.Segmentation) -> Array:
    """(frame, row, column)."""
    if not segmentation.transfer_syntax_uid.is_encapsulated:
        return np.asarray(segmentation.get_stored_frames())
    try:
        pixels = decoded(segmentation)
    except RefusedError as refused:
        raise RefusedError(Reason.MASK_UNREADABLE, str(refused)) from None
    return pixels.reshape(-1, *pixels.shape[-2:])


def _names(segment: Dataset) -> frozenset[str]:
    coded = ("SegmentedPropertyTypeCodeSequence", "SegmentedPropertyCategoryCodeSequence")
    codes = {code_name(segment[name].value[0]) for name in coded if segment.get(name)}
    return frozenset({str(segment.get("SegmentLabel", "")).strip(), *codes})
