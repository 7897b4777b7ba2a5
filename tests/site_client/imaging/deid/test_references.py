"""References between images, segmentations, structured reports and structure sets resolve after cleaning."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import (
    SegmentAlgorithmTypeValues,
    Segmentation,
    SegmentationTypeValues,
    SegmentDescription,
    segread,
)
from highdicom.sr import (
    Comprehensive3DSR,
    FindingSite,
    GraphicTypeValues,
    ImageRegion,
    Measurement,
    MeasurementReport,
    ObservationContext,
    ObserverContext,
    PersonObserverIdentifyingAttributes,
    PlanarROIMeasurementsAndQualitativeEvaluations,
    SourceImageForRegion,
    TrackingIdentifier,
    srread,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from locum.site_client.imaging.reasons import RefusedError
from tests.site_client.imaging.deid.checker import leaks, secrets_of
from tests.site_client.imaging.deid.objects import engine, files_below, image, loaded, outcome, saved

_OPTIONS = ("modified_dates", "device_identity", "clean_structured_content")


def series() -> list[Dataset]:
    return [
        image(
            SOPInstanceUID=f"1.2.826.0.1.3680043.10.7.1.{number}",
            ImagePositionPatient=[0.0, 0.0, 2.0 * number],
            ImageOrientationPatient=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
            SliceThickness=2.0,
            InstanceNumber=str(number),
            SeriesNumber="1",
            StudyID="",
            PositionReferenceIndicator="",
        )
        for number in range(3)
    ]


def segmentation(images: list[Dataset]) -> Dataset:
    mask = np.zeros((3, 2, 3), np.uint8)
    mask[1, 1, 2] = 1
    algorithm = AlgorithmIdentificationSequence(name="net", version="1", family=codes.DCM.ArtificialIntelligence)
    segment = SegmentDescription(
        1,
        "liver lesion of Kowalska",
        codes.SCT.MorphologicallyAbnormalStructure,
        codes.SCT.Lesion,
        SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm,
        tracking_uid=generate_uid(),
        tracking_id="lesion 1",
    )
    return Segmentation(
        images,
        mask,
        SegmentationTypeValues.BINARY,
        [segment],
        generate_uid(),
        2,
        generate_uid(),
        1,
        "ACME",
        "One",
        "1.0",
        "SN-90210",
    )


def report(images: list[Dataset]) -> Dataset:
    observer = PersonObserverIdentifyingAttributes("Brzezinski^Adam")
    context = ObservationContext(ObserverContext(codes.DCM.Person, observer))
    region = ImageRegion(GraphicTypeValues.POLYLINE, np.array([[0.0, 0], [1, 0], [1, 1], [0, 0]]), _source(images[1]))
    group = PlanarROIMeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(generate_uid(), "lesion 1 of Kowalska"),
        referenced_region=region,
        finding_type=codes.SCT.Lesion,
        measurements=[Measurement(codes.SCT.Area, 12.5, codes.UCUM.SquareMillimeter)],
        finding_sites=[FindingSite(codes.SCT.Liver)],
    )
    content = MeasurementReport(context, codes.LN.CTUnspecifiedBodyRegion, imaging_measurements=[group])
    return Comprehensive3DSR(
        images, content[0], generate_uid(), 3, generate_uid(), 1, "ACME", is_complete=True, is_verified=False,
        institution_name="St. Elsewhere Hospital",
    )  # fmt: skip


def _source(image: Dataset):  # highdicom's own type
    return SourceImageForRegion(image.SOPClassUID, image.SOPInstanceUID)


def references(dataset: Dataset) -> set[str]:
    return {
        str(element.value)
        for element in dataset.iterall()
        if element.keyword in {"ReferencedSOPInstanceUID", "ReferencedFrameOfReferenceUID"} and element.value
    }


@pytest.fixture(scope="module")
def study() -> dict[str, list[Dataset]]:
    images = [loaded(saved(one)) for one in series()]
    return {"images": images, "seg": [segmentation(images)], "sr": [report(images)]}


@pytest.fixture(scope="module")
def clean_study(study) -> dict[str, list[Dataset]]:
    cleaner = engine(*_OPTIONS)
    return {kind: [loaded(cleaner.file(loaded(saved(one)))) for one in objects] for kind, objects in study.items()}


def test_segmentation_and_report_still_name_the_images(study, clean_study):
    instances = {one.SOPInstanceUID for one in clean_study["images"]}
    frames = {one.FrameOfReferenceUID for one in clean_study["images"]}
    for kind in ("seg", "sr"):
        (object_,) = clean_study[kind]
        assert references(object_) <= instances | frames
        assert len(references(object_)) == len(references(study[kind][0]))
        assert object_.StudyInstanceUID == clean_study["images"][0].StudyInstanceUID
        assert object_.PatientID == clean_study["images"][0].PatientID
    assert clean_study["seg"][0].FrameOfReferenceUID in frames


def test_highdicom_reads_the_cleaned_segmentation_on_the_cleaned_images(study, clean_study, tmp_path):
    clean_study["seg"][0].save_as(tmp_path / "seg.dcm")
    read = segread(tmp_path / "seg.dcm")
    sources = [one.SOPInstanceUID for one in clean_study["images"]]
    mask = read.get_pixels_by_source_instance(sources, assert_missing_frames_are_empty=True)
    assert mask.shape[:3] == (3, 2, 3)
    assert list(np.argwhere(mask[..., 0])[0]) == [1, 1, 2]
    (segment,) = read.SegmentSequence
    assert segment.SegmentLabel == "liver lesion of"
    assert segment.TrackingID == "lesion 1"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Lesion"


def test_highdicom_reads_the_cleaned_report(clean_study, tmp_path):
    clean_study["sr"][0].save_as(tmp_path / "sr.dcm")
    content = srread(tmp_path / "sr.dcm").content
    (group,) = content.get_planar_roi_measurement_groups()
    (measurement,) = group.get_measurements(codes.SCT.Area)
    assert measurement.value == 12.5
    assert group.finding_type == codes.SCT.Lesion
    assert references(clean_study["sr"][0]) >= {clean_study["images"][1].SOPInstanceUID}


def test_the_report_names_nobody(study, clean_study):
    for kind, objects in study.items():
        for before, after in zip(objects, clean_study[kind], strict=True):
            assert leaks(saved(after), secrets_of(before)) == [], kind


def test_without_the_option_a_report_has_no_content(study):
    cleaned = loaded(engine("modified_dates").file(loaded(saved(study["sr"][0]))))
    assert len(cleaned.ContentSequence) == 0


def test_references_between_objects_of_two_toolkits_resolve_as_they_did(shared_data):
    """Whatever referred to an object of the folder refers to it afterwards; what did not, does not."""
    cleaner = engine("modified_dates", "clean_structured_content", "clean_descriptors")
    before, after = [], []
    for _, content in files_below(shared_data / "dicom_codecs_objects"):
        original = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
        result = outcome(lambda one=content: cleaner.file(loaded(one)))
        if not isinstance(result, RefusedError):
            before.append(original)
            after.append(loaded(result))
    assert _links(before) == _links(after)
    assert sum(len(links) for links in _links(before).values()) > 10


def _links(datasets: list[Dataset]) -> dict[int, set[int]]:
    """By its place in the list, the places of the objects that an object refers to."""
    places: dict[str, int] = {}
    for place, one in enumerate(datasets):
        places.setdefault(str(one.get("SOPInstanceUID", "")), place)
    return {place: {places[uid] for uid in _all_references(one) if uid in places} for place, one in enumerate(datasets)}


#: The Basic Profile empties or removes them: they refer to procedures and visits.
_NOT_KEPT = {
    "ReferencedStudySequence",
    "ReferencedPerformedProcedureStepSequence",
    "OriginalAttributesSequence",
    "RequestAttributesSequence",
}


def _all_references(dataset: Dataset) -> set[str]:
    found = set()
    for element in dataset:
        if element.VR == "SQ" and element.keyword not in _NOT_KEPT:
            for item in element.value:
                found |= _all_references(item)
        elif element.keyword == "ReferencedSOPInstanceUID" and element.value:
            found.add(str(element.value))
    return found
