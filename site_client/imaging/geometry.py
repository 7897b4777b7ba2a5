"""The geometry gate: the images of one unit to one volume whose every voxel has a known place, or a reason.

Rules:
  * highdicom decides whether slices make a volume (equal distances, perpendicular stacking, one orientation);
    we only name the reason when it says no. Nothing is dropped, interpolated or guessed.
  * Stored values become modality values (PS3.3 C.11.1: HU for CT); windows (VOI) are not applied.
  * A volume in MONOCHROME1 is refused.
  * Inside: arrays (slice, row, column) with LPS affines, as DICOM and highdicom have them. Outside, in `Volume`:
    arrays (column, row, slice) with RAS affines, as NIfTI has them. One slice is a two-dimensional image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highdicom
import numpy as np
from highdicom.spatial import get_volume_positions
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.decoding import decoded
from locum.site_client.imaging.dicom import CAPTURES, MAX_VOXELS, MULTI_FRAME, RADIOGRAPHS, ULTRASOUND
from locum.site_client.imaging.grids import (
    Array,
    Box,
    Floats,
    Volume,
    cropped,
    floats,
    narrow,
    pixel_spacing,
    squeeze,
    to_ras,
)
from locum.site_client.imaging.headers import count, numbers, text, voxels
from locum.site_client.imaging.pictures import picture_of, radiograph
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.stored import modality_values, stored_values

#: Largest difference of direction cosines, and relative difference of spacings, that is rounding: 0.05 mm in 500.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Plane:
    """Where one slice lies: Image Plane and Frame of Reference modules (PS3.3 C.7.6.2, C.7.4.1)."""

    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    size: tuple[int, int]
    frame_of_reference: str


def volume_of(datasets: Sequence[Dataset], *, crop: Box | None = None) -> Volume:
    """The volume of one unit: of a series of slices, of one multi-frame object, or of one two-dimensional image.

    Args:
        datasets: its images, in any order.
        crop: what a person lets through: left, top, width, height in pixels of the stored image, in every slice.

    Raises:
        RefusedError: they make no volume, or cannot be decoded.
    """
    sop_class = text(datasets[0], "SOPClassUID")
    if sop_class in ULTRASOUND | CAPTURES:
        return picture_of(datasets[0], crop)
    if sop_class in RADIOGRAPHS:
        volume = radiograph(datasets[0])
    elif sop_class in MULTI_FRAME:
        volume = multi_frame_volume(datasets[0])
    else:
        volume = slices_volume(datasets)
    return cropped(volume, crop) if crop else volume


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
    array = narrow(modality_values([datasets[index] for index in order], stored_values))
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
            image = highdicom.Image.from_dataset(_plain(dataset), copy=False)
            volume = image.get_volume(dtype=np.float32, apply_presentation_lut=False, apply_real_world_transform=False)
    except RefusedError as refused:
        raise _frames_diagnosis(dataset) or refused from None
    return Volume(squeeze(narrow(volume.array.T)), to_ras(volume.affine))


def _plain(dataset: Dataset) -> Dataset:
    """The same object without compression, so that no codec runs in this process."""
    if not UID(dataset.file_meta.TransferSyntaxUID).is_compressed:
        return dataset
    pixels = decoded(dataset)
    plain = Dataset()
    for element in dataset.elements():
        plain[element.tag] = element
    plain.add_new("PixelData", "OW", pixels.tobytes())
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return plain


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
        position=floats(numbers(dataset, "ImagePositionPatient"), 3),
        orientation=floats(numbers(dataset, "ImageOrientationPatient"), 6),
        spacing=pixel_spacing(numbers(dataset, "PixelSpacing")),
        size=(count(dataset, "Rows"), count(dataset, "Columns")),
        frame_of_reference=text(dataset, "FrameOfReferenceUID"),
    )
    _check_orthonormal(plane.orientation)
    return plane


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
        positions.append(floats(position[0].ImagePositionPatient, 3))
        orientations.append(floats(orientation[0].ImageOrientationPatient, 6))
    return positions, orientations
