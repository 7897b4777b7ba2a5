"""BIDS trees and DeepLesion's layout, written small by the test as their descriptions say."""

from __future__ import annotations

import csv
import json
from contextlib import closing
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from locum.common.errors import DataError
from locum.site_client.imaging import bids
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.protocol import vendor
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sources import BidsSource, load_site

KEYS = Keys.of(bytes(range(32)))
SPLIT = (0.8, 0.1, 0.1)


def taken(folder: Path, **source):
    site = load_site({"name": "tree", "root": str(folder / "data"), "sources": [source]})
    counts = ingest(site, folder / "store", keys=KEYS)
    with closing(Catalog.open(folder / "store")) as catalog:
        return counts, sorted(catalog.facts(), key=lambda fact: fact.shape), catalog.cases(SPLIT)


# BIDS


def scan(path: Path, number: int, sidecar: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(number).integers(0, 900, (4, 5, 6 + number)).astype(np.int16)
    # A sagittal acquisition: the third axis runs from right to left.
    affine = np.array([[0, 0, 3.0, -9], [1.5, 0, 0, 4], [0, 1.5, 0, 2], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    if sidecar is not None:
        path.with_name(f"{path.name.partition('.')[0]}.json").write_text(json.dumps(sidecar))


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "data"
    scan(
        root / "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", 1, {"EchoTime": 0.0031, "ManufacturersModelName": "Prisma"}
    )
    scan(root / "sub-01/ses-b/anat/sub-01_ses-b_acq-fast_T1w.nii", 2, {"RepetitionTime": 1.5})
    scan(root / "sub-02/anat/sub-02_T1w.nii.gz", 3, {})
    scan(root / "sub-02/anat/sub-02_T2w.nii.gz", 4)
    scan(root / "derivatives/old/sub-02/anat/sub-02_T1w.nii.gz", 5)
    (root / "participants.tsv").write_text("participant_id\tsex\tage\nsub-01\tF\t44\nsub-02\tmale\t91.5\n")
    (root / "T1w.json").write_text('{"Manufacturer": "Siemens", "RepetitionTime": 2.3, "BodyPartExamined": "brain"}')
    (root / "acq-fast_T1w.json").write_text('{"FlipAngle": 8}')
    (root / "sub-01/ses-a/sub-01_ses-a_scans.tsv").write_text(
        "filename\tacq_time\nanat/sub-01_ses-a_T1w.nii.gz\t2019-07-04T10:00:00\n"
    )
    (root / "sub-02/sub-02_scans.tsv").write_text("filename\tacq_time\nanat/sub-02_T1w.nii.gz\t1877-07-04T10:00:00\n")
    return tmp_path


def test_a_tree_gives_its_images_with_what_it_says_of_people_and_scanners(tree):
    counts, facts, cases = taken(tree, kind="bids", path=".", suffixes=["T1w"])
    assert (counts.found, counts.stored, counts.cases) == (3, 3, 3)
    first, second, third = facts
    assert {first.patient, second.patient} == {KEYS.patient("sub-01")}
    assert third.patient == KEYS.patient("sub-02")
    assert [(fact.sex, fact.age, fact.month) for fact in facts] == [("F", 44, "2019-07"), ("F", 44, ""), ("M", 90, "")]
    assert {(fact.modality, fact.manufacturer, fact.body_part) for fact in facts} == {("MR", "Siemens", "BRAIN")}
    assert [fact.model for fact in facts] == ["Prisma", "", ""]
    assert {(fact.orientation, fact.slices) for fact in facts} == {("sagittal", 7), ("sagittal", 8), ("sagittal", 9)}
    assert first.parameters == {"RepetitionTime": 2300.0, "EchoTime": pytest.approx(3.1)}
    assert second.parameters == {"RepetitionTime": 1500.0, "FlipAngle": 8.0}
    assert len({case.patient for case in cases}) == 2


def test_a_second_ingest_of_a_tree_changes_nothing(tree):
    source = {"kind": "bids", "path": ".", "suffixes": ["T1w", "T2w"]}
    _, facts, _ = taken(tree, **source)
    before = {path: path.stat().st_mtime_ns for path in (tree / "store/volumes").iterdir()}
    counts, again, _ = taken(tree, **source)
    assert again == facts
    assert counts.cases == 4
    assert {path: path.stat().st_mtime_ns for path in (tree / "store/volumes").iterdir()} == before


def test_a_sidecar_that_changes_is_read_again(tree):
    source = {"kind": "bids", "path": ".", "suffixes": ["T1w"]}
    taken(tree, **source)
    (tree / "data/T1w.json").write_text('{"Manufacturer": "GE MEDICAL SYSTEMS"}')
    _, facts, _ = taken(tree, **source)
    assert {fact.manufacturer for fact in facts} == {"GE MEDICAL SYSTEMS"}


def test_masks_come_from_a_tree_of_the_same_shape(tree):
    folder = tree / "data/derivatives/labels"
    for name in ("sub-01/ses-a/anat/sub-01_ses-a_T1w", "sub-02/anat/sub-02_T1w"):
        image = nibabel.load(tree / f"data/{name}.nii.gz")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        mask = (np.asarray(image.dataobj) > 450).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(mask, image.affine), folder / f"{name}_seg-manual.nii.gz")
    counts, _, cases = taken(
        tree, kind="bids", path=".", suffixes=["T1w"], masks="derivatives/labels", mask_suffix="_seg-manual"
    )
    assert counts.quarantined == {Reason.MASK_MISSING: 1}
    for case in cases:
        drawn = np.asarray(nibabel.load(case.mask).dataobj)
        assert np.array_equal(drawn, np.asarray(nibabel.load(case.image).dataobj) > 450)


def test_the_participants_can_be_the_table_of_labels(tree):
    (tree / "data/participants.tsv").write_text("participant_id\tgroup\nsub-01\tpatient\nsub-02\tcontrol\n")
    labels = {"file": "participants.tsv", "key": "patient", "key_column": "participant_id", "label_column": "group"}
    source = {"kind": "bids", "path": ".", "suffixes": ["T1w"]}
    site = load_site({"name": "tree", "root": str(tree / "data"), "sources": [source], "labels": labels})
    ingest(site, tree / "store", keys=KEYS)
    with closing(Catalog.open(tree / "store")) as catalog:
        assert sorted(case.label for case in catalog.cases(SPLIT)) == ["control", "patient", "patient"]


def test_content_that_was_not_fetched_and_damaged_sidecars_are_refused(tree):
    lost = tree / "data/sub-02/anat/sub-02_T1w.nii.gz"
    lost.unlink()
    lost.symlink_to("../../.git/annex/objects/gone")
    (tree / "data/sub-01/ses-b/anat/sub-01_ses-b_acq-fast_T1w.json").write_text("{")
    counts, facts, _ = taken(tree, kind="bids", path=".", suffixes=["T1w"])
    assert counts.quarantined == {Reason.UNREADABLE: 2}
    assert len(facts) == 1


def test_a_table_of_participants_without_their_ids_is_told(tree):
    (tree / "data/participants.tsv").write_text("subject\tsex\nsub-01\tF\n")
    with pytest.raises(DataError, match="no column 'participant_id'"):
        taken(tree, kind="bids", path=".", suffixes=["T1w"])


def test_sidecars_of_43_hospitals_give_their_protocols(shared):
    root = shared / "spine_generic_metadata"
    source = BidsSource(kind="bids", path=root, suffixes=("T1w",))
    found = [bids._sidecar(root, path.with_suffix(".nii.gz")) for path in sorted(root.glob("sub-*/anat/*_T1w.json"))]
    assert len(found) > 250
    makers = {vendor(bids._text(said, "Manufacturer")) for said in found}
    assert {"Siemens", "GE", "Philips"} == makers - {""}
    times = [bids._parameters(said)["EchoTime"] for said in found if "EchoTime" in said]
    assert len(times) > 250
    assert 1 < min(times) < max(times) < 20
    assert bids.fold(source, Item("a", root, 0, 1, 1)) is None


# DeepLesion

HEADER = (
    "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,"
    "Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,Spacing_mm_px_,"
    "Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test"
)


def lesion(name, patient, kind, part, *, spacing="0.7, 0.6, 2.5", sex="F", age="62"):
    boxes = "1, 2, 3, 4"
    study, series, key = name.removesuffix(".png").split("_")[1:]
    return [name, patient, study, series, key, boxes, boxes, "3, 2", "0.5, 0.5, 0.5", kind, 0, "1, 9", spacing, "6, 5",
            "-175, 275", sex, age, part]  # fmt: skip


def hounsfield(number):
    return np.random.default_rng(number).integers(-1024, 3072, (5, 6)).astype(np.int32)


@pytest.fixture
def lesions(tmp_path):
    folder = tmp_path / "data"
    rows = [
        lesion("000001_01_01_004.png", 1, -1, 1),
        lesion("000002_01_02_005.png", 2, 5, 2, sex="M", age="93.0"),
        lesion("000002_01_02_005.png", 2, 5, 2, sex="M", age="93.0"),
        lesion("000003_02_01_006.png", 3, 1, 3, sex="NaN", age="NaN", spacing="0.5, 0.5, 1"),
        lesion("000003_02_01_007.png", 3, 2, 3),
        lesion("000003_02_01_007.png", 3, 8, 3),
    ]
    for series in {row[0].rpartition("_")[0] for row in rows}:
        (folder / "Images_png" / series).mkdir(parents=True)
        for number in range(3, 9):
            values = (hounsfield(number) + 32768).astype(np.uint16)
            Image.fromarray(values).save(folder / "Images_png" / series / f"{number:03}.png")
    with (folder / "DL_info.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER.split(","), *rows])
    return tmp_path


@pytest.mark.parametrize("context", [0, 1])
def test_a_key_slice_and_its_neighbours_are_a_case_in_hounsfield_units(lesions, context):
    counts, facts, cases = taken(lesions, kind="deeplesion", path=".", context=context)
    assert counts.quarantined == {Reason.CONFLICTING_LABELS: 1}
    assert (counts.found, counts.cases) == (4, 3)
    assert {case.fold: case.label for case in cases} == {"train": None, "validation": "lung", "test": "bone"}
    by_fold = {case.fold: nibabel.load(case.image) for case in cases}
    image = by_fold["test"]
    expected = np.stack([hounsfield(6 + step) for step in range(-context, context + 1)]).T
    assert np.array_equal(np.asarray(image.dataobj).reshape(expected.shape), expected)
    assert image.get_data_dtype() == np.int16
    assert np.allclose(by_fold["train"].header.get_zooms()[:2], (0.7, 0.6))
    if context:
        assert by_fold["train"].header.get_zooms()[2] == pytest.approx(2.5)
    seen = {(fact.patient, fact.sex, fact.age) for fact in facts}
    assert (KEYS.patient("DeepLesion 2"), "M", 90) in seen
    assert (KEYS.patient("DeepLesion 3"), "", None) in seen
    assert {(fact.modality, fact.slices) for fact in facts} == {("CT", 2 * context + 1)}


def test_a_key_slice_at_the_end_of_what_was_published_is_refused_with_its_context(lesions):
    counts, _, _ = taken(lesions, kind="deeplesion", path=".", context=2)
    assert counts.quarantined[Reason.MISSING_SLICES] == 2
    assert counts.found == counts.stored + sum(counts.quarantined.values()) == 4


def test_a_neighbour_that_changes_makes_the_case_anew(lesions):
    taken(lesions, kind="deeplesion", path=".", context=1)
    Image.fromarray(np.full((5, 6), 32768, np.uint16)).save(lesions / "data/Images_png/000003_02_01/005.png")
    _, _, cases = taken(lesions, kind="deeplesion", path=".", context=1)
    (test,) = [nibabel.load(case.image) for case in cases if case.fold == "test"]
    assert np.asarray(test.dataobj)[:, :, 0].max() == 0


@pytest.mark.parametrize("damage", ["truncated", "eight bits", "text"])
def test_a_damaged_picture_is_refused(lesions, damage):
    path = lesions / "data/Images_png/000001_01_01/004.png"
    if damage == "eight bits":
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:60] if damage == "truncated" else b"no picture")
    counts, _, _ = taken(lesions, kind="deeplesion", path=".")
    assert counts.quarantined[Reason.COLOUR if damage == "eight bits" else Reason.UNREADABLE] == 1


@pytest.mark.parametrize("name", ["000001_01_01.dcm", "../x_001.png", "noname"])
def test_a_table_that_names_no_slices_is_told_with_its_line(lesions, name):
    rows = (lesions / "data/DL_info.csv").read_text().replace("000001_01_01_004.png", name)
    (lesions / "data/DL_info.csv").write_text(rows)
    with pytest.raises(DataError, match="line 2"):
        taken(lesions, kind="deeplesion", path=".")
