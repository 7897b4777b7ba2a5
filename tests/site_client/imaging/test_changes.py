"""What changes between two ingests, and what an ingest must not mix up."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from locum.site_client.imaging import quarantine
from locum.site_client.imaging.inventory import Inventory
from locum.site_client.imaging.reasons import Reason

LABELS = {"file": "labels.csv", "key": "accession", "key_column": "accession", "label_column": "class"}
ALL_TRAIN = (1.0, 0.0, 0.0)


def write_mask(path: Path, value: int) -> None:
    """A mask for a series of 3 slices of 4 rows and 5 columns."""
    affine = np.diag([-0.8, -0.5, 2.5, 1.0])
    affine[:3, 3] = (10.0, -20.0, 30.0)
    path.parent.mkdir(exist_ok=True)
    nibabel.Nifti1Image(np.full((5, 4, 3), value, np.uint8), affine).to_filename(path)


def test_a_mask_that_an_interrupted_ingest_wrote_does_not_stay_where_the_earlier_one_is_asked_for(hospital, series):
    hospital.write(series(slices=3, shape=(4, 5)))
    for value in (1, 2):
        write_mask(hospital.folder / f"masks{value}" / "A1.nii", value)
    first, second = ({"path": f"masks{value}", "key": "accession"} for value in (1, 2))
    hospital.ingest(masks=first)
    child = os.fork()
    if child == 0:  # it dies between the files and the catalog
        Inventory.stored = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        hospital.ingest(masks=second)
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    hospital.ingest(masks=first)
    (case,) = hospital.catalog().cases(ALL_TRAIN)
    assert np.unique(np.asarray(nibabel.load(case.mask).dataobj)) == [1]


def test_a_site_whose_folder_was_moved_finds_its_files_there(hospital, new_hospital, series, tmp_path):
    old = new_hospital(tmp_path / "old")
    old.folder.mkdir()
    old.write(series())
    old.table("labels.csv", "accession,class\nA1,one\n")
    old.ingest(labels=LABELS)
    moved = new_hospital(old.folder.rename(tmp_path / "new"))
    moved.table("labels.csv", "accession,class\nA1,two\n")
    assert moved.ingest(labels=LABELS).cases == 1
    assert [facts.label for facts in moved.catalog().facts()] == ["two"]


def test_a_source_that_becomes_another_kind_is_looked_at_anew(hospital):
    folder = hospital.folder / "images"
    folder.mkdir()
    nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4)).to_filename(folder / "x.nii")
    sources = [{"kind": "dicom", "path": "images"}]
    assert hospital.ingest(sources=sources).quarantined == {Reason.NOT_AN_IMAGE: 1}
    assert hospital.ingest(sources=[{"kind": "nifti", "images": "images", "modality": "MR"}]).cases == 1


def test_a_stated_fold_holds_for_a_patient_whose_only_image_with_it_is_in_quarantine(hospital, series):
    hospital.write(series(1))
    hospital.write(series(2, accession="A2", over={"BurnedInAnnotation": "YES"}))
    table = {"file": "folds.csv", "key": "accession", "key_column": "accession", "fold_column": "fold"}
    hospital.table("folds.csv", "accession,fold\nA1,\nA2,test\n")
    hospital.ingest(table=table)
    assert [case.fold for case in hospital.catalog().cases(ALL_TRAIN)] == ["test"]
    hospital.table("folds.csv", "accession,fold\nA1,\nA2,\n")
    hospital.ingest(table=table)
    assert [case.fold for case in hospital.catalog().cases(ALL_TRAIN)] == ["train"]


def test_a_mask_without_a_reader_is_not_that_of_an_image_without_an_accession_number(hospital, series):
    hospital.write(series(accession="", slices=3, shape=(4, 5)))
    write_mask(hospital.folder / "masks" / "A7.nii.gz", 1)
    counts = hospital.ingest(masks={"path": "masks", "key": "accession", "consensus": "majority"})
    assert counts.quarantined == {Reason.MASK_MISSING: 3}
    assert hospital.catalog().unmatched_lines() == ("A7.nii.gz",)


def test_a_box_that_was_drawn_on_one_file_does_not_cut_another(hospital, series):
    over = {"BurnedInAnnotation": "YES"}
    hospital.write(series(slices=1, shape=(40, 50), over=over))
    hospital.ingest()
    (held,) = quarantine.held(hospital.catalog().connection)
    quarantine.decide(hospital.store, quarantine.Wish(held.handle, "release", "A. Steward", crop=(2, 2, 20, 20)))
    hospital.ingest()
    assert [facts.shape for facts in hospital.catalog().facts()] == [(20, 20)]
    hospital.write(series(slices=1, shape=(40, 50), over={"BurnedInAnnotation": "NO", "PatientSex": "F"}))
    hospital.ingest()
    assert [facts.shape for facts in hospital.catalog().facts()] == [(50, 40)]


def test_a_box_holds_for_an_image_that_was_rejected_before(hospital, series):
    hospital.write(series(slices=1, shape=(40, 50)))
    hospital.ingest()
    unit = hospital.catalog().connection.execute("SELECT key FROM units").fetchone()[0]
    quarantine.decide(hospital.store, quarantine.Wish(unit, "reject", "A. Steward"))
    hospital.ingest()
    quarantine.decide(hospital.store, quarantine.Wish(unit, "release", "A. Steward", crop=(2, 2, 20, 20)))
    hospital.ingest()
    assert [facts.shape for facts in hospital.catalog().facts()] == [(20, 20)]


def test_an_accession_number_of_two_patients_gives_neither_a_label(hospital, series):
    hospital.write(series(1))
    hospital.write(series(2, patient="P2"))
    hospital.write(series(3, patient="P3", accession="A3"))
    hospital.table("labels.csv", "accession,class\nA1,one\nA3,one\n")
    counts = hospital.ingest(labels=LABELS)
    assert (counts.cases, counts.quarantined) == (1, {Reason.CONFLICTING_LABELS: 10})


def test_a_series_whose_images_have_two_accession_numbers_has_the_label_of_neither(hospital, series):
    images = series(1).images()
    images[0].AccessionNumber = "A2"
    hospital.write(images)
    hospital.write(series(3, patient="P3", accession="A3"))
    hospital.table("labels.csv", "accession,class\nA1,one\nA2,two\nA3,one\n")
    assert hospital.ingest(labels=LABELS).quarantined == {Reason.NO_LABEL: 5}


def test_a_file_name_that_is_no_utf_8_stops_nothing(hospital, series):
    path = hospital.write(series())[0]
    path.rename(os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe"))
    assert hospital.ingest().stored == 5
    hospital.write(series(2, patient="P2"))
    hospital.ingest(defaced=True)  # all are read again
    assert hospital.catalog().counts().stored == 10


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become another")
def test_a_file_whose_access_rights_were_mended_is_read_again(hospital, series):
    path = hospital.write(series())[0]
    hospital.dicom.chmod(0o777)
    path.chmod(0)

    def stored_as_another_user() -> int:
        os.setgid(65534)
        os.setuid(65534)
        return hospital.ingest().stored

    for parent in (hospital.folder, *list(hospital.folder.parents)[:-2]):
        parent.chmod(0o777)
    assert in_a_child(stored_as_another_user) == 4
    path.chmod(0o644)
    assert in_a_child(stored_as_another_user) == 5


def in_a_child(work) -> int:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_sidecar_that_is_older_than_its_image_is_seen(hospital):
    folder = hospital.folder / "sub-1" / "anat"
    folder.mkdir(parents=True)
    nibabel.Nifti1Image(np.ones((4, 5, 6), np.int16), np.eye(4)).to_filename(folder / "sub-1_T1w.nii")
    sources = [{"kind": "bids", "path": ".", "suffixes": ["T1w"], "modality": "MR"}]
    hospital.ingest(sources=sources)
    sidecar = folder / "sub-1_T1w.json"
    sidecar.write_text('{"Manufacturer": "ACME"}')
    os.utime(sidecar, (1e9, 1e9))
    hospital.ingest(sources=sources)
    assert [facts.manufacturer for facts in hospital.catalog().facts()] == ["ACME"]
    sidecar.unlink()
    hospital.ingest(sources=sources)
    assert [facts.manufacturer for facts in hospital.catalog().facts()] == [""]


@pytest.mark.slow
def test_an_ingest_waits_for_whoever_reads_a_large_catalog(hospital, series):
    hospital.write(series())
    hospital.ingest()

    def read_slowly() -> int:
        rows = hospital.catalog().connection.execute("SELECT * FROM items")
        rows.fetchone()
        os.write(writing, b"x")
        time.sleep(7)  # longer than SQLite waits unless told
        return 0

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(read_slowly())
    os.read(reading, 1)
    assert hospital.ingest(defaced=True).cases == 1
    os.waitpid(child, 0)
