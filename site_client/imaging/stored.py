"""The values that a DICOM image stores, and what they stand for (PS3.3 C.7.6.3, C.11.1).

Rules:
  * Plain little-endian pixels are read as they lie; everything else is decoded by pydicom and its codecs.
  * Stored values become modality values (HU for CT); windows (VOI) are not applied.
  * MONOCHROME1 is inverted over the stored range, before the modality transformation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.decoding import decoded
from locum.site_client.imaging.grids import Array
from locum.site_client.imaging.headers import count, numbers
from locum.site_client.imaging.reasons import Reason, RefusedError

_PLAIN = frozenset({ImplicitVRLittleEndian, ExplicitVRLittleEndian})


def stored_values(dataset: Dataset) -> Array:
    """Stored pixel values of a grey image of one frame, (row, column); raises RefusedError: decode_failed."""
    shape = (count(dataset, "Rows"), count(dataset, "Columns"))
    with damage_is(Reason.DECODE_FAILED):
        plain = _plain_pixels(dataset, shape)
        pixels = decoded(dataset) if plain is None else plain
    if pixels.shape != shape:
        raise RefusedError(Reason.DECODE_FAILED, f"decoded to shape {pixels.shape}")
    return pixels


def _plain_pixels(dataset: Dataset, shape: tuple[int, int]) -> Array | None:
    """What pydicom's `pixel_array` gives for plain little-endian pixels, in a twentieth of the time; else None."""
    bits, stored = count(dataset, "BitsAllocated"), count(dataset, "BitsStored")
    high, signed = count(dataset, "HighBit"), count(dataset, "PixelRepresentation")
    if dataset.file_meta.TransferSyntaxUID not in _PLAIN or bits not in (8, 16) or high != stored - 1:
        return None
    content = dataset.get_item("PixelData").value
    length = shape[0] * shape[1] * bits // 8
    if len(content) != length + length % 2:
        return None
    pixels = np.frombuffer(content, f"<{'i' if signed else 'u'}{bits // 8}", shape[0] * shape[1]).reshape(shape)
    unused = bits - stored
    # PS3.5 8.1.1: bits above the stored ones may hold anything; shifting there and back also extends the sign.
    return (pixels << unused) >> unused if unused else pixels


def stored_monochrome2(dataset: Dataset) -> Array:
    """Stored pixel values of an image in MONOCHROME1, inverted over the stored range, (row, column)."""
    if "ModalityLUTSequence" in dataset:
        raise RefusedError(Reason.DECODE_FAILED, "MONOCHROME1 with a modality LUT: which of them inverts is open")
    pixels = stored_values(dataset).astype(np.int64)
    highest = (1 << count(dataset, "BitsStored")) - 1
    return -1 - pixels if count(dataset, "PixelRepresentation") else highest - pixels


def modality_values(datasets: Sequence[Dataset], stored: Callable[[Dataset], Array]) -> Array:
    """Stored values times slope plus intercept, (slice, row, column); in whole numbers where they are whole.

    Raises:
        RefusedError: decode_failed.
    """
    arrays = [stored(dataset) for dataset in datasets]
    if any("ModalityLUTSequence" in dataset for dataset in datasets):
        with damage_is(Reason.DECODE_FAILED, "modality LUT"):
            return np.stack(
                [apply_modality_lut(array, dataset) for array, dataset in zip(arrays, datasets, strict=True)]
            )
    with damage_is(Reason.DECODE_FAILED, "rescale"):
        scales = [_rescale(dataset) for dataset in datasets]
    if all(scale == (1.0, 0.0) for scale in scales):
        return np.stack(arrays)
    values = np.empty((len(arrays), *arrays[0].shape), _kind(arrays, scales))
    # Slice by slice: a whole volume at once would go through memory several times.
    for place, array, (slope, intercept) in zip(values, arrays, scales, strict=True):
        _rescaled(array, slope, intercept, place)
    return values


def _rescaled(array: Array, slope: float, intercept: float, place: Array) -> None:
    """Write slope · array + intercept; in whole numbers modulo their width, which is exact where the result fits."""
    if place.dtype.kind == "f":
        np.multiply(array, slope, out=place)
        np.add(place, intercept, out=place)
        return
    slopes, intercepts = (np.asarray(int(number)).astype(place.dtype) for number in (slope, intercept))
    np.multiply(array.astype(place.dtype, copy=False), slopes, out=place)
    np.add(place, intercepts, out=place)


def _kind(arrays: Sequence[Array], scales: Sequence[tuple[float, float]]) -> type[np.number[Any]]:
    """The narrowest of a few types that holds every value of these slices exactly."""
    if not all(number.is_integer() for scale in scales for number in scale):
        return np.float64
    ends = [
        int(slope) * int(end) + int(intercept)
        for array, (slope, intercept) in zip(arrays, scales, strict=True)
        for end in (array.min(initial=0), array.max(initial=0))
    ]
    kinds: tuple[type[np.signedinteger[Any]], ...] = (np.int16, np.int32, np.int64)
    fitting = (kind for kind in kinds if np.iinfo(kind).min <= min(ends) and max(ends) <= np.iinfo(kind).max)
    return next(fitting, np.float64)


def _rescale(dataset: Dataset) -> tuple[float, float]:
    slope, intercept = numbers(dataset, "RescaleSlope"), numbers(dataset, "RescaleIntercept")
    scale = (slope[0] if slope else 1.0, intercept[0] if intercept else 0.0)
    if not np.isfinite(scale).all():
        raise RefusedError(Reason.DECODE_FAILED, "the rescale slope or intercept is not finite")
    return scale
