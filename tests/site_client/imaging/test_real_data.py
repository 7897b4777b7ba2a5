"""Real data: scanners of four vendors, many codecs, malformed files, and the public sets used as sites."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut

from locum.site_client.imaging import dicom
from locum.site_client.imaging.catalog import Catalog
from locum.site_client.imaging.geometry import volume_of
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.reasons import Reason, RefusedError
from locum.site_client.imaging.sources import load_site

KEYS = Keys.of(bytes(range(32)))
SPLIT = (0.8, 0.1, 0.1)


def dicom_folder(folder, store):
    site = load_site({"name": "real", "root": str(folder), "sources": [{"kind": "dicom", "path": "."}]})
    counts = ingest(site, store, keys=KEYS)
    assert counts.found == sum(path.is_file() for path in folder.rglob("*"))
    return counts


def test_scans_of_four_vendors_are_stored_or_refused_with_a_reason(shared, tmp_path):
    counts = dicom_folder(shared / "dicom_vendor_sites", tmp_path / "store")
    # All are time series or mosaics: several images at one place, which nobody may guess apart.
    assert counts.quarantined == {Reason.DUPLICATED_POSITIONS: 195, Reason.MOSAIC: 8, Reason.NOT_AN_IMAGE: 5}


def test_one_time_point_of_a_real_scan_is_a_volume(shared, tmp_path):
    scan = tmp_path / "scan"
    scan.mkdir()
    for path in sorted((shared / "dicom_vendor_sites/site_philips_magdeburg/fmri").glob("*_0001_*")):
        (scan / path.stem).write_bytes(path.read_bytes())
    counts = dicom_folder(scan, tmp_path / "store")
    (fact,) = Catalog.open(tmp_path / "store").facts()
    assert (counts.cases, fact.shape, fact.modality) == (1, (64, 64, counts.found), "MR")
    assert "Philips" in fact.manufacturer


def test_no_malformed_file_stops_an_ingest(shared, tmp_path):
    counts = dicom_folder(shared / "dicom_codecs_objects/malformed", tmp_path / "store")
    assert counts.cases == 0


def test_codecs_and_objects_are_stored_or_refused_with_a_reason(shared, tmp_path):
    folder = shared / "dicom_codecs_objects"
    counts = dicom_folder(folder, tmp_path / "store")
    refused = {name.rpartition("/")[2] for name, _, _ in Catalog.open(tmp_path / "store").quarantine()}
    stored = {"693_J2KR.dcm", "CT1_JLSN.dcm", "TOSHIBA_J2K_SIZ1_PixRep0.dcm", "bad_sequence.dcm", "ct_image.dcm"}
    stored |= {"dx_image.dcm"}
    assert stored.isdisjoint(refused)
    assert (counts.cases, counts.stored, counts.annotations) == (7, 9, 26)
    # Microscopy, real world values, annotations of microscopy, parametric maps.
    assert counts.quarantined[Reason.UNSUPPORTED_OBJECT] == 11
    # The patient ID of these files is the number of their series too.
    assert counts.quarantined[Reason.RESIDUE] == 8


@pytest.mark.parametrize("scanner", ["site_ge_nih", "site_ge_premier", "site_philips_magdeburg"])
def test_one_time_point_of_a_vendors_series_is_right_in_every_voxel(shared, scanner):
    series = defaultdict(dict)
    for path in sorted((shared / "dicom_vendor_sites" / scanner).rglob("*")):
        image = opened(path)
        if image is not None and image.SOPClassUID in dicom.SLICES and "MOSAIC" not in image.ImageType:
            # The first image at every place of a time series.
            series[image.SeriesInstanceUID].setdefault(tuple(image.ImagePositionPatient), image)
    assert series
    for first in series.values():
        images = list(first.values())
        volume = volume_of(images)
        assert volume.array.shape[2] == len(images)
        origins = (np.diag([-1, -1, 1, 1]) @ volume.affine)[:3]
        places = {tuple((origins @ (0, 0, k, 1)).round(1)): k for k in range(len(images))}
        for image in images:
            k = places[tuple(np.round(np.array(image.ImagePositionPatient, float), 1))]
            expected = apply_modality_lut(image.pixel_array, image).astype(volume.array.dtype)
            assert np.array_equal(volume.array[:, :, k].T, expected)


def opened(path):
    try:
        return dicom.read(path, path.stat().st_size)
    except RefusedError:
        return None


def test_two_encodings_of_one_ct_slice_give_one_picture_in_hounsfield_units(shared, tmp_path):
    folder = shared / "dicom_codecs_objects/pydicom+pydicom-data/data_store/data"
    for name in ("693_J2KR.dcm", "693_UNCR.dcm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes((folder / name).read_bytes())
        assert dicom_folder(tmp_path / name, tmp_path / f"store {name}").cases == 1
    stored = [
        np.asarray(nibabel.load(Catalog.open(tmp_path / f"store {name}").cases(SPLIT)[0].image).dataobj)
        for name in ("693_J2KR.dcm", "693_UNCR.dcm")
    ]
    image = pydicom.dcmread(folder / "693_UNCR.dcm")
    assert np.array_equal(stored[0], stored[1])
    assert np.array_equal(stored[1].T, image.pixel_array * image.RescaleSlope + image.RescaleIntercept)


def test_burned_in_text_is_kept_out(shared, tmp_path):
    folder = shared / "deid_burned_in"
    dicom_folder(folder, tmp_path / "store")
    refused = {name: reason for name, reason, _ in Catalog.open(tmp_path / "store").quarantine()}
    truth = list((folder / "presidio").rglob("*.dcm"))
    assert truth
    assert all(str(path.relative_to(folder)) in refused for path in truth)


def test_hippocampus_sites_have_the_images_and_folds_of_the_published_split(shared, tmp_path):
    split = shared / "suggested_splits/hippocampus_4sites.csv"
    with split.open() as file:
        rows = [row for row in csv.DictReader(file) if row["site"] == "A_uint8"]
    table = {"file": str(split), "key": "file", "key_column": "file", "fold_column": "fold"}
    sources = [{"kind": "nifti", "images": "images", "masks": "labels"}]
    site = load_site(
        {
            "name": "a",
            "root": str(shared / "msd_hippocampus"),
            "sources": sources,
            "table": table | {"where": {"site": "A_uint8"}},
        }
    )
    counts = ingest(site, tmp_path / "store", keys=KEYS)
    cases = Catalog.open(tmp_path / "store").cases(SPLIT)
    folds = Counter(case.fold for case in cases)
    assert (counts.found, counts.cases) == (len(rows), len(rows))
    assert folds["test"] == sum(row["fold"] == "test" for row in rows)
    assert folds["validation"] > 0
    assert all(nibabel.load(case.mask).shape == nibabel.load(case.image).shape for case in cases)


def test_the_four_breast_sites_share_the_official_rows_without_overlap(shared, tmp_path):
    stored = Counter()
    patients = []
    for number in range(4):
        table = {
            "file": str(shared / "suggested_splits/breastmnist_4sites.csv"),
            "key": "index",
            "key_column": "index",
            "where": {"site": number},
        }
        source = {"kind": "npz", "path": "breastmnist.npz", "part": [number, 4], "classes": {0: "bad", 1: "good"}}
        site = load_site({"name": f"s{number}", "root": str(shared / "medmnist"), "sources": [source], "table": table})
        ingest(site, tmp_path / str(number), keys=KEYS)
        cases = Catalog.open(tmp_path / str(number)).cases(SPLIT)
        stored.update(case.fold for case in cases)
        patients += [case.patient for case in cases]
    assert stored == {"train": 546, "validation": 78, "test": 156}
    assert len(set(patients)) == 780


def test_monai_reads_pictures_and_volumes_as_they_lie(hospital, series):
    transforms = pytest.importorskip("monai.transforms")
    hospital.write(series())
    hospital.write(series(2, slices=1))
    hospital.ingest()
    load = transforms.Compose(
        [transforms.LoadImaged(["image"]), transforms.EnsureChannelFirstd(["image"]), transforms.ToTensord(["image"])]
    )
    shapes = {tuple(load({"image": str(case.image)})["image"].shape) for case in hospital.catalog().cases(SPLIT)}
    assert shapes == {(1, 7, 6, 5), (1, 7, 6)}


def test_facts_are_plain_data(shared, tmp_path):
    dicom_folder(shared / "dicom_codecs_objects/QIICR+dcmqi", tmp_path / "store")
    for fact in Catalog.open(tmp_path / "store").facts():
        assert json.dumps([fact.shape, fact.spacing])
