"""Where the picture of an ultrasound image lies: US Region Calibration module (PS3.3 C.8.5.5).

Rules:
  * Names, dates and settings are written around the regions: only what lies in one of them is picture.
  * A region counts if it holds an image (2D, M-mode, spectral), not a colour bar, a trace or a graphic.
  * Pixels have a size in mm only if the two-dimensional regions say one in cm, and all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset

from locum.site_client.imaging.grids import Box
from locum.site_client.imaging.headers import count

#: Region Spatial Format (0018,6012): 2D, M-Mode, Spectral.
_PICTURES = frozenset({1, 2, 3})
_TWO_DIMENSIONAL = 1
#: Physical Units (0018,6024): centimetres.
_CENTIMETRES = 3
_MM_PER_CM = 10.0


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the picture.

    Attributes:
        box: its pixels, within the image.
        spacing: millimetres between rows and between columns; None if the region does not say so.
    """

    box: Box
    spacing: tuple[float, float] | None


def regions(dataset: Dataset) -> tuple[Region, ...]:
    """The regions that hold an image, as far as they lie within it; raises what a damaged header raises."""
    found = (_region(item, dataset) for item in dataset.get("SequenceOfUltrasoundRegions") or ())
    return tuple(region for region in found if region is not None)


def bounding_box(boxes: Sequence[Box]) -> Box:
    """The smallest rectangle that holds them all."""
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return left, top, right - left, bottom - top


def pixel_size(found: Sequence[Region]) -> tuple[float, float] | None:
    """Millimetres between rows and between columns of the whole picture, if its regions agree on them."""
    sizes = [region.spacing for region in found]
    first = next((size for size in sizes if size is not None), None)
    if first is None or any(size is not None and not np.allclose(size, first, rtol=1e-3) for size in sizes):
        return None
    return first


def _region(item: Dataset, dataset: Dataset) -> Region | None:
    form = int(item.get("RegionSpatialFormat") or 0)
    if form not in _PICTURES:
        return None
    # C.8.5.5.1.1 to .4: the last row and column belong to the region.
    left, top = max(int(item.RegionLocationMinX0), 0), max(int(item.RegionLocationMinY0), 0)
    right = min(int(item.RegionLocationMaxX1) + 1, count(dataset, "Columns"))
    bottom = min(int(item.RegionLocationMaxY1) + 1, count(dataset, "Rows"))
    if right <= left or bottom <= top:
        return None
    return Region((left, top, right - left, bottom - top), _spacing(item) if form == _TWO_DIMENSIONAL else None)


def _spacing(item: Dataset) -> tuple[float, float] | None:
    units = (item.get("PhysicalUnitsYDirection"), item.get("PhysicalUnitsXDirection"))
    deltas = [abs(float(item.get(name) or 0)) * _MM_PER_CM for name in ("PhysicalDeltaY", "PhysicalDeltaX")]
    if units != (_CENTIMETRES, _CENTIMETRES) or not (np.isfinite(deltas).all() and min(deltas) > 0):
        return None
    return deltas[0], deltas[1]
