"""The geometry gate: the slices of a series to one volume whose every voxel has a known place, or a reason.

Rules:
  * highdicom decides whether slices make a volume (equal distances, perpendicular stacking, one orientation);
    we only name the reason when it says no. Nothing is dropped, interpolated or guessed.
  * Stored values become modality values (PS3.3 C.11.1: HU for CT); windows (VOI) are not applied.
  * A radiograph in MONOCHROME1 is inverted to MONOCHROME2 over its stored range; a volume in MONOCHROME1 is refused.
  * Inside: arrays (slice, row, column) with LPS affines, as DICOM and highdicom have them. Outside, in `Volume`:
    arrays (column, row, slice) with RAS affines, as NIfTI has them. One slice is a two-dimensional image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
from highdicom.spatial import get_volume_positions
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.dicom import MAX_VOXELS
from locum.site_client.imaging.headers import count, numbers, text, voxels
from locum.site_client.imaging.reasons import Reason, RefusedError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

#: Largest difference of direction cosines, and relative difference of spacings, that is rounding: 0.05 mm in 500.
_TOLERANCE = 1e-4
_PLAIN = frozenset({ImplicitVRLittleEndian, ExplicitVRLittleEndian})
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


@dataclass(frozen=True)
class _Plane:
    """Where one slice lies: Image Plane and Frame of Reference modules (PS3.3 C.7.6.2, C.7.4.1)."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    size: tuple[int, int]
    frame_of_reference: str


def slices_volume(datasets: Sequence[Dataset]) -> Volume:
    """The volume of a series of single-frame CT, MR or PET images, in any order.

    Raises:
        RefusedError: the slices make no volume, or cannot be decoded.
    """
    _refuse_monochrome1(datasets)
    with damage_is(Reason.NO_GEOMETRY):
        planes = [_plane(dataset) for dataset in datasets]
    _check_alike(planes)
    if len(planes) * voxels(datasets[0]) > MAX_VOXELS:
        raise RefusedError(Reason.TOO_LARGE, f"{len(planes)} slices")
    order, distance = _stack(planes, datasets)
    array = narrow(_modality_values([datasets[index] for index in order], _stored))
    first = planes[order[0]]
    return _volume(array, first, distance)


def multi_frame_volume(dataset: Dataset) -> Volume:
    """The volume of one enhanced multi-frame object.

    Raises:
        RefusedError: its frames make no volume, or cannot be decoded.
    """
    _refuse_monochrome1([dataset])
    try:
        with damage_is(Reason.DECODE_FAILED):
            image = highdicom.Image.from_dataset(dataset, copy=False)
            volume = image.get_volume(dtype=np.float32, apply_presentation_lut=False, apply_real_world_transform=False)
    except RefusedError as refused:
        raise _frames_diagnosis(dataset) or refused from None
    return Volume(squeeze(narrow(volume.array.T)), to_ras(volume.affine))


def radiograph(dataset: Dataset) -> Volume:
    """A CR, DX or MG image: two-dimensional, at its full depth, in MONOCHROME2; it has no place in the patient.

    Raises:
        RefusedError: it cannot be decoded, or its spacing is impossible.
    """
    stored = _stored_monochrome2 if text(dataset, "PhotometricInterpretation") == "MONOCHROME1" else _stored
    array = narrow(_modality_values([dataset], stored))
    with damage_is(Reason.NO_GEOMETRY):
        given = numbers(dataset, "PixelSpacing") or numbers(dataset, "ImagerPixelSpacing")
        spacing = _floats(given or (1.0, 1.0), 2)
        _check_spacing(spacing)
    return Volume(array[0].T, np.diag([-spacing[1], -spacing[0], 1.0, 1.0]))


def picture(array: Array) -> Volume:
    """An image without place or size: (rows, columns[, 3]) or (slices, rows, columns), at 1 mm.

    Three colours become the channels of one slice: (column, row, 1, 3).
    """
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    if array.ndim == 3 and array.shape[2] == 3:
        return Volume(narrow(array.transpose(1, 0, 2)[:, :, None, :]), affine)
    return Volume(squeeze(narrow(array.T)), affine)


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


def _volume(array: Array, first: _Plane, distance: float) -> Volume:
    with damage_is(Reason.NO_GEOMETRY):
        volume = highdicom.Volume.from_attributes(
            array=array,
            image_position=first.position,
            image_orientation=first.orientation,
            pixel_spacing=first.spacing,
            spacing_between_slices=distance,
            coordinate_system="PATIENT",
        )
    return Volume(squeeze(array.T), to_ras(volume.affine))


def _refuse_monochrome1(datasets: Sequence[Dataset]) -> None:
    if any(text(dataset, "PhotometricInterpretation") == "MONOCHROME1" for dataset in datasets):
        raise RefusedError(Reason.MONOCHROME1_VOLUME)


def _plane(dataset: Dataset) -> _Plane:
    plane = _Plane(
        position=_floats(numbers(dataset, "ImagePositionPatient"), 3),
        orientation=_floats(numbers(dataset, "ImageOrientationPatient"), 6),
        spacing=_floats(numbers(dataset, "PixelSpacing"), 2),
        size=(count(dataset, "Rows"), count(dataset, "Columns")),
        frame_of_reference=text(dataset, "FrameOfReferenceUID"),
    )
    _check_spacing(plane.spacing)
    _check_orthonormal(plane.orientation)
    return plane


def _floats(values: Sequence[float], count: int) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise RefusedError(Reason.NO_GEOMETRY, f"{len(numbers)} values where {count} belong, or not finite")
    return numbers


def _check_spacing(spacing: tuple[float, ...]) -> None:
    if min(spacing) <= 0:
        raise RefusedError(Reason.NO_GEOMETRY, f"pixel spacing {spacing} mm")


def _check_orthonormal(orientation: tuple[float, ...]) -> None:
    axes = np.reshape(orientation, (2, 3))
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-3):
        raise RefusedError(Reason.NO_GEOMETRY, "the direction cosines are not perpendicular unit vectors")


def _check_alike(planes: Sequence[_Plane]) -> None:
    first = planes[0]
    if any(plane.size != first.size for plane in planes):
        raise RefusedError(Reason.MIXED_GEOMETRY, "slices of different numbers of rows or columns")
    if any(plane.frame_of_reference != first.frame_of_reference for plane in planes):
        raise RefusedError(Reason.MIXED_GEOMETRY, "several frames of reference")
    if not _all_close([plane.orientation for plane in planes], absolute=_TOLERANCE):
        raise RefusedError(Reason.MIXED_GEOMETRY, "several orientations")
    if not _all_close([plane.spacing for plane in planes], relative=_TOLERANCE):
        raise RefusedError(Reason.MIXED_GEOMETRY, "several pixel spacings")


def _all_close(rows: list[tuple[float, ...]], *, absolute: float = 0.0, relative: float = 0.0) -> bool:
    if all(row == rows[0] for row in rows):
        return True
    return bool(np.allclose(np.asarray(rows), rows[0], rtol=relative, atol=absolute))


def _stack(planes: Sequence[_Plane], datasets: Sequence[Dataset]) -> tuple[list[int], float]:
    """Indices of the planes from the first slice to the last, and the distance of neighbours in mm."""
    if len(planes) == 1:
        with damage_is(Reason.NO_GEOMETRY):
            return [0], _thickness(datasets[0])
    positions = np.asarray([plane.position for plane in planes])
    with damage_is(Reason.NO_GEOMETRY):
        distance, places = get_volume_positions(positions, planes[0].orientation)
    if distance is None or places is None:
        raise _diagnosis(positions, planes[0].orientation)
    order = [int(index) for index in np.argsort(places)]
    _check_places(positions[order], float(distance), planes[0])
    return order, float(distance)


def _check_places(positions: Floats, distance: float, plane: _Plane) -> None:
    """Refuse slices that lie a quarter of a pixel or more off the grid: highdicom lets 2.5° of tilt pass."""
    normal = np.cross(plane.orientation[:3], plane.orientation[3:])
    step = np.copysign(distance, (positions[-1] - positions[0]) @ normal) * normal
    errors = positions - positions[0] - np.outer(np.arange(len(positions)), step)
    worst = float(np.linalg.norm(errors, axis=1).max())
    if worst > min(plane.spacing) / 4:
        along = float(np.abs(errors @ normal).max())
        reason = Reason.IRREGULAR_SPACING if along > worst / 2 else Reason.TILTED
        raise RefusedError(reason, f"slices up to {worst:.3g} mm off the grid")


def _thickness(dataset: Dataset) -> float:
    given = numbers(dataset, "SpacingBetweenSlices") or numbers(dataset, "SliceThickness")
    return abs(given[0]) if given and given[0] else 1.0


def _diagnosis(positions: Floats, orientation: Sequence[float]) -> RefusedError:
    """Why positions that highdicom refused make no volume."""
    normal = np.cross(orientation[:3], orientation[3:])
    order = np.argsort(positions @ normal)
    steps = np.diff(positions[order], axis=0)
    gaps = steps @ normal
    if gaps.min() < 0.01 * max(float(np.median(gaps)), 0.01):
        return RefusedError(Reason.DUPLICATED_POSITIONS, f"{len(positions)} slices")
    slants = np.linalg.norm(steps - np.outer(gaps, normal), axis=1) / gaps
    if np.median(slants) > np.sqrt(2e-3):
        return RefusedError(Reason.TILTED, f"{np.degrees(np.arctan(np.median(slants))):.1f}° off perpendicular")
    multiples = gaps / np.median(gaps)
    if (np.abs(multiples - np.rint(multiples)) <= 0.1).all() and np.rint(multiples).max() > 1:
        missing = int((np.rint(multiples) - 1).sum())
        return RefusedError(Reason.MISSING_SLICES, f"{missing} missing between {len(positions)} slices")
    return RefusedError(Reason.IRREGULAR_SPACING, f"distances from {gaps.min():.3g} to {gaps.max():.3g} mm")


def _frames_diagnosis(dataset: Dataset) -> RefusedError | None:
    """Why the frames of a multi-frame object make no volume; None if their positions do make one."""
    try:
        with damage_is(Reason.NO_GEOMETRY, "functional groups"):
            positions, orientations = _frame_planes(dataset)
    except RefusedError as refused:
        return refused
    if not _all_close(orientations, absolute=_TOLERANCE):
        return RefusedError(Reason.MIXED_GEOMETRY, "several orientations")
    if len(positions) > 1 and get_volume_positions(positions, orientations[0])[0] is None:
        return _diagnosis(np.asarray(positions), orientations[0])
    return None


def _frame_planes(dataset: Dataset) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    shared = dataset.SharedFunctionalGroupsSequence[0]
    positions, orientations = [], []
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        position = frame.get("PlanePositionSequence") or shared.PlanePositionSequence
        orientation = frame.get("PlaneOrientationSequence") or shared.PlaneOrientationSequence
        positions.append(_floats(position[0].ImagePositionPatient, 3))
        orientations.append(_floats(orientation[0].ImageOrientationPatient, 6))
    return positions, orientations


def _stored(dataset: Dataset) -> Array:
    """Stored pixel values, (row, column)."""
    shape = (count(dataset, "Rows"), count(dataset, "Columns"))
    with damage_is(Reason.DECODE_FAILED):
        plain = _plain_pixels(dataset, shape)
        pixels = np.asarray(dataset.pixel_array) if plain is None else plain
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


def _stored_monochrome2(dataset: Dataset) -> Array:
    if "ModalityLUTSequence" in dataset:
        raise RefusedError(Reason.DECODE_FAILED, "MONOCHROME1 with a modality LUT: which of them inverts is open")
    pixels = _stored(dataset).astype(np.int64)
    highest = (1 << count(dataset, "BitsStored")) - 1
    return -1 - pixels if count(dataset, "PixelRepresentation") else highest - pixels


def _modality_values(datasets: Sequence[Dataset], stored: Callable[[Dataset], Array]) -> Array:
    """Stored values times slope plus intercept, (slice, row, column); in whole numbers where they are whole."""
    arrays = [stored(dataset) for dataset in datasets]
    if any("ModalityLUTSequence" in dataset for dataset in datasets):
        with damage_is(Reason.DECODE_FAILED, "modality LUT"):
            return np.stack(
                [apply_modality_lut(array, dataset) for array, dataset in zip(arrays, datasets, strict=True)]
            )
    with damage_is(Reason.DECODE_FAILED, "rescale"):
        scales = [_rescale(dataset) for dataset in datasets]
    pixels = np.stack(arrays)
    if all(scale == (1.0, 0.0) for scale in scales):
        return pixels
    kind = np.int64 if all(float(number).is_integer() for scale in scales for number in scale) else np.float64
    slopes, intercepts = (np.asarray(column, dtype=kind)[:, None, None] for column in zip(*scales, strict=True))
    return np.asarray(pixels * slopes + intercepts)


def _rescale(dataset: Dataset) -> tuple[float, float]:
    slope, intercept = numbers(dataset, "RescaleSlope"), numbers(dataset, "RescaleIntercept")
    scale = (slope[0] if slope else 1.0, intercept[0] if intercept else 0.0)
    if not np.isfinite(scale).all():
        raise RefusedError(Reason.DECODE_FAILED, "the rescale slope or intercept is not finite")
    return scale
