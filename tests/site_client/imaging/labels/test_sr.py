"""Labels in structured reports: of the image that the report speaks of, or a reason."""

from __future__ import annotations

import contextlib

import pydicom
import pytest
from highdicom.sr import CodeContentItem, CodedConcept, RelationshipTypeValues
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import DigitalXRayImageStorageForPresentation

from locum.common.errors import DataError
from locum.site_client.imaging.labels.given import Label
from locum.site_client.imaging.labels.sr import SrBook
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import SrLabels
from locum.site_client.imaging.terminology import Terminology

NODULE = CodedConcept("27925004", "SCT", "Nodule")
CLASSES = {"SCT:4147007": "lesion", "SCT:27925004": "lesion", "SCT:17621005": "normal"}


def book(folder, lab, **parts):
    return SrBook(SrLabels(kind="sr", path=folder, **({"classes": CLASSES} | parts)), lab.keys, ())


def reason_of(read):
    with pytest.raises(RefusedError) as caught:
        read()
    return caught.value.reason


def test_the_finding_of_a_report_is_the_label_of_the_series_it_names(lab, tmp_path):
    one, two = lab.series(number=1).images(), lab.series(number=2).images()
    lab.save(lab.report(one + two, [lab.group(one[1:3]), lab.region(two[0], NODULE)]), tmp_path / "deep" / "a")
    labels = book(tmp_path, lab)
    assert labels.label(lab.unit(one)) == Label("lesion", ("SCT:4147007",))
    assert labels.label(lab.unit(two)) == Label("lesion", ("SCT:27925004",))
    assert labels.unmatched() == []
    assert reason_of(lambda: labels.label(lab.unit(lab.series(number=3).images()))) is Reason.NO_LABEL


def test_a_radiograph_has_the_label_of_its_own_group_not_of_the_next_image_of_its_series(lab, tmp_path):
    over = {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX", "ImagePositionPatient": None}
    frontal, lateral = lab.series(slices=2, over=over).images()
    normal = CodedConcept("17621005", "SCT", "Normal")
    lab.save(lab.report([frontal, lateral], [lab.group([frontal]), lab.group([lateral], normal)]), tmp_path / "a")
    labels = book(tmp_path, lab)
    assert labels.label(lab.unit([frontal])).name == "lesion"
    assert labels.label(lab.unit([lateral])).name == "normal"


def test_a_group_that_names_no_image_speaks_of_all_evidence(lab, tmp_path):
    one, two = lab.series(number=1).images(), lab.series(number=2).images()
    lab.save(lab.report(one + two, [lab.group([])]), tmp_path / "a")
    labels = book(tmp_path, lab)
    assert {labels.label(lab.unit(images)).name for images in (one, two)} == {"lesion"}


def test_a_qualitative_evaluation_is_the_label_if_the_site_names_its_concept(lab, tmp_path):
    images = lab.series().images()
    birads = CodedConcept("111405", "DCM", "An assessment")
    likely = CodedConcept("397144002", "SCT", "Category 4")
    lab.save(lab.report(images, [lab.group(images, evaluations=[(birads, likely)])]), tmp_path / "a")
    labels = book(tmp_path, lab, concept="DCM:111405", classes={"SCT:397144002": "suspicious"})
    assert labels.label(lab.unit(images)) == Label("suspicious", ("SCT:397144002",))
    assert book(tmp_path, lab, classes=None).label(lab.unit(images)).name == "SCT:4147007"


def test_reports_that_differ_conflict_and_a_majority_of_readers_decides_if_asked(lab, tmp_path):
    images = lab.series().images()
    normal = CodedConcept("17621005", "SCT", "Normal")
    lab.save(lab.report(images, [lab.group(images)], "A^A"), tmp_path / "a")
    lab.save(lab.report(images, [lab.group(images, NODULE)], "B^B"), tmp_path / "b")
    assert book(tmp_path, lab).label(lab.unit(images)) == Label("lesion", ("SCT:27925004", "SCT:4147007"))
    lab.save(lab.report(images, [lab.group(images, normal)], "C^C"), tmp_path / "c")
    assert reason_of(lambda: book(tmp_path, lab).label(lab.unit(images))) is Reason.CONFLICTING_LABELS
    agreed = book(tmp_path, lab, consensus="majority")
    assert agreed.label(lab.unit(images)).name == "lesion"
    assert sorted(agreed.readings(lab.unit(images)).values()) == ["lesion", "lesion", "normal"]
    lab.save(lab.report(images, [lab.group(images, normal)], "D^D"), tmp_path / "d")
    tied = book(tmp_path, lab, consensus="majority")
    assert reason_of(lambda: tied.label(lab.unit(images))) is Reason.UNCERTAIN_LABEL


def test_a_finding_that_is_said_to_be_absent_is_no_label(lab, tmp_path):
    images = lab.series().images()
    found = lab.report(images)
    group = found.ContentSequence[-1].ContentSequence[0]
    finding = next(item for item in group.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "121071")
    presence, absent = CodedConcept("705057003", "SCT", "Presence"), CodedConcept("2667000", "SCT", "Absent")
    finding.ContentSequence = [CodeContentItem(presence, absent, RelationshipTypeValues.HAS_CONCEPT_MOD)]
    lab.save(found, tmp_path / "a")
    labels = book(tmp_path, lab)
    assert reason_of(lambda: labels.label(lab.unit(images))) is Reason.UNCERTAIN_LABEL


def test_a_code_that_has_no_class_is_unmapped_and_a_terminology_map_gives_one(lab, tmp_path):
    images = lab.series().images()
    lab.save(lab.report(images, [lab.group(images)]), tmp_path / "a")
    one = lab.unit(images)
    assert reason_of(lambda: book(tmp_path, lab, classes={"SCT:1": "x"}).label(one)) is Reason.UNMAPPED_CODE
    entry = {"local": "MASS", "class": "lesion", "code": ["SCT:4147007", "RADLEX:RID3874"], "meaning": "Mass"}
    terms = Terminology.model_validate({"name": "north", "version": "1", "entries": [entry]})
    labels = SrBook(SrLabels(kind="sr", path=tmp_path), lab.keys, (), terms)
    assert labels.label(one) == Label("lesion", ("RADLEX:RID3874", "SCT:4147007"))


def test_what_is_no_such_report_is_listed_and_reports_of_another_archive_are_an_error(lab, tmp_path):
    images, others = lab.series().images(), lab.series(number=2).images()
    lab.save(lab.report(others, [lab.group(others)]), tmp_path / "other")
    lab.save(images[0], tmp_path / "image")
    (tmp_path / "text").write_text("no report")
    labels = book(tmp_path, lab)
    assert reason_of(lambda: labels.label(lab.unit(images))) is Reason.NO_LABEL
    with pytest.raises(DataError, match="no structured report"):
        labels.unmatched()
    lab.save(lab.report(images, [lab.group(images, None)]), tmp_path / "silent")
    lab.save(lab.report(images, [lab.group(images)]), tmp_path / "own")
    labels = book(tmp_path, lab)
    labels.label(lab.unit(images))
    assert labels.unmatched() == [
        "other",
        "image (unsupported_object)",
        "text (not_an_image)",
        "silent (no_label)",
    ]


# Reports of others: highdicom's and dcmqi's own test files.


@pytest.mark.parametrize(
    ("name", "concept", "code"),
    [
        ("ImagingDataCommons+highdicom/data/test_files/sr_document.dcm", "DCM:121071", "SCT:2748008"),
        ("ImagingDataCommons+highdicom/data/test_files/sr_document_with_multiple_groups.dcm", "DCM:121403",
         "SCT:371928007"),
        ("ImagingDataCommons+highdicom/data/test_files/sr_document_with_multiple_groups.dcm", "SCT:51845000",
         "SCT:243911007"),
        ("QIICR+dcmqi/data/sr-example/sr.dcm", "DCM:121071", "SCT:86049000"),
        ("QIICR+dcmqi/data/sr-example/sr.dcm", "SRT:G-C0E3", "SCT:55940004"),
    ],
)  # fmt: skip
def test_real_reports_label_the_series_of_their_evidence(lab, shared_data, tmp_path, name, concept, code):
    path = shared_data / "dicom_codecs_objects" / name
    found = pydicom.dcmread(path)
    evidence = found.get("CurrentRequestedProcedureEvidenceSequence") or found.PertinentOtherEvidenceSequence
    (tmp_path / "sr").symlink_to(path)
    labels = book(tmp_path, lab, concept=concept, classes={code: "seen"})
    listed = evidence[0].ReferencedSeriesSequence[0]
    stub = pydicom.Dataset()
    stub.SOPClassUID = listed.ReferencedSOPSequence[0].ReferencedSOPClassUID
    stub.SeriesInstanceUID, stub.PatientID = listed.SeriesInstanceUID, "P"
    assert labels.label(lab.unit([stub])) == Label("seen", (code,))
    assert labels.unmatched() == []


def test_a_real_report_with_several_findings_conflicts(lab, shared_data, tmp_path):
    name = "ImagingDataCommons+highdicom/data/test_files/sr_document_with_multiple_groups.dcm"
    path = shared_data / "dicom_codecs_objects" / name
    (tmp_path / "sr").symlink_to(path)
    listed = pydicom.dcmread(path).CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    stub = pydicom.Dataset()
    stub.SOPClassUID = listed.ReferencedSOPSequence[0].ReferencedSOPClassUID
    stub.SeriesInstanceUID, stub.PatientID = listed.SeriesInstanceUID, "P"
    labels = book(tmp_path, lab, classes=None)
    assert reason_of(lambda: labels.label(lab.unit([stub]))) is Reason.CONFLICTING_LABELS


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["sr_document.dcm", "sr_document_with_multiple_groups.dcm"]),
    places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    part=st.floats(0.2, 1) | st.just(1.0),
)
def test_damaged_reports_are_listed_and_never_anything_else(lab, shared_data, tmp_path_factory, name, places, part):
    path = shared_data / "dicom_codecs_objects/ImagingDataCommons+highdicom/data/test_files" / name
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[int(place * len(content))] = value
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "a").write_bytes(content[: int(part * len(content))])
    labels = book(folder, lab, classes=None)
    with contextlib.suppress(RefusedError):
        assert labels.label(lab.unit(lab.series().images())).name
