"""Every file of the planted-identifier sets and of five scanners: nothing of the input is in the output."""

from __future__ import annotations

from functools import partial

import pydicom
import pytest
from pydicom.dataset import Dataset

from locum.site_client.imaging.reasons import Reason, RefusedError
from tests.site_client.imaging.deid.checker import leaks, secrets_of
from tests.site_client.imaging.deid.objects import ALL_OPTIONS, engine, files_below, loaded, outcome

DEFAULT = ("modified_dates", "device_identity", "patient_characteristics")
GATES_AND_GEOMETRY = [
    "Rows",
    "Columns",
    "BitsStored",
    "PixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "RescaleSlope",
    "ImageType",
    "BurnedInAnnotation",
    "Modality",
    "SOPClassUID",
    "NumberOfFrames",
    "PhotometricInterpretation",
]
#: Words of names that are there for another reason than the name, and why.
NO_LEAK = {
    "toshiba": "the operator is called after the maker, and Manufacturer stays",
    "dcm": "a study of dcm2niix: DCM is the coding scheme of the standard",
}
#: Under clean_descriptors words of the vocabulary stay, of comments too: that is what the option is for.
_COMMENTS = frozenset({"uncompressed"})


@pytest.mark.parametrize("options", [(), DEFAULT, ALL_OPTIONS], ids=["basic", "default", "all"])
@pytest.mark.parametrize("folder", ["deid_burned_in", "dicom_vendor_sites"])
def test_no_identifier_of_any_file_is_left(shared_data, folder, options):
    cleaner, seen = engine(*options), 0
    allowed = set(NO_LEAK) | (_COMMENTS if "clean_descriptors" in options else set())
    for name, content in files_below(shared_data / folder):
        cleaned = cleaner.file(loaded(content))
        secrets = secrets_of(loaded(content))
        assert set(leaks(cleaned, secrets)) <= allowed, name
        seen += 1
    assert seen == {"deid_burned_in": 96, "dicom_vendor_sites": 203}[folder]


@pytest.mark.parametrize("folder", ["deid_burned_in", "dicom_vendor_sites"])
def test_pixels_geometry_and_gates_are_as_they_were(shared_data, folder):
    cleaner = engine(*DEFAULT)
    for name, content in files_below(shared_data / folder):
        before, after = loaded(content), loaded(cleaner.file(loaded(content)))
        assert _pixels(before) == _pixels(after), name
        for keyword in GATES_AND_GEOMETRY:
            assert before.get(keyword) == after.get(keyword), (name, keyword)
        assert _regions(before) == _regions(after), name


def _pixels(dataset: Dataset) -> bytes:
    """To an even length, as PS3.5 8.1.1 has it."""
    value = dataset.PixelData if "PixelData" in dataset else b""
    return value + b"\0" * (len(value) % 2)


def _regions(dataset: Dataset) -> list[tuple[int, ...]]:
    names = ("RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1")
    return [tuple(item.get(name) for name in names) for item in dataset.get("SequenceOfUltrasoundRegions", [])]


@pytest.mark.parametrize("folder", ["deid_burned_in", "dicom_vendor_sites", "dicom_codecs_objects"])
def test_nothing_private_and_no_overlay_is_left_and_the_method_is_told(shared_data, folder):
    cleaner = engine(*DEFAULT)
    for name, content in files_below(shared_data / folder):
        if "malformed" in name:
            continue
        result = outcome(partial(cleaner.file, loaded(content)))
        if isinstance(result, RefusedError):
            assert result.reason is Reason.RESIDUE, name
            continue
        cleaned = loaded(result)
        tags = [element.tag for element in cleaned.iterall()]
        assert not [
            tag for tag in tags if tag.is_private or tag.group & 0xFF00 in {0x5000, 0x6000} or tag.element == 0
        ], name
        assert cleaned.PatientIdentityRemoved == "YES"
        assert [item.CodeValue for item in cleaned.DeidentificationMethodCodeSequence] == [
            "113100",
            "113109",
            "113107",
            "113108",
        ]
        assert cleaned.LongitudinalTemporalInformationModified == "MODIFIED"


def test_the_fields_of_a_file_that_others_wrote_do_not_survive(shared_data):
    path = shared_data / "deid_burned_in/presidio/0_ORIGINAL_compressed.dcm"
    cleaned = loaded(engine(*DEFAULT).file(pydicom.dcmread(path)))
    assert set(cleaned.file_meta.keys()) == {
        0x00020000,
        0x00020001,
        0x00020002,
        0x00020003,
        0x00020010,
        0x00020012,
        0x00020013,
    }
    assert cleaned.preamble == b"\0" * 128


def test_a_file_whose_series_number_is_its_patient_id_is_refused(shared_data):
    """Eight sample files of one maker carry 123456 as ID and as series number: nobody can tell which is meant."""
    cleaner, files = engine(*DEFAULT), files_below(shared_data / "dicom_codecs_objects")
    results = [outcome(partial(cleaner.file, loaded(content))) for _, content in files]
    refused = [result.detail for result in results if isinstance(result, RefusedError)]
    assert refused.count("(0020,0011) Series Number") == 8
