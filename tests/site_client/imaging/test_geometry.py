"""The geometry gate: right to the voxel, or refused."""

from __future__ import annotations

from dataclasses import replace

import highdicom
import nibabel
import numpy as np
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import ComputedRadiographyImageStorage, generate_uid

from locum.site_client.imaging import geometry
from locum.site_client.imaging.grids import narrow
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.stored import stored_values


def rotation(a, b, c):
    (ca, sa), (cb, sb), (cc, sc) = ((np.cos(angle), np.sin(angle)) for angle in (a, b, c))
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


def oblique(series, **changes):
    turn = rotation(0.3, -0.4, 0.7)
    row, column, normal = turn.T
    return series(orientation=(*row.round(12), *column.round(12)), step=tuple(2.5 * normal), **changes)


def reason_of(images):
    with pytest.raises(RefusedError) as caught:
        geometry.slices_volume(images)
    return caught.value.reason


@pytest.mark.parametrize("backwards", [False, True])
def test_every_voxel_of_an_oblique_series_keeps_its_value_and_its_place(series, backwards):
    case = oblique(series)
    if backwards:
        case = replace(case, step=tuple(-np.array(case.step)))
    images = case.images()
    shuffled = [images[index] for index in (3, 0, 4, 1, 2)]
    volume = geometry.slices_volume(shuffled)
    from_place = {}
    for i, j, k in np.ndindex(volume.array.shape):
        place = volume.affine @ (i, j, k, 1)
        from_place[tuple((place[:3] * (-1, -1, 1)).round(3) + 0.0)] = volume.array[i, j, k]
    for image, plane in zip(images, case.pixels(), strict=True):
        # PS3.3 C.7.6.2.1.1: position + column index × row direction × column spacing + row index × …
        origin, axes = np.array(image.ImagePositionPatient), np.reshape(image.ImageOrientationPatient, (2, 3))
        for (row, column), stored in np.ndenumerate(plane):
            place = origin + axes[0] * 0.8 * column + axes[1] * 0.5 * row
            assert from_place[tuple(place.round(3) + 0.0)] == int(stored) - 1024


def test_the_volume_is_the_one_of_highdicom(series):
    images = oblique(series).images()
    ours = geometry.slices_volume(images)
    theirs = highdicom.get_volume_from_series(images, apply_presentation_lut=False)
    assert np.array_equal(ours.array, theirs.array.T)
    lps = np.diag([-1, -1, 1, 1]) @ ours.affine
    assert np.allclose(lps[:, [2, 1, 0, 3]], theirs.affine)
    assert ours.array.dtype == np.int16


def test_a_multi_frame_object_gives_the_volume_of_its_slices(series):
    images = oblique(series).images()
    for image in images:
        image.StudyDate, image.StudyTime, image.StudyID, image.SeriesNumber = "20200101", "120000", "1", 1
        image.PatientBirthDate, image.PatientSex, image.ReferringPhysicianName = "", "", ""
        image.InstanceNumber, image.AcquisitionNumber, image.LossyImageCompression = 1, 1, "00"
    whole = LegacyConvertedEnhancedCTImage(images, generate_uid(), 1, generate_uid(), 1)
    from_frames, from_slices = geometry.multi_frame_volume(whole), geometry.slices_volume(images)
    assert np.array_equal(from_frames.array, from_slices.array)
    assert np.allclose(from_frames.affine, from_slices.affine)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_series_with_a_missing_slice_is_refused(series, missing):
    images = series().images()
    del images[missing]
    assert reason_of(images) == Reason.MISSING_SLICES


@pytest.mark.parametrize("degrees", [1, 2, 5, 20])
def test_a_tilted_gantry_is_refused(series, degrees):
    slant = 2.5 * np.tan(np.radians(degrees))
    assert reason_of(series(slices=24, step=(0.0, slant, 2.5)).images()) == Reason.TILTED


def test_uneven_slices_are_refused(series):
    images = series().images()
    images[2].ImagePositionPatient[2] += 0.6
    assert reason_of(images) == Reason.IRREGULAR_SPACING


def test_two_slices_at_one_position_are_refused(series):
    first, second = series(), series(number=2)
    assert reason_of(first.images() + second.images()[:1]) in {Reason.MIXED_GEOMETRY, Reason.DUPLICATED_POSITIONS}
    assert reason_of(first.images() + first.images()) == Reason.DUPLICATED_POSITIONS


@pytest.mark.parametrize(
    "change",
    [
        {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
        {"PixelSpacing": [0.5, 0.5]},
        {"FrameOfReferenceUID": "1.2.3"},
        {"Columns": 6},
    ],
)
def test_slices_that_differ_are_refused(series, change):
    images = series().images()
    for name, value in change.items():
        setattr(images[1], name, value)
    assert reason_of(images) == Reason.MIXED_GEOMETRY


@pytest.mark.parametrize(
    "over",
    [
        {"ImagePositionPatient": None},
        {"PixelSpacing": [0, 1]},
        {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
        {"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]},
    ],
)
def test_a_geometry_that_cannot_be_is_refused(series, over):
    assert reason_of(series(over=over).images()) == Reason.NO_GEOMETRY


def test_rounding_of_direction_cosines_is_no_difference(series):
    images = series().images()
    images[2].ImageOrientationPatient = [1, 1e-6, 0, -1e-6, 1, 0]
    assert geometry.slices_volume(images).array.shape == (7, 6, 5)


def test_each_slice_has_its_own_rescaling(series):
    images = series().images()
    for index, image in enumerate(images):
        image.RescaleSlope, image.RescaleIntercept = 0.5 + index / 4, 0
    volume = geometry.slices_volume(images)
    expected = series().pixels() * (0.5 + np.arange(5) / 4)[:, None, None]
    assert volume.array.dtype == np.float32
    # highdicom orders slices so that (slice, row, column) is right-handed: from the head downwards.
    assert np.array_equal(volume.array.T, expected[::-1].astype(np.float32))


def test_one_slice_is_a_picture_of_two_dimensions(series):
    volume = geometry.slices_volume(series(slices=1).images())
    assert volume.array.shape == (7, 6)
    assert volume.spacing == pytest.approx((0.8, 0.5))


@pytest.mark.parametrize("signed", [0, 1])
def test_monochrome1_becomes_monochrome2_at_full_depth(series, signed):
    over = {"SOPClassUID": ComputedRadiographyImageStorage, "PhotometricInterpretation": "MONOCHROME1"}
    over |= {"RescaleIntercept": 0, "BitsStored": 13, "HighBit": 12, "PixelRepresentation": signed}
    (image,) = series(slices=1, over=over).images()
    stored = series(slices=1).pixels()[0].astype(int)
    expected = -1 - stored if signed else 8191 - stored
    assert np.array_equal(geometry.radiograph(image).array.T, expected)


def test_a_volume_in_monochrome1_is_refused(series):
    assert reason_of(series(over={"PhotometricInterpretation": "MONOCHROME1"}).images()) == Reason.MONOCHROME1_VOLUME


@given(
    stored=st.integers(1, 16),
    signed=st.integers(0, 1),
    values=st.lists(st.integers(0, 65535), min_size=6, max_size=6),
)
def test_plain_pixels_are_those_of_pydicom_whatever_the_unused_bits_hold(series, stored, signed, values):
    over = {"BitsStored": stored, "HighBit": stored - 1, "PixelRepresentation": signed}
    (image,) = series(slices=1, shape=(2, 3), over=over).images()
    image.PixelData = np.array(values, "<u2").tobytes()
    assert np.array_equal(stored_values(image), image.pixel_array)


@given(st.lists(st.integers(-70000, 70000), min_size=1), st.sampled_from([np.int32, np.float64]))
def test_narrowing_changes_no_value(values, kind):
    assert narrow(np.array(values, kind)).tolist() == values


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(RefusedError, match="not_finite"):
        narrow(np.array([1.0, np.nan]))


def test_the_stored_file_has_the_values_and_places_of_the_gate(hospital, series):
    case = oblique(series)
    hospital.write(case)
    hospital.ingest()
    (found,) = hospital.catalog().cases((0.8, 0.1, 0.1))
    image, expected = nibabel.load(found.image), geometry.slices_volume(case.images())
    assert np.array_equal(np.asarray(image.dataobj), expected.array)
    for affine in (image.get_sform(), image.get_qform()):
        assert np.allclose(affine, expected.affine, atol=1e-4)
    assert image.get_data_dtype() == np.int16
