"""NIfTI-1 files: how volumes lie in the store, and how a site's own NIfTI images and masks are read.

Rules:
  * The store holds uncompressed .nii (measured: 8 ms to load against 17 for .nii.gz) with an empty description:
    nothing of a header goes over but shape, type and affine.
  * A mask is laid onto the grid of its image by permuting and flipping axes only; one that would need
    resampling does not match.
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.dicom import MAX_VOXELS, check_size
from locum.site_client.imaging.grids import Array, Floats, Volume, narrow, squeeze
from locum.site_client.imaging.reasons import Reason, RefusedError

MAX_CHANNELS = 16
#: What an image may take in memory, whatever its file is compressed to.
MAX_BYTES = 2 << 30

#: Largest distance, in voxels, between a mask's voxel and the image's: rounding of the affines.
_OFF_GRID = 0.1


def encode(volume: Volume) -> bytes:
    """A volume as the bytes of a .nii file (NIfTI-1, little endian, sform and qform in scanner coordinates)."""
    header, voxels = parts_of(volume)
    return header + voxels.tobytes()


def parts_of(volume: Volume) -> tuple[bytes, Array]:
    """What :func:`encode` puts together: the header, and the voxels as they lie in the file, of the volume's memory."""
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_dtype(volume.array.dtype)
    header.set_data_shape(volume.array.shape)
    header.set_sform(volume.affine, code=1)
    if _is_orthogonal(volume.affine):
        # A quaternion cannot hold a shear: readers that prefer the qform would be silently wrong.
        header.set_qform(volume.affine, code=1)
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    return bytes(header.binaryblock) + bytes(4), np.ascontiguousarray(volume.array.T)


def _is_orthogonal(affine: Floats) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.allclose(axes.T @ axes, np.eye(3), atol=1e-4))


def read_image(path: Path, size: int) -> Volume:
    """An image of two or three dimensions, with channels last if it has four.

    Raises:
        RefusedError: unreadable, too_large, no_geometry, colour or not_finite.
    """
    check_size(size)
    with damage_is(Reason.UNREADABLE):
        return _read(path)


def _read(path: Path) -> Volume:
    image = nibabel.load(path)
    _check_header(image)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise RefusedError(Reason.NO_GEOMETRY, "the affine is singular")
    array = np.asarray(image.dataobj)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Volume(squeeze(narrow(array)), affine)


def _check_header(image: nibabel.Nifti1Image) -> None:
    shape = tuple(image.shape)
    number = int(np.prod(shape, dtype=object))
    if number > MAX_VOXELS or number * image.get_data_dtype().itemsize > MAX_BYTES:
        raise RefusedError(Reason.TOO_LARGE, f"shape {shape}, type {image.get_data_dtype()}")
    if image.get_data_dtype().fields is not None or image.get_data_dtype().kind == "c":
        raise RefusedError(Reason.COLOUR, f"type {image.get_data_dtype()}")
    if not 2 <= len(shape) <= 5 or (len(shape) == 5 and shape[4] != 1):
        raise RefusedError(Reason.NO_GEOMETRY, f"shape {shape}")
    if len(shape) > 3 and shape[3] > MAX_CHANNELS:
        raise RefusedError(Reason.SEVERAL_VOLUMES, f"{shape[3]} volumes in one file")
    if image.header.get_xyzt_units()[0] not in ("unknown", "mm"):
        raise RefusedError(Reason.NO_GEOMETRY, f"lengths in {image.header.get_xyzt_units()[0]}")


def read_mask(path: Path, image: Volume) -> Volume:
    """The mask of an image, on the image's grid, in uint8.

    Raises:
        RefusedError: mask_missing, mask_unreadable or mask_mismatch.
    """
    try:
        mask = read_image(path, path.stat().st_size)
    except FileNotFoundError:
        raise RefusedError(Reason.MASK_MISSING) from None
    except RefusedError as refused:
        raise RefusedError(Reason.MASK_UNREADABLE, str(refused)) from None
    if mask.array.dtype.kind == "f" or mask.array.min() < 0 or mask.array.max() > 255:
        raise RefusedError(Reason.MASK_UNREADABLE, f"values from {mask.array.min()} to {mask.array.max()}")
    return Volume(regrid(mask, image).astype(np.uint8), image.affine)


def regrid(mask: Volume, image: Volume) -> Array:
    """The mask's array with its axes permuted and flipped so that it lies on the image's grid.

    Raises:
        RefusedError: mask_mismatch.
    """
    shape = image.array.shape[:3]
    target = shape if len(shape) == 3 else (*shape, 1)
    array = mask.array if mask.array.ndim == 3 else mask.array[..., None]
    if array.ndim != 3:
        raise RefusedError(Reason.MASK_MISMATCH, f"shape {mask.array.shape}")
    move = _index_move(mask.affine, image.affine, flat=array.shape[2] == target[2] == 1)
    axes, signs = _axes(move)
    placed = array.transpose(axes)[tuple(slice(None, None, sign) for sign in signs)]
    if placed.shape != target:
        raise RefusedError(Reason.MASK_MISMATCH, f"shape {placed.shape} where the image has {target}")
    _check_offset(move, _exact_move(axes, signs, target), array.shape)
    return placed.reshape(shape)


def _index_move(mask: Floats, image: Floats, *, flat: bool) -> Floats:
    """(4, 4): from indices of the mask to indices of the image."""
    if flat:
        # The third axis of a two-dimensional image has no length of its own.
        mask = np.column_stack([mask[:, :2], image[:, 2], mask[:, 3]])
    return np.asarray(np.linalg.inv(image) @ mask, dtype=np.float64)


def _axes(move: Floats) -> tuple[list[int], list[int]]:
    """For each axis of the image: the axis of the mask that runs along it, and +1 or -1."""
    turn = np.rint(move[:3, :3])
    if not np.array_equal(np.abs(turn) @ np.abs(turn).T, np.eye(3)):
        raise RefusedError(Reason.MASK_MISMATCH, "its axes are not the axes of the image")
    axes = [int(axis) for axis in np.abs(turn).argmax(axis=1)]
    return axes, [int(turn[row, axis]) for row, axis in enumerate(axes)]


def _exact_move(axes: list[int], signs: list[int], shape: tuple[int, ...]) -> Floats:
    move = np.eye(4)
    move[:3, :3] = 0
    move[range(3), axes] = signs
    move[:3, 3] = [length - 1 if sign < 0 else 0 for sign, length in zip(signs, shape, strict=True)]
    return move


def _check_offset(move: Floats, exact: Floats, shape: tuple[int, ...]) -> None:
    ends = np.array([[0, length - 1] for length in shape])
    corners = np.stack([*np.meshgrid(*ends), np.ones((2, 2, 2))]).reshape(4, 8)
    off = float(np.abs((move - exact) @ corners).max())
    if off > _OFF_GRID:
        raise RefusedError(Reason.MASK_MISMATCH, f"up to {off:.3g} voxels off the grid of the image")
