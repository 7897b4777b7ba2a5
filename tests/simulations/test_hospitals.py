from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import yaml
from pydicom.errors import InvalidDicomError

from locum.common.errors import DataError
from locum.simulations.hospitals import HARMLESS, Damage, HospitalSpec, write_hospital
from locum.simulations.phantoms import Scanner
from locum.simulations.scans import Storage
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site

SMALL = HospitalSpec(
    "north",
    seed=7,
    patients=8,
    prevalence=0.5,
    shape=(6, 20, 24),
    spacing=(6.0, 5.0, 4.0),
    diameters=(14, 20),
    follow_ups=0.25,
    scanner=Scanner(noise=5),
)
RADIOGRAPHS = replace(
    SMALL,
    modality="DX",
    shape=(1, 32, 28),
    spacing=(1.0, 3.0, 3.0),
    storage=Storage(bits=14, intercept=0.0, inverted=True),
)

STORED_MR = Storage(bits=14, intercept=0.0)


def _files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _truth(folder: Path) -> list[dict[str, Any]]:
    studies: list[dict[str, Any]] = json.loads((folder / "truth.json").read_text())["studies"]
    return studies


def _series(folder: Path) -> dict[str, list[pydicom.Dataset]]:
    found: dict[str, list[pydicom.Dataset]] = {}
    for path in (folder / "dicom").rglob("*"):
        if path.is_file():
            try:
                dataset = pydicom.dcmread(path)
            except InvalidDicomError:
                continue
            found.setdefault(dataset.SeriesInstanceUID, []).append(dataset)
    return found


def _labels(folder: Path) -> dict[str, str]:
    """Accession number to class of the plan, read as the hospital's own configuration says."""
    site = yaml.safe_load((folder / "site.yaml").read_text(encoding="utf-8"))["labels"]
    text = (folder / site["file"]).read_text(encoding="utf-8-sig")
    rows = csv.DictReader(text.splitlines(), dialect=csv.Sniffer().sniff(text, ",;\t"))
    return {row[site["key_column"]]: site["classes"][row[site["label_column"]]] for row in rows}


@pytest.mark.parametrize("spec", [SMALL, replace(SMALL, task="segmentation", broken=7), RADIOGRAPHS])
def test_the_same_specification_writes_the_same_bytes(spec: HospitalSpec, tmp_path: Path) -> None:
    write_hospital(spec, tmp_path / "a")
    write_hospital(spec, tmp_path / "b")
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_another_seed_is_another_hospital(tmp_path: Path) -> None:
    write_hospital(SMALL, tmp_path / "a")
    write_hospital(replace(SMALL, seed=8), tmp_path / "b")
    a, b = (set(_files(tmp_path / name).values()) for name in "ab")
    assert not {one["series"] for one in _truth(tmp_path / "a")} & {one["series"] for one in _truth(tmp_path / "b")}
    assert len(a & b) <= 1  # the site's configuration


def test_a_complete_hospital_is_left_alone(tmp_path: Path) -> None:
    write_hospital(SMALL, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    write_hospital(SMALL, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_aborted_hospital_is_written_again(tmp_path: Path) -> None:
    write_hospital(SMALL, tmp_path)
    whole = _files(tmp_path)
    (tmp_path / "DONE").unlink()
    (tmp_path / "labels.csv").unlink()
    next(path for path in (tmp_path / "dicom").rglob("*") if path.is_file()).write_bytes(b"half")
    (tmp_path / "dicom" / "left over").write_bytes(b"half")
    write_hospital(SMALL, tmp_path)
    assert _files(tmp_path) == whole


def test_another_specification_replaces_the_hospital(tmp_path: Path) -> None:
    write_hospital(replace(SMALL, task="segmentation", broken=3), tmp_path / "a")
    write_hospital(SMALL, tmp_path / "a")
    write_hospital(SMALL, tmp_path / "b")
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "thesis.docx").write_bytes(b"years of work")
    with pytest.raises(DataError, match="holds no simulated hospital"):
        write_hospital(SMALL, tmp_path)
    assert _files(tmp_path).keys() == {"dicom/thesis.docx"}


@pytest.mark.parametrize("habits", range(4))
def test_labels_agree_with_the_truth_in_the_hospitals_own_words(habits: int, tmp_path: Path) -> None:
    write_hospital(replace(SMALL, habits=habits), tmp_path)
    assert _labels(tmp_path) == {one["accession"]: one["class"] for one in _truth(tmp_path)}
    assert all((one["lesion_voxels"] > 0) == (one["class"] == "lesion") for one in _truth(tmp_path))


@pytest.mark.parametrize("habits", range(4))
def test_every_study_reads_back_as_a_volume_with_names_in_their_own_letters(habits: int, tmp_path: Path) -> None:
    spec = replace(SMALL, habits=habits, orientation=("axial", "oblique", "sagittal", "axial")[habits])
    write_hospital(spec, tmp_path)
    found = _series(tmp_path)
    for study in _truth(tmp_path):
        datasets = found.pop(study["series"])
        assert {dataset.PatientID for dataset in datasets} == {study["patient"]}
        assert "\ufffd" not in str(datasets[0].PatientName)
        assert "^" in str(datasets[0].PatientName)
        volume = hd.get_volume_from_series(datasets, apply_presentation_lut=False)
        assert sorted(volume.array.shape) == sorted(spec.shape)
        for lesion in study["lesions"]:
            centre = np.linalg.solve(volume.affine, np.append(lesion["centre_lps_mm"], 1.0))[:3]
            around = volume.array[tuple(np.clip(np.rint(centre).astype(int), 0, np.array(volume.array.shape) - 1))]
            assert around > 80  # soft tissue has 40 HU
    assert not found


def test_hospitals_name_their_files_differently(tmp_path: Path) -> None:
    shapes = set()
    for habits in range(4):
        write_hospital(replace(SMALL, habits=habits, patients=2), tmp_path / str(habits))
        (path, *_) = (path for path in (tmp_path / str(habits) / "dicom").rglob("*") if path.is_file())
        relative = path.relative_to(tmp_path / str(habits))
        shapes.add((len(relative.parts), path.suffix))
    assert len(shapes) == 4


def test_some_patients_come_twice_and_keep_their_class(tmp_path: Path) -> None:
    write_hospital(SMALL, tmp_path)
    classes: dict[str, list[str]] = {}
    for study in _truth(tmp_path):
        classes.setdefault(study["patient"], []).append(study["class"])
    assert len(classes) == 8
    assert sorted(len(some) for some in classes.values()) == [1] * 6 + [2] * 2
    assert all(len(set(some)) == 1 for some in classes.values())


@pytest.mark.parametrize("spec", [SMALL, RADIOGRAPHS, replace(SMALL, orientation="oblique", modality="MR")])
def test_masks_lie_on_the_lesions(spec: HospitalSpec, tmp_path: Path) -> None:
    write_hospital(replace(spec, task="segmentation", lesions=1), tmp_path)
    assert yaml.safe_load((tmp_path / "site.yaml").read_text())["masks"] == {"path": "masks", "key": "accession"}
    for study in _truth(tmp_path):
        mask = nib.load(tmp_path / "masks" / f"{study['accession']}.nii.gz")
        assert mask.shape == spec.shape[::-1]
        inside = np.argwhere(np.asarray(mask.dataobj))
        assert len(inside) == study["lesion_voxels"]
        if study["lesions"] and spec.modality != "DX":
            centre = np.array(study["lesions"][0]["centre_lps_mm"]) * (-1, -1, 1)
            there = nib.affines.apply_affine(mask.affine, inside.mean(axis=0))
            assert np.linalg.norm(there - centre) < max(spec.spacing)


def test_every_damage_is_done_and_told(tmp_path: Path) -> None:
    spec = replace(SMALL, broken=len(Damage))
    write_hospital(spec, tmp_path)
    studies = {study["damage"]: study for study in _truth(tmp_path) if study["damage"]}
    assert set(studies) == set(Damage)
    found, labels = _series(tmp_path), _labels(tmp_path)
    for damage, study in studies.items():
        assert study["usable"] == (damage in HARMLESS)
        datasets, slices = found[study["series"]], spec.shape[0]
        expected = {
            Damage.MISSING_SLICE: slices - 1,
            Damage.DUPLICATED_POSITION: slices + 1,
            Damage.LOCALIZER: slices + 1,
        }
        assert len(datasets) == expected.get(damage, slices)
        if damage in expected or damage is Damage.TRUNCATED:
            with pytest.raises(ValueError, match=r"volume|orientation|bytes"):
                hd.get_volume_from_series(datasets, apply_presentation_lut=False)
    assert studies[Damage.NO_LABEL]["accession"] not in labels
    assert len(labels.keys() - {study["accession"] for study in _truth(tmp_path)}) == 1
    assert len(list((tmp_path / "dicom").rglob("*.txt"))) == 1


@pytest.mark.parametrize(
    "spec", [SMALL, RADIOGRAPHS, replace(SMALL, modality="MR", orientation="oblique", habits=2, storage=STORED_MR)]
)
def test_ingestion_takes_every_usable_study_and_sets_the_damage_aside(spec: HospitalSpec, tmp_path: Path) -> None:
    write_hospital(replace(spec, broken=7, task="segmentation"), tmp_path / "raw")
    counts = ingest(load_site(tmp_path / "raw" / "site.yaml"), tmp_path / "store", keys=Keys.of(bytes(32)))
    counts.check()
    truth = _truth(tmp_path / "raw")
    assert counts.cases == sum(study["usable"] for study in truth) < len(truth)
    assert counts.labels_without_image >= 1
    assert counts.quarantined


def test_an_empty_hospital_has_a_configuration_and_no_images(tmp_path: Path) -> None:
    write_hospital(replace(SMALL, patients=0, broken=3), tmp_path)
    assert _truth(tmp_path) == []
    assert not any((tmp_path / "dicom").iterdir())
    assert (tmp_path / "site.yaml").is_file()


@pytest.mark.parametrize(
    "wrong",
    [{"patients": -1}, {"prevalence": 1.5}, {"vendor": "acme"}, {"modality": "DX"}, {"shape": (1, 20, 20)}],
)
def test_an_impossible_hospital_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        replace(SMALL, **wrong)
