"""What is recorded of how an image was taken."""

from __future__ import annotations

import json
import pkgutil

import numpy as np
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage, generate_uid

from locum.site_client.imaging.dicom import read
from locum.site_client.imaging.grids import Volume
from locum.site_client.imaging.protocol import _REGIONS, Protocol, facts_of, placed, vendor


@pytest.mark.parametrize(
    ("written", "counted"),
    [
        ("SIEMENS", "Siemens"),
        ("Siemens Healthineers", "Siemens"),
        ("Siemens Healthcare GmbH", "Siemens"),
        ("GE", "GE"),
        ("GE MEDICAL SYSTEMS", "GE"),
        ("Philips Medical Systems", "Philips"),
        ("TOSHIBA_MEC", "Canon"),
        ("CANON_MEC", "Canon"),
        ("Gemini  Imaging ", "Gemini Imaging"),
        ("", ""),
    ],
)
def test_spellings_of_one_maker_are_counted_as_one(written, counted):
    assert vendor(written) == counted


def test_a_series_has_the_median_of_its_numbers_whatever_the_order(series):
    images = series(over={"KVP": 120}).images()
    for image in images:
        image[0x0018, 0x0080] = RawDataElement(Tag("RepetitionTime"), "DS", 4, b"fast", 0, False, True)
    for image, time in zip(images, (500, 900, 600, 700, 800), strict=True):
        image.ExposureTime = time
    protocol = facts_of(images)
    assert protocol == facts_of(images[::-1])
    assert protocol.parameters == {"KVP": 120.0, "ExposureTime": 700.0, "SliceThickness": 2.5}
    assert (protocol.sop_class, protocol.slices, protocol.orientation) == (CTImageStorage, 5, "axial")


@pytest.mark.parametrize(
    ("cosines", "plane"),
    [
        ((1, 0, 0, 0, 1, 0), "axial"),
        ((1, 0, 0, 0, 0, -1), "coronal"),
        ((0, 1, 0, 0, 0, -1), "sagittal"),
        ((0.8, 0.6, 0, -0.6, 0.8, 0), "axial"),
        ((1, 0, 0, 0, 0.6, -0.8), "coronal"),
    ],
)
def test_the_plane_is_the_nearest_one(series, cosines, plane):
    assert facts_of(series(orientation=cosines).images()).orientation == plane


def test_a_converted_object_says_what_its_slices_said(series):
    images = series(over={"KVP": 100, "BodyPartExamined": "CHEST"}).images()
    for image in images:
        image.StudyDate, image.StudyTime, image.StudyID, image.SeriesNumber = "20200101", "120000", "1", 1
        image.PatientBirthDate, image.PatientSex, image.ReferringPhysicianName = "", "", ""
        image.InstanceNumber, image.AcquisitionNumber, image.LossyImageCompression = 1, 1, "00"
    whole = facts_of(LegacyConvertedEnhancedCTImage(images, generate_uid(), 1, generate_uid(), 1))
    assert (whole.body_part, whole.orientation, whole.slices) == ("CHEST", "axial", 5)
    assert whole.parameters["KVP"] == 100
    assert whole.parameters["SliceThickness"] == 2.5


@pytest.mark.parametrize("code", [("51185008", "SCT"), ("816094009", "SCT"), ("T-D3000", "SRT")])
def test_a_coded_region_is_a_body_part(series, code):
    images = series(slices=1).images()
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator = code
    images[0].AnatomicRegionSequence = [region]
    assert facts_of(images).body_part == "CHEST"


def test_the_regions_are_those_of_the_standard():
    # highdicom ships the whole table of PS3.16 annex L.
    table = json.loads(pkgutil.get_data("highdicom", "_standard/anatomic_regions.json") or b"")
    standard = {part: code for part, (_, code, *_) in table.items()}
    assert {standard[part] for part in _REGIONS.values()} <= set(_REGIONS)
    assert all(code == standard[part] for code, part in _REGIONS.items() if code in standard.values())


def test_enhanced_mr_from_a_scanner_has_its_numbers_in_the_classic_units(shared):

    (path, *_) = sorted((shared / "dicom_vendor_sites/site_canon_enhanced").glob("*.gz"))
    protocol = facts_of(read(path, path.stat().st_size))
    assert (protocol.body_part, protocol.orientation, protocol.slices) == ("HEAD", "axial", 520)
    expected = {"RepetitionTime": 10000.0, "EchoTime": 79.0, "FlipAngle": 90.0, "MagneticFieldStrength": 3.0}
    assert expected.items() <= protocol.parameters.items()


def test_a_volume_without_a_header_has_the_plane_of_its_slices():
    stack = Volume(np.zeros((3, 4, 5)), np.array([[0, 0, 2.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
    assert placed(Protocol(), stack) == Protocol(orientation="sagittal", slices=5)
    assert placed(Protocol(), Volume(np.zeros((3, 4)), np.eye(4))) == Protocol()
