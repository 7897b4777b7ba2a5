"""Ultrasound and captures: what lies outside the regions never comes in, and colours are the right ones."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels import convert_color_space
from pydicom.uid import (
    EncapsulatedPDFStorage,
    ExplicitVRBigEndian,
    NuclearMedicineImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    XRayAngiographicImageStorage,
)

from locum.site_client.imaging.dicom import RELEASABLE, look, read
from locum.site_client.imaging.geometry import volume_of
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.reasons import Reason, RefusedError

KNOWN = Known(patient="0123456789abcdef", series="2.25.1", study="2.25.2")


def region(left, top, right, bottom, *, form=1, units=3, delta=0.05):
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = form, 1, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = units
    item.PhysicalDeltaX, item.PhysicalDeltaY = delta, -delta / 2
    return item


def scan(series, *, regions=(), shape=(40, 60), **over):
    """A grey ultrasound image of 8 bits, of which every pixel is bright."""
    changes = {"SOPClassUID": UltrasoundImageStorage, "Modality": "US", "RescaleIntercept": None, "RescaleSlope": None}
    changes |= {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelSpacing": None}
    (image,) = series(slices=1, shape=shape, over=changes).images()
    image.PixelData = np.full(shape, 200, np.uint8).tobytes()
    if regions:
        image.SequenceOfUltrasoundRegions = list(regions)
    for name, value in over.items():
        setattr(image, name, value)
    return image


def reason_of(image, released=()):
    item = Item("a", None, 0, 1, 1)
    return look(item, image, KNOWN, "2.25.3", released).reason


@pytest.mark.parametrize(
    ("over", "regions", "reason"),
    [
        ({"BurnedInAnnotation": "NO"}, 1, None),
        ({"BurnedInAnnotation": "NO"}, 0, Reason.NO_REGIONS),
        ({}, 1, Reason.BURNED_IN),
        ({"BurnedInAnnotation": "YES"}, 1, Reason.BURNED_IN),
        ({"Modality": "CT", "BurnedInAnnotation": "OTHER"}, 1, Reason.BURNED_IN),
        ({"SOPClassUID": SecondaryCaptureImageStorage, "BurnedInAnnotation": "NO"}, 0, Reason.SECONDARY_CAPTURE),
        ({"SOPClassUID": EncapsulatedPDFStorage}, 0, Reason.DOCUMENT),
        ({"SOPClassUID": NuclearMedicineImageStorage, "BurnedInAnnotation": "NO"}, 0, Reason.UNSUPPORTED_OBJECT),
        ({"SOPClassUID": XRayAngiographicImageStorage, "Modality": ""}, 0, Reason.BURNED_IN),
        ({"SOPClassUID": XRayAngiographicImageStorage, "BurnedInAnnotation": "NO"}, 0, None),
        ({"BurnedInAnnotation": "NO", "ImageType": ["DERIVED", "SECONDARY"]}, 1, Reason.DERIVED),
        ({"BurnedInAnnotation": "NO", "ImageType": ["ORIGINAL", "PRIMARY", "SCREEN SAVE"]}, 1, Reason.DERIVED),
        (
            {"SOPClassUID": UltrasoundMultiFrameImageStorage, "NumberOfFrames": 3, "BurnedInAnnotation": "NO"},
            1,
            Reason.SEVERAL_VOLUMES,
        ),
        ({"PatientID": "", "BurnedInAnnotation": "YES"}, 1, Reason.NO_PATIENT_ID),
    ],
)
def test_the_gate_keeps_out_what_may_carry_text(series, over, regions, reason):
    assert reason_of(scan(series, regions=[region(0, 0, 9, 9)] * regions, **over)) == reason


def test_a_look_at_a_capture_is_a_look_at_its_text_too(series):
    capture = scan(series, SOPClassUID=SecondaryCaptureImageStorage)
    assert reason_of(capture, [Reason.SECONDARY_CAPTURE]) is None
    capture.BurnedInAnnotation = "YES"
    assert reason_of(capture, [Reason.SECONDARY_CAPTURE]) == Reason.BURNED_IN
    assert reason_of(capture, [Reason.SECONDARY_CAPTURE, Reason.BURNED_IN]) is None


@pytest.mark.parametrize("reason", sorted(set(Reason) - RELEASABLE))
def test_no_other_reason_can_be_overruled(series, reason):
    document = scan(series, SOPClassUID=EncapsulatedPDFStorage)
    nobody = scan(series, regions=[region(0, 0, 9, 9)], PatientID="", BurnedInAnnotation="NO")
    assert reason_of(document, [reason]) == Reason.DOCUMENT
    assert reason_of(nobody, [reason]) == Reason.NO_PATIENT_ID


def test_nothing_outside_the_regions_stays(series):
    image = scan(series, regions=[region(10, 5, 19, 14), region(30, 8, 39, 20)])
    volume = volume_of([image])
    assert volume.array.shape == (30, 16)
    assert volume.spacing == pytest.approx((0.5, 0.25))
    inside = np.zeros((30, 16), bool)
    inside[:10, :10] = inside[20:, 3:] = True
    assert np.array_equal(volume.array, np.where(inside, 200, 0))


def test_colour_bars_traces_and_graphics_are_no_picture(series):
    shown = [
        region(10, 5, 19, 14),
        region(0, 0, 59, 3, form=0),
        region(0, 30, 59, 39, form=4),
        region(50, 0, 59, 39, form=5),
    ]
    assert volume_of([scan(series, regions=shown)]).array.shape == (10, 10)
    assert reason_of(scan(series, regions=shown[1:], BurnedInAnnotation="NO")) == Reason.NO_REGIONS


@pytest.mark.parametrize("other", [{"units": 0}, {"delta": 0.06}, {"form": 3}])
def test_a_size_is_kept_only_if_the_regions_agree_on_it(series, other):
    image = scan(series, regions=[region(10, 5, 19, 14), region(30, 5, 39, 14, **other)])
    agreed = "delta" not in other
    assert volume_of([image]).spacing == pytest.approx((0.5, 0.25) if agreed else (1, 1))


def test_regions_beyond_the_image_are_cut_at_its_edge(series):
    assert volume_of([scan(series, regions=[region(50, 30, 500, 500)])]).array.shape == (10, 10)


def test_a_crop_never_brings_back_what_lies_outside_the_regions(series):
    image = scan(series, regions=[region(10, 5, 39, 24)])
    assert volume_of([image], crop=(0, 0, 20, 40)).array.shape == (10, 20)
    with pytest.raises(RefusedError, match="burned_in"):
        volume_of([image], crop=(45, 0, 10, 10))


@pytest.mark.parametrize("crop", [(0, 0, 61, 40), (0, -1, 5, 5), (3, 3, 0, 4), (50, 0, 11, 5)])
def test_a_crop_that_is_not_of_this_image_is_refused(series, crop):
    with pytest.raises(RefusedError, match="burned_in"):
        volume_of([scan(series, SOPClassUID=SecondaryCaptureImageStorage)], crop=crop)


def test_a_crop_of_a_series_keeps_the_places_of_its_voxels(series):
    whole, part = volume_of(series().images()), volume_of(series().images(), crop=(2, 1, 4, 3))
    assert np.array_equal(part.array, whole.array[2:6, 1:4])
    assert np.allclose(part.affine @ (0, 0, 0, 1), whole.affine @ (2, 1, 0, 1))


def test_a_capture_in_grey_keeps_its_depth_and_loses_its_inversion(series):
    over = {"SOPClassUID": SecondaryCaptureImageStorage, "PhotometricInterpretation": "MONOCHROME1"}
    over |= {"RescaleIntercept": 0, "PixelSpacing": None, "NominalScannedPixelSpacing": [0.2, 0.3]}
    (image,) = series(slices=1, over=over).images()
    volume = volume_of([image])
    assert np.array_equal(volume.array.T, 4095 - series(slices=1).pixels()[0])
    assert volume.spacing == pytest.approx((0.3, 0.2))


def coloured(series, pixels, photometric, syntax=None, **over):
    image = scan(series, shape=pixels.shape[:2], SOPClassUID=SecondaryCaptureImageStorage)
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, photometric, 0
    image.PixelData = pixels.tobytes()
    for name, value in over.items():
        setattr(image, name, value)
    if syntax is not None:
        image.compress(syntax)
    return image


@pytest.fixture
def pixels():
    return np.random.default_rng(1).integers(0, 256, (12, 10, 3)).astype(np.uint8)


@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_red_green_and_blue_are_the_channels(series, pixels, syntax):
    volume = volume_of([coloured(series, pixels, "RGB", syntax)])
    assert volume.array.shape == (10, 12, 1, 3)
    assert np.array_equal(volume.array[:, :, 0], pixels.transpose(1, 0, 2))


def test_luminance_and_chrominance_become_red_green_and_blue(series, pixels):
    volume = volume_of([coloured(series, pixels, "YBR_FULL")])
    expected = convert_color_space(pixels, "YBR_FULL", "RGB")
    assert np.array_equal(volume.array[:, :, 0], expected.transpose(1, 0, 2))


@pytest.mark.parametrize("entry", [8, 16])
def test_a_palette_gives_its_colours_from_the_first_value_it_maps(series, entry):
    rng = np.random.default_rng(2)
    indices = rng.integers(0, 256, (12, 10)).astype(np.uint8)
    tables = rng.integers(0, 256, (3, 100)).astype(np.uint16)
    image = scan(series, shape=(12, 10), SOPClassUID=SecondaryCaptureImageStorage)
    image.PhotometricInterpretation, image.PixelData = "PALETTE COLOR", indices.tobytes()
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(image, f"{name}PaletteColorLookupTableDescriptor", [100, 50, entry])
        content = (table * 257).astype("<u2") if entry == 16 else table.astype(np.uint8)
        setattr(image, f"{name}PaletteColorLookupTableData", content.tobytes())
    expected = tables[:, np.clip(indices.astype(int) - 50, 0, 99)]
    saved = io.BytesIO()
    image.save_as(saved, enforce_file_format=True)
    volume = volume_of([pydicom.dcmread(io.BytesIO(saved.getvalue()))])
    assert np.array_equal(volume.array[:, :, 0], expected.transpose(2, 1, 0))


def test_colours_of_an_unknown_kind_are_refused(series, pixels):
    with pytest.raises(RefusedError, match="colour"):
        volume_of([coloured(series, pixels, "HSV")])


def test_a_palette_in_big_endian_gives_the_same_colours(shared):
    folder = shared / "dicom_codecs_objects/pydicom+pydicom-data/data_store/data"
    for little, big in (("OBXXXX1A.dcm", "OBXXXX1A_expb.dcm"), ("gdcm-US-ALOKA-16.dcm", "gdcm-US-ALOKA-16_big.dcm")):
        one, other = (read(folder / name, (folder / name).stat().st_size) for name in (little, big))
        assert other.file_meta.TransferSyntaxUID == ExplicitVRBigEndian
        assert np.array_equal(volume_of([one]).array, volume_of([other]).array)
        assert volume_of([one]).array.max() > 200


def test_a_photograph_in_jpeg_has_the_colours_that_another_decoder_gives(shared):
    path = shared / "deid_burned_in/deid-data/dicom-cookies/image1.dcm"
    image = read(path, path.stat().st_size)
    (frame,) = generate_frames(image["PixelData"].value, number_of_frames=1)
    expected = np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"), int)
    ours = volume_of([image]).array[:, :, 0].transpose(1, 0, 2)
    # Decoders round differently: a few grey levels, and no colour taken for another.
    assert np.abs(ours - expected).max() <= 12
    assert np.abs(ours - expected).mean() < 1


def test_real_ultrasound_loses_all_that_surrounds_its_picture(shared):
    path = shared / "deid_burned_in/deid-data/ultrasounds/GREYSCALE_IMAGE.dcm"
    image = read(path, path.stat().st_size)
    (item,) = image.SequenceOfUltrasoundRegions
    volume = volume_of([image])
    left, top = item.RegionLocationMinX0, item.RegionLocationMinY0
    right, bottom = item.RegionLocationMaxX1 + 1, item.RegionLocationMaxY1 + 1
    assert np.array_equal(volume.array.T, image.pixel_array[top:bottom, left:right])
    assert volume.spacing == pytest.approx((10 * item.PhysicalDeltaX, 10 * item.PhysicalDeltaY))
