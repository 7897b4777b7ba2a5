"""Site files, labels and tables: what is wrong is said with the file, the line or the column, and the remedy."""

from __future__ import annotations

import struct
from collections import Counter

import nibabel
import numpy as np
import pytest

from locum.common.errors import DataError
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sheets import read_sheet
from locum.site_client.imaging.sources import load_site

KEYS = Keys.of(bytes(range(32)))
SPLIT = (0.8, 0.1, 0.1)
LABELS = {"file": "labels.csv", "key": "accession", "key_column": "acc", "label_column": "code"}


def refused(hospital, **parts):
    with pytest.raises(DataError) as caught:
        hospital.ingest(**parts)
    return f"{caught.value.message} | {caught.value.remedy}"


def labels_of(hospital):
    return sorted(case.label for case in hospital.catalog().cases(SPLIT))


@pytest.fixture
def three(hospital, series):
    for number in (1, 2, 3):
        hospital.write(series(number, patient=f"P{number}", accession=f"A{number}"))
    return hospital


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: north\nsources:\n  - {kind: dicom, pth: x}\n", "line 3, sources.0.pth: Extra inputs"),
        ("name: north\nsourses: []\n", "line 2, sourses"),
        ("name: north west\nsources:\n  - {kind: dicom, path: .}\n", "line 1, name"),
        ("name: north\nsources: []\n", "sources"),
        ("name: north\nsources:\n  - {kind: tiff, path: .}\n", "kind"),
        ("name: north\nname: south\nsources: []\n", "stands twice"),
        ("name: [north\n", "line"),
        ("- north\n", "not a site file"),
        ("name: north\nsources:\n  - {kind: dicom, path: nowhere}\n", "nowhere does not exist"),
        ("name: north\nsources:\n  - {kind: npz, path: no.npz, part: [4, 4]}\n", "0 <= k < n"),
        ("name: n\nsources:\n  - {kind: nifti, images: .}\nmasks: {path: ., key: series}\n", "masks is for DICOM"),
        (
            "name: n\nsources: [{kind: dicomweb, url: 'http://pacs'}]\ndeidentification: {options: [retain_uids]}\n",
            "retain_uids is not for a PACS",
        ),
        ("name: n\nsources: [{kind: dicomweb, url: 'http://pacs'}]\nlabels: {kind: sr}\n", "clean_structured_content"),
        (
            "name: n\nsources: [{kind: dicomweb, url: 'http://pacs'}]\nmasks: {kind: rtstruct, segments: {L: 1}}\n",
            "clean_descriptors",
        ),
        (
            "name: n\nsources: [{kind: dicomweb, url: 'http://pacs'}]\n\
table: {file: t.csv, key: accession, key_column: a, patient_column: p}\n",
            "patient_column is for images that carry no patient",
        ),
    ],
)
def test_a_wrong_site_file_is_told_with_its_place(tmp_path, text, says):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load_site(path)
    assert says in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert caught.value.remedy


def test_paths_start_at_the_root_and_the_root_at_the_file(tmp_path):
    (tmp_path / "data" / "scans").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "site.yaml"
    path.write_text("name: north\nroot: ../data\nsources:\n  - {kind: dicom, path: scans}\n")
    assert load_site(path).sources[0].path.samefile(tmp_path / "data" / "scans")


def test_codes_become_classes(three):
    three.table("labels.csv", "acc,code\nA1,MASS\nA2,NORM\nA3,MASS\n")
    counts = three.ingest(labels=LABELS | {"classes": {"MASS": "lesion", "NORM": "no_lesion"}})
    assert counts.cases == 3
    assert labels_of(three) == ["lesion", "lesion", "no_lesion"]


@pytest.mark.parametrize("form", ["acc;code\r\nA1;1\r\nA2;0\r\nA3;1\r\n", "\ufeffacc\tcode\nA1\t1\nA2\t0\n\nA3\t1\n"])
def test_the_delimiter_and_the_mark_of_a_spreadsheet_are_understood(three, form):
    three.table("labels.csv", form)
    assert three.ingest(labels=LABELS | {"classes": {1: "lesion", 0: "none"}}).cases == 3


def test_images_without_a_label_or_with_an_unknown_or_a_second_one_are_quarantined(three, series):
    three.write(series(4, patient="P4", accession="A4"))
    three.table("labels.csv", "acc,code\nA1,MASS\nA2,ODD\nA3,MASS\nA3,NORM\nA4,\n")
    counts = three.ingest(labels=LABELS | {"classes": {"MASS": "lesion", "NORM": "no_lesion"}})
    assert counts.cases == 1
    assert counts.quarantined == {Reason.NO_LABEL: 5, Reason.UNMAPPED_CODE: 5, Reason.CONFLICTING_LABELS: 5}
    details = {detail for _, reason, detail in three.catalog().quarantine() if reason == Reason.UNMAPPED_CODE}
    assert details == {"ODD"}


def test_labels_of_unknown_patients_are_counted_and_listed_by_line(three):
    three.table("labels.csv", "acc,code\nA1,x\nA2,y\nA3,x\nA99,x\nA98,y\n")
    assert three.ingest(labels=LABELS).labels_without_image == 2
    assert three.catalog().unmatched_lines() == ("labels.csv:5", "labels.csv:6")


@pytest.mark.parametrize(("key", "cell", "shown"), [("accession", "P1", "'A"), ("patient", "A1", "'P")])
def test_a_label_file_that_names_no_image_is_an_error_with_an_example_of_each_side(three, key, cell, shown):
    three.table("labels.csv", f"acc,code\n{cell},x\n")
    said = refused(three, labels=LABELS | {"key": key})
    assert f"'{cell}'" in said
    assert shown in said
    assert "key_column" in said


@pytest.mark.parametrize(("key", "cells"), [("patient", ["P1", "P2", "P3"]), ("file", ["a.dcm", "b", "c"])])
def test_labels_can_be_keyed_by_patient_or_by_file(hospital, series, key, cells):
    for number, place in enumerate("abc", start=1):
        (path,) = hospital.write(series(number, patient=f"P{number}", slices=1))
        path.rename(hospital.dicom / f"{place}.dcm")
    hospital.table("labels.csv", "acc,code\n" + "".join(f"{cell},x\n" for cell in cells))
    assert hospital.ingest(labels=LABELS | {"key": key}).cases == 3
    assert hospital.ingest(labels=LABELS | {"key": key}).cases == 3


@pytest.mark.parametrize("key", ["series", "study"])
def test_labels_can_be_keyed_by_uid(three, series, key):
    tail = {"series": "", "study": ".2"}[key]
    three.table("labels.csv", "acc,code\n" + "".join(f"{series(n).uid}{tail},x\n" for n in (1, 2, 3)))
    assert three.ingest(labels=LABELS | {"key": key}).cases == 3


def test_a_changed_label_is_taken_without_reading_other_series_again(three):
    three.table("labels.csv", "acc,code\nA1,x\nA2,x\nA3,x\n")
    three.ingest(labels=LABELS)
    before = {path.name: path.stat().st_mtime_ns for path in (three.store / "volumes").iterdir()}
    three.table("labels.csv", "acc,code\nA1,x\nA2,y\nA3,x\n")
    three.ingest(labels=LABELS)
    after = {path.name: path.stat().st_mtime_ns for path in (three.store / "volumes").iterdir()}
    assert labels_of(three) == ["x", "x", "y"]
    assert len(before.items() & after.items()) == 2


@pytest.mark.parametrize("key", ["accession", "file"])
def test_a_label_without_a_name_is_no_images_label_and_is_listed(hospital, series, key):
    hospital.write(series(1, accession="IM00000", slices=1))
    hospital.write(series(2, accession=""))
    hospital.table("labels.csv", "acc,code\nIM00000,yes\n,no\n")
    counts = hospital.ingest(labels=LABELS | {"key": key})
    assert (labels_of(hospital), counts.quarantined) == (["yes"], {Reason.NO_LABEL: 5})
    assert hospital.catalog().unmatched_lines() == ("labels.csv:3",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("accession,code\nA1,x\n", "no column 'acc'"),
        ("acc,code\nA1,x,y\n", "line 2"),
        ("acc,code,acc\nA1,x,y\n", "twice"),
        ("", "header"),
    ],
)
def test_a_wrong_table_is_told_with_its_place(three, text, says):
    three.table("labels.csv", text)
    said = refused(three, labels=LABELS)
    assert says in said
    assert "labels.csv" in said


def test_a_label_file_with_no_known_code_is_an_error(three):
    three.table("labels.csv", "acc,code\nA1,MASS\n")
    said = refused(three, labels=LABELS | {"classes": {"TUMOR": "lesion"}})
    assert "MASS" in said
    assert "TUMOR" in said


def test_a_missing_label_file_is_an_error(three):
    assert "labels.csv does not exist" in refused(three, labels=LABELS)


def test_a_table_that_is_not_utf8_is_told_with_its_line(tmp_path):
    (tmp_path / "t.csv").write_bytes("a,b\n1,ä\n".encode("latin-1"))
    with pytest.raises(DataError, match="line 2"):
        read_sheet(tmp_path / "t.csv")


def test_cells_with_delimiters_and_line_breaks_are_cells(tmp_path):
    (tmp_path / "t.csv").write_text('a,b\n"x, y","two\nlines"\n007,z\n')
    rows = read_sheet(tmp_path / "t.csv").rows
    assert [row.cells for row in rows] == [{"a": "x, y", "b": "two\nlines"}, {"a": "007", "b": "z"}]
    assert [row.line for row in rows] == [2, 4]


def test_a_table_is_parsed_once_and_again_once_it_has_changed(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,x\n")
    first = read_sheet(path)
    assert read_sheet(path) is first
    path.write_text("a,b\n1,xy\n")
    assert [row.cells for row in read_sheet(path).rows] == [{"a": "1", "b": "xy"}]


def test_a_boolean_where_a_code_belongs_is_an_error(three):
    with pytest.raises(DataError, match="quotation marks"):
        load_site(three.site(labels=LABELS | {"classes": {False: "none"}}))


TABLE = {"file": "table.csv", "key": "accession", "key_column": "acc", "where": {"site": "north"}}


def test_a_table_says_which_images_are_this_sites(three):
    three.table("table.csv", "acc,site\nA1,north\nA2,south\nA3,north\nA7,north\n")
    counts = three.ingest(table=TABLE)
    assert (counts.found, counts.cases, counts.quarantined) == (10, 2, {})
    assert counts.labels_without_image == 1


def test_a_line_without_a_name_makes_no_image_this_sites(three, series):
    three.write(series(4, patient="P4", accession=""))
    three.table("table.csv", "acc,site\nA1,north\n,north\n")
    counts = three.ingest(table=TABLE)
    assert (counts.found, counts.cases) == (5, 1)
    assert three.catalog().unmatched_lines() == ("table.csv:3",)


def test_a_table_without_a_row_for_the_site_is_an_error(three):
    three.table("table.csv", "acc,site\nA1,south\n")
    said = refused(three, table=TABLE)
    assert "site = north" in said
    assert "south" in said


def test_a_fold_of_the_table_wins(three):
    three.table("table.csv", "acc,site,fold\nA1,north,test\nA2,north,validation\nA3,north,train\n")
    three.ingest(table=TABLE | {"fold_column": "fold"})
    assert Counter(case.fold for case in three.catalog().cases((0.0, 0.0, 1.0))) == {
        "test": 1, "validation": 1, "train": 1,
    }  # fmt: skip


def test_a_table_with_an_unknown_fold_is_an_error(three):
    three.table("table.csv", "acc,site,fold\nA1,north,holdout\n")
    assert "line 2, column 'fold'" in refused(three, table=TABLE | {"fold_column": "fold"})


def test_a_table_that_puts_a_patient_in_two_folds_is_an_error(three, series):
    three.write(series(4, patient="P1", accession="A4"))
    three.table("table.csv", "acc,site,fold\nA1,north,test\nA4,north,train\n")
    assert "put all images of a patient in one fold" in refused(three, table=TABLE | {"fold_column": "fold"})


def test_a_stated_fold_holds_for_all_images_of_the_patient(three, series):
    three.write(series(4, patient="P1", accession="A4"))
    three.table("table.csv", "acc,site,fold\nA1,north,test\nA4,north,\nA2,north,train\n")
    three.ingest(table=TABLE | {"fold_column": "fold"})
    folds = {case.patient: set() for case in three.catalog().cases(SPLIT)}
    for case in three.catalog().cases(SPLIT):
        folds[case.patient].add(case.fold)
    assert {"test"} in folds.values()
    assert all(len(found) == 1 for found in folds.values())


@pytest.fixture
def nifti(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        affine = np.array([[0, -2, 0, 5], [1, 0, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1.0]])
        image = nibabel.Nifti1Image(rng.normal(size=(4, 5, 6)).astype(np.float32), affine)
        image.header["descrip"] = b"Jane Doe 1950"
        nibabel.save(image, tmp_path / "images" / f"v{number}.nii.gz")
        mask = nibabel.Nifti1Image(rng.integers(0, 3, (4, 5, 6)).astype(np.float64), affine)
        nibabel.save(mask, tmp_path / "masks" / f"v{number}.nii.gz")
    return tmp_path


def site_of(folder, **parts):
    sources = [{"kind": "nifti", "images": "images", "masks": "masks"}]
    return load_site({"name": "north", "root": str(folder), "sources": sources} | parts)


def test_nifti_keeps_its_values_and_its_grid_and_loses_its_description(nifti):
    (nifti / "images" / "SOURCES.md").write_text("from somewhere")
    (nifti / "images" / "broken.nii.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    (nifti / "masks" / "broken.nii.gz").write_bytes(b"")
    (nifti / "images" / "alone.nii").write_bytes((nifti / "images" / "v0.nii.gz").read_bytes())
    counts = ingest(site_of(nifti), nifti / "store", keys=KEYS)
    assert counts.cases == 4
    assert counts.quarantined == {Reason.NOT_AN_IMAGE: 1, Reason.UNREADABLE: 1, Reason.MASK_MISSING: 1}
    originals = [nibabel.load(path) for path in sorted((nifti / "images").glob("v*"))]
    for case in Catalog.open(nifti / "store").cases(SPLIT):
        stored = nibabel.load(case.image)
        (same,) = [one for one in originals if np.array_equal(one.dataobj, stored.dataobj)]
        assert np.allclose(stored.affine, same.affine)
        assert b"Jane" not in case.image.read_bytes()
        assert np.unique(nibabel.load(case.mask).dataobj).tolist() == [0, 1, 2]


def test_a_table_picks_nifti_files_folds_and_patients(nifti):
    (nifti / "table.csv").write_text(
        "file,site,fold,who\nv0.nii.gz,north,train,p\nv1.nii.gz,north,train,p\nv2.nii.gz,north,test,q\nv3,south,,\n"
    )
    table = {"file": "table.csv", "key": "file", "key_column": "file", "where": {"site": "north"}}
    table |= {"fold_column": "fold", "patient_column": "who"}
    counts = ingest(site_of(nifti, table=table), nifti / "store", keys=KEYS)
    cases = Catalog.open(nifti / "store").cases((1.0, 0.0, 0.0))
    assert (counts.found, counts.cases) == (3, 3)
    assert len({case.patient for case in cases}) == 2
    assert Counter(case.fold for case in cases) == {"train": 2, "test": 1}


def test_the_train_rows_of_a_table_without_validation_are_divided(nifti):
    rows = "".join(f"v{number}.nii.gz,{'test' if number == 3 else 'train'}\n" for number in range(4))
    (nifti / "table.csv").write_text(f"file,fold\n{rows}")
    table = {"file": "table.csv", "key": "file", "key_column": "file", "fold_column": "fold"}
    ingest(site_of(nifti, table=table), nifti / "store", keys=KEYS)
    cases = Catalog.open(nifti / "store").cases((0.0, 1.0, 0.0))
    assert Counter(case.fold for case in cases) == {"validation": 3, "test": 1}


@pytest.fixture
def npz(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, rows in (("train", 10), ("val", 4), ("test", 6)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (rows, 5, 7)).astype(np.uint8)
        arrays[f"{part}_labels"] = (np.arange(rows) % 2).astype(np.uint8)[:, None]
    np.savez_compressed(tmp_path / "set.npz", **arrays)
    return tmp_path, arrays


def test_an_npz_gives_its_rows_and_its_folds(npz):
    folder, arrays = npz
    source = {"kind": "npz", "path": "set.npz", "part": [1, 2], "classes": {0: "no", 1: "yes"}}
    (folder / "table.csv").write_text("index,site\n0,2\n3,2\n4,1\n9,2\n")
    table = {"file": "table.csv", "key": "index", "key_column": "index", "where": {"site": 2}}
    site = load_site({"name": "two", "root": str(folder), "sources": [source], "table": table})
    for _ in range(2):
        counts = ingest(site, folder / "store", keys=KEYS)
        assert (counts.found, counts.stored, counts.cases) == (8, 8, 8)
    cases = Catalog.open(folder / "store").cases(SPLIT)
    assert Counter((case.fold, case.label) for case in cases) == {
        ("train", "no"): 1, ("train", "yes"): 2, ("validation", "yes"): 2, ("test", "yes"): 3,
    }  # fmt: skip
    stored = sorted(np.asarray(nibabel.load(case.image).dataobj).T.tobytes() for case in cases if case.fold == "train")
    assert stored == sorted(arrays["train_images"][index].astype(np.int16).tobytes() for index in (0, 3, 9))


def test_a_line_without_an_index_says_nothing_of_validation_and_test_rows(npz):
    folder, _ = npz
    (folder / "table.csv").write_text("index,fold,who\n0,train,p\n,test,q\n")
    table = {"file": "table.csv", "key": "index", "key_column": "index", "fold_column": "fold", "patient_column": "who"}
    sources = [{"kind": "npz", "path": "set.npz"}]
    site = load_site({"name": "n", "root": str(folder), "sources": sources, "table": table})
    ingest(site, folder / "store", keys=KEYS)
    catalog = Catalog.open(folder / "store")
    cases = catalog.cases(SPLIT)
    assert Counter(case.fold for case in cases) == {"train": 1, "validation": 4, "test": 6}
    assert len({case.patient for case in cases}) == 11
    assert catalog.unmatched_lines() == ("table.csv:3",)


def _as(compression):
    """Another compression method in the archive's directory than the members have."""

    def change(content):
        place = content.index(b"PK\x01\x02") + 10
        return content[:place] + bytes([compression]) + content[place + 1 :]

    return change


def _encrypted(content):
    place = content.index(b"PK\x01\x02") + 8
    return content[:place] + b"\x01" + content[place + 1 :]


def _without_its_stream(content):
    """The first member begins as no deflate stream does."""
    name, extra = struct.unpack_from("<HH", content, 26)
    place = 30 + name + extra
    return content[:place] + b"\xff" + content[place + 1 :]


@pytest.mark.parametrize("damage", [_without_its_stream, _as(99), _encrypted])
def test_a_damaged_npz_is_an_error_in_words(npz, damage):
    folder, _ = npz
    (folder / "set.npz").write_bytes(damage((folder / "set.npz").read_bytes()))
    site = load_site({"name": "n", "root": str(folder), "sources": [{"kind": "npz", "path": "set.npz"}]})
    with pytest.raises(DataError, match=r"set\.npz cannot be read"):
        ingest(site, folder / "store", keys=KEYS)


def test_an_npz_without_an_array_is_an_error(tmp_path):
    np.savez(tmp_path / "set.npz", train_images=np.zeros((1, 2, 2)))
    site = load_site({"name": "n", "root": str(tmp_path), "sources": [{"kind": "npz", "path": "set.npz"}]})
    with pytest.raises(DataError, match="train_labels"):
        ingest(site, tmp_path / "store", keys=KEYS)
