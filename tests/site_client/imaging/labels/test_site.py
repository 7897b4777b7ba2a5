"""A whole site: annotation objects beside the images or in a folder, ingested, and the agreement of their readers."""

from __future__ import annotations

import io
import json

import nibabel
import numpy as np
import pydicom
import pytest
import yaml
from typer.testing import CliRunner

from locum.common.errors import DataError
from locum.site_client.cli import app
from locum.site_client.imaging.deid.engine import Deidentifier
from locum.site_client.imaging.known import known_of
from locum.site_client.imaging.labels.folder import FolderMasks
from locum.site_client.imaging.labels.given import Annotation
from locum.site_client.imaging.labels.rtstruct import rtstruct_masks
from locum.site_client.imaging.labels.seg import seg_masks
from locum.site_client.imaging.labels.sr import SrBook
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import Deidentification, ObjectMasks, SrLabels, load_site

SPLIT = (0.8, 0.1, 0.1)


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def stored_masks(hospital):
    return {case.id: np.asarray(nibabel.load(case.mask).dataobj) for case in hospital.catalog().cases(SPLIT)}


def test_segmentations_among_the_images_become_the_masks_of_the_store(hospital, lab):
    for number in (1, 2):
        images = lab.series(number).images()
        hospital.write(images)
        mask = np.zeros((5, 6, 7), dtype=np.uint8)
        mask[number, 2:4, 3] = 1
        lab.save(lab.segmentation(images, mask), hospital.dicom / "objects" / str(number))
    hospital.write(lab.series(3))
    counts = hospital.ingest(masks={"kind": "seg", "segments": {"SCT:10200004": 2}})
    assert (counts.found, counts.annotations, counts.cases) == (17, 2, 2)
    assert counts.quarantined == {"mask_missing": 5}
    assert sorted(int((mask == 2).sum()) for mask in stored_masks(hospital).values()) == [2, 2]
    again = hospital.ingest(masks={"kind": "seg", "segments": {"SCT:10200004": 3}})
    assert again == counts
    assert all(set(np.unique(mask)) == {0, 3} for mask in stored_masks(hospital).values())


def cleaned_by(engine, dataset):
    """A file as it lies in a store, of a file as it came."""
    written = io.BytesIO()
    dataset.save_as(written, enforce_file_format=True)
    return engine.file(pydicom.dcmread(io.BytesIO(written.getvalue())))


@pytest.mark.parametrize(
    "options", [(), ("modified_dates", "device_identity", "clean_descriptors", "clean_structured_content")]
)
def test_objects_cleaned_by_the_engine_still_find_images_cleaned_by_it_or_say_what_they_lost(lab, tmp_path, options):
    engine = Deidentifier(Deidentification(options=options), lab.keys)
    images = lab.series().images()
    mask = np.zeros((5, 6, 7), dtype=np.uint8)
    mask[2:4, 1:3, 5] = 1
    outline = np.array([(-9.9, 19.9, 32.5), (-8.3, 19.9, 32.5), (-8.3, 21.4, 32.5), (-9.9, 21.4, 32.5)])
    objects = [lab.segmentation(images, mask), lab.structures(images, {"GTV": [outline]}), lab.report(images)]
    cleaned = [pydicom.dcmread(io.BytesIO(cleaned_by(engine, image))) for image in images]
    known, one, image = known_of(images[0], lab.keys), lab.unit(images), lab.volume(cleaned)
    assert cleaned[0].SeriesInstanceUID == one.key
    found = []
    for number, each in enumerate(objects):
        path = tmp_path / str(number)
        path.write_bytes(cleaned_by(engine, each))
        found.append(Annotation(path, path.stat().st_size, str(each.SOPClassUID), cleaned=True, known=known))
    segments = seg_masks(ObjectMasks(kind="seg", segments={"SCT:10200004": 1}), lab.keys, found)
    assert int(segments.read(one, image).array.sum()) == 4
    labels = SrBook(SrLabels(kind="sr"), lab.keys, found)
    outlines = rtstruct_masks(ObjectMasks(kind="rtstruct", segments={"GTV": 1}), lab.keys, found)
    if options:
        assert labels.label(one).name == "SCT:4147007"
        assert int(outlines.read(one, image).array.sum()) == 2 * 3
    else:
        with pytest.raises(RefusedError, match="clean_descriptors"):
            outlines.read(one, image)
        with pytest.raises(RefusedError, match="clean_structured_content"):
            labels.label(one)


# Masks of several readers in a folder.


def write_readers(hospital, lab, accession, masks, number=1):
    images = lab.series(number, accession=accession, shape=(12, 14)).images()
    hospital.write(images)
    folder = hospital.folder / "masks"
    folder.mkdir(exist_ok=True)
    affine = lab.volume(images).affine
    for reader, mask in masks.items():
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / f"{accession}{reader}.nii.gz")


def boxes():
    truth = np.zeros((14, 12, 5), dtype=np.uint8)
    truth[3:10, 2:9, 1:4] = 1
    wide, thin = truth.copy(), truth.copy()
    wide[10, 2:9, 1:4], thin[9, 2:9, 1:4] = 1, 0
    return truth, wide, thin


@pytest.mark.parametrize("how", ["majority", "staple"])
def test_files_of_several_readers_become_one_mask(hospital, lab, how):
    truth, wide, thin = boxes()
    write_readers(hospital, lab, "A.1", {".ann": truth, ".bob": wide, ".cy": thin})
    counts = hospital.ingest(masks={"path": "masks", "key": "accession", "consensus": how})
    assert counts.cases == 1
    assert np.array_equal(next(iter(stored_masks(hospital).values())), truth)


def test_two_files_of_one_image_are_refused(hospital, lab):
    truth, wide, _ = boxes()
    write_readers(hospital, lab, "A1", {"": truth})
    nibabel.save(nibabel.Nifti1Image(wide, np.eye(4)), hospital.folder / "masks" / "A1.nii")
    site = load_site(hospital.site(masks={"path": "masks", "key": "accession"}))
    source = FolderMasks(site, lab.keys)
    with pytest.raises(RefusedError) as caught:
        source.stamp(lab.unit(lab.series(shape=(12, 14)).images()))
    assert caught.value.reason is Reason.CONFLICTING_LABELS


def test_a_file_may_be_named_by_the_name_that_the_site_knows_and_others_are_listed(hospital, lab):
    truth, _, _ = boxes()
    write_readers(hospital, lab, "A1", {})
    one = lab.unit(lab.series(shape=(12, 14)).images())
    for name in (one.known.accession, "B7"):
        nibabel.save(nibabel.Nifti1Image(truth, np.eye(4)), hospital.folder / "masks" / f"{name}.nii.gz")
    source = FolderMasks(load_site(hospital.site(masks={"path": "masks", "key": "accession"})), lab.keys)
    assert source.stamp(one)
    assert source.unmatched() == ["B7.nii.gz"]


def test_the_command_shows_how_far_readers_agree_and_leaves_it_for_the_report(hospital, lab):
    truth, wide, thin = boxes()
    write_readers(hospital, lab, "A1", {".ann": truth, ".bob": wide}, number=1)
    write_readers(hospital, lab, "A2", {".ann": truth, ".bob": thin}, number=2)
    site = hospital.folder / "site.yaml"
    masks = {"path": "masks", "key": "accession", "consensus": "majority"}
    site.write_text(yaml.safe_dump(hospital.site(masks=masks)))
    run("ingest", site, "--store", hospital.store)
    found = json.loads(run("agreement", site, "--store", hospital.store, "--json"))
    size = int(truth.sum())
    expected = [2 * size / (2 * size + 21), 2 * (size - 21) / (2 * size - 21)]
    structure = found["masks"]["structures"]["1"]
    assert found["labels"] is None
    assert found["masks"]["images"] == 2
    assert structure["dice"] == pytest.approx(np.mean(expected))
    assert structure["least_dice"] == pytest.approx(min(expected))
    assert set(structure["readers"]) == {"ann", "bob"}
    assert json.loads((hospital.store / "agreement.json").read_text()) == found
    shown = run("agreement", site, "--store", hospital.store)
    assert "sensitivity" in shown
    assert f"{np.mean(expected):.3f}" in shown


def test_kappa_of_a_table_counts_images_that_its_readers_keep_out(hospital, lab):
    for number in range(1, 5):
        hospital.write(lab.series(number, patient=f"P{number}", accession=f"A{number}"))
    said = {"A1": "MASS MASS", "A2": "MASS NORM", "A3": "NORM NORM"}
    lines = [
        f"{name};{who};{what}" for name, both in said.items() for who, what in zip("xy", both.split(), strict=True)
    ]
    lines = ["acc;who;what", *lines, "A4;x;MASS", "A4;x;NORM", "A4;y;MASS"]
    hospital.table("labels.csv", "\n".join(lines))
    labels = {
        "file": "labels.csv",
        "key": "accession",
        "key_column": "acc",
        "label_column": "what",
        "classes": {"MASS": "lesion", "NORM": "none"},
        "reader_column": "who",
        "consensus": "majority",
    }
    site = hospital.folder / "site.yaml"
    site.write_text(yaml.safe_dump(hospital.site(labels=labels)))
    counts = json.loads(run("ingest", site, "--store", hospital.store, "--json"))
    assert counts["quarantined"]["uncertain_label"] >= 5
    found = json.loads(run("agreement", site, "--store", hospital.store, "--json"))["labels"]
    assert (found["images"], found["statistic"]) == (3, "cohen")
    # Two of three agree; by chance 2/3 · 1/3 + 1/3 · 2/3 = 4/9.
    assert found["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert found["refused"] == {"conflicting_labels": 1}
    assert "kappa (Cohen)" in run("agreement", site, "--store", hospital.store)


def test_reports_and_structure_sets_among_the_images_label_and_mask_them(hospital, lab):
    for number in (1, 2):
        images = lab.series(number, patient=f"P{number}").images()
        hospital.write(images)
        square = np.array([(-9.9, 19.9, 35.0), (-8.3, 19.9, 35.0), (-8.3, 21.4, 35.0), (-9.9, 21.4, 35.0)])
        lab.save(lab.structures(images, {"GTV": [square]}), hospital.dicom / "objects" / f"rt{number}")
        if number == 1:
            lab.save(lab.report(images), hospital.dicom / "objects" / "sr")
    counts = hospital.ingest(
        masks={"kind": "rtstruct", "segments": {"GTV": 1}}, labels={"kind": "sr", "classes": {"SCT:4147007": "lesion"}}
    )
    assert (counts.cases, counts.annotations, counts.quarantined) == (1, 3, {"no_label": 5})
    assert [case.label for case in hospital.catalog().cases(SPLIT)] == ["lesion"]
    assert [int(mask.sum()) for mask in stored_masks(hospital).values()] == [6]
    assert next(hospital.catalog().facts()).codes == ("SCT:4147007",)


def test_a_site_with_one_reader_is_told_what_to_set(hospital, lab):
    hospital.write(lab.series())
    site = hospital.folder / "site.yaml"
    site.write_text(yaml.safe_dump(hospital.site()))
    run("ingest", site, "--store", hospital.store)
    with pytest.raises(DataError, match="one reader"):
        run("agreement", site, "--store", hospital.store)
