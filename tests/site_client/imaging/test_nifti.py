"""NIfTI images: what is refused before anything of it is unpacked."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest

from locum.site_client.imaging.nifti import encode, read_image
from locum.site_client.imaging.reasons import Reason, RefusedError


def written(path, shape, kind, *, compressed):
    """A file whose header claims a shape; the zeros that follow are compressed to next to nothing."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(kind)
    header.set_data_shape(shape)
    header["vox_offset"] = 352
    header.set_sform(np.eye(4), code=1)
    content = bytes(header.binaryblock) + bytes(4) + bytes(1000)
    path.write_bytes(gzip.compress(content) if compressed else content)
    return path


def reason_of(path):
    with pytest.raises(RefusedError) as caught:
        read_image(path, path.stat().st_size)
    return caught.value.reason


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("shape", "kind", "reason"),
    [
        ((1024, 1024, 1024), np.uint8, Reason.TOO_LARGE),
        ((700, 700, 800), np.float64, Reason.TOO_LARGE),
        ((32767, 32767, 32767), np.int16, Reason.TOO_LARGE),
        ((700, 700, 800), np.int16, Reason.UNREADABLE),
        ((4, 4, 4, 17), np.int16, Reason.SEVERAL_VOLUMES),
        ((4, 4), np.complex64, Reason.COLOUR),
    ],
)
def test_what_a_header_claims_is_believed_before_memory_is_taken(tmp_path, shape, kind, reason, compressed):
    path = written(tmp_path / ("a.nii.gz" if compressed else "a.nii"), shape, kind, compressed=compressed)
    assert reason_of(path) == reason


def test_what_is_written_is_read_again(tmp_path):
    array = np.random.default_rng(0).integers(-1024, 3000, (5, 6, 7)).astype(np.int16)
    affine = np.array([[0, 0, 3.0, -9], [1.5, 0, 0, 4], [0, 1.5, 0, 2], [0, 0, 0, 1]])
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    volume = read_image(path, path.stat().st_size)
    path.write_bytes(encode(volume))
    again = read_image(path, path.stat().st_size)
    assert np.array_equal(again.array, array)
    assert np.allclose(again.affine, affine)
