"""Ingest: everything found is stored or in quarantine, whatever lies in the folder and whatever happens."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    SecondaryCaptureImageStorage,
)

from locum.common.errors import DataError, RunError
from locum.site_client.imaging import dicom
from locum.site_client.imaging.grouping import Reader, Watch, look
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.inventory import Inventory
from locum.site_client.imaging.items import find_items
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.reasons import SENTENCE, Reason
from locum.site_client.imaging.sources import load_site
from locum.site_client.imaging.store import exclusive

SPLIT = (0.8, 0.1, 0.1)


def quarantined(hospital):
    return {name: reason for name, reason, _ in hospital.catalog().quarantine()}


def test_series_are_found_whatever_their_folders_and_names(hospital, series):
    first, second = series(1, slices=4), series(2, patient="P2", accession="A2", slices=3)
    images = first.images() + second.images()
    hospital.write(images[::2], "one/deep/folder")
    hospital.write(images[1::2], "two")
    counts = hospital.ingest()
    assert (counts.found, counts.stored, counts.cases, counts.quarantined) == (7, 7, 2, {})
    facts = tuple(hospital.catalog().facts())
    assert sorted(fact.shape for fact in facts) == [(7, 6, 3), (7, 6, 4)]
    assert {(fact.modality, fact.manufacturer, fact.model) for fact in facts} == {("CT", "ACME", "One")}
    assert facts[0].spacing == pytest.approx((0.8, 0.5, 2.5))


def test_a_damaged_slice_refuses_its_series_and_no_other(hospital, series):
    hospital.write(series(1))
    paths = hospital.write(series(2, patient="P2"))
    content = paths[4].read_bytes()
    paths[4].write_bytes(content[:-20])
    counts = hospital.ingest()
    assert (counts.cases, counts.quarantined) == (1, {Reason.DECODE_FAILED: 5})


def test_a_localizer_inside_a_series_is_set_aside(hospital, series):
    images = series().images()
    scout = series(slices=1, over={"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}).images()
    scout[0].SOPInstanceUID = "1.2.3.4"
    scout[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    hospital.write(images)
    hospital.write(scout, "scout")
    counts = hospital.ingest()
    assert (counts.stored, counts.cases, counts.quarantined) == (5, 1, {Reason.LOCALIZER: 1})


def test_a_localizer_that_does_not_say_so_refuses_its_series(hospital, series):
    images = series().images()
    images[2].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    hospital.write(images)
    assert hospital.ingest().quarantined == {Reason.MIXED_GEOMETRY: 5}


def test_a_copy_in_another_folder_is_counted_and_not_used_twice(hospital, series):
    hospital.write(series(), "b")
    hospital.write(series(), "a")
    counts = hospital.ingest()
    assert (counts.found, counts.stored, counts.quarantined) == (10, 5, {Reason.DUPLICATE_INSTANCE: 5})
    assert all(name.startswith("dicom/b/") for name in quarantined(hospital))


def test_two_different_images_under_one_uid_refuse_the_series(hospital, series):
    hospital.write(series())
    other = series(2).images()[0]
    other.SOPInstanceUID, other.SeriesInstanceUID = f"{series().uid}.1.1", series().uid
    hospital.write([other], "other")
    assert hospital.ingest().quarantined == {Reason.CONFLICTING_INSTANCES: 6}


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"SOPClassUID": SecondaryCaptureImageStorage}, Reason.SECONDARY_CAPTURE),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, Reason.DERIVED),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "SCREEN SAVE"]}, Reason.DERIVED),
        ({"BurnedInAnnotation": "YES"}, Reason.BURNED_IN),
        ({"SOPClassUID": ComputedRadiographyImageStorage, "Modality": "CR"}, Reason.BURNED_IN),
        ({"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX"}, Reason.BURNED_IN),
        ({"PixelData": None}, Reason.NO_PIXELS),
        ({"PatientID": None}, Reason.NO_PATIENT_ID),
        ({"PatientID": "  "}, Reason.NO_PATIENT_ID),
        ({"SeriesInstanceUID": None}, Reason.INCOMPLETE_HEADER),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, Reason.COLOUR),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, Reason.MOSAIC),
        ({"NumberOfFrames": 3}, Reason.SEVERAL_VOLUMES),
        ({"Rows": 60000, "Columns": 60000}, Reason.TOO_LARGE),
        ({"RescaleSlope": "1e400"}, Reason.DECODE_FAILED),
    ],
)
def test_what_is_not_a_fit_image_goes_to_quarantine_with_its_reason(hospital, series, over, reason):
    hospital.write(series(slices=1, over=over).images(), "unfit")
    hospital.write(series(9))
    counts = hospital.ingest()
    assert (counts.cases, counts.quarantined) == (1, {reason: 1})


def test_one_series_with_two_patients_is_refused(hospital, series):
    images = series().images()
    images[3].PatientID = "P2"
    hospital.write(images)
    assert hospital.ingest().quarantined == {Reason.MIXED_PATIENTS: 5}


def test_two_radiographs_of_one_series_are_two_cases(hospital, series):
    over = {"SOPClassUID": ComputedRadiographyImageStorage, "Modality": "CR", "BurnedInAnnotation": "NO"}
    hospital.write(series(slices=2, over=over))
    assert hospital.ingest().cases == 2


def test_gzipped_dicom_is_read(hospital, series):
    for path in hospital.write(series()):
        path.with_suffix(".dcm.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert hospital.ingest().stored == 5


def test_a_decompression_bomb_is_not_unpacked(hospital, series, monkeypatch):
    monkeypatch.setattr(dicom, "MAX_UNPACKED", 4096)
    over = {"PixelData": bytes(2 * 512 * 512), "Rows": 512, "Columns": 512}
    (path,) = hospital.write(series(slices=1, over=over))
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    (image,) = series(2, slices=1, over=over).images()
    image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    hospital.write([image])
    assert hospital.ingest().quarantined == {Reason.TOO_LARGE: 2}


def test_a_deflated_file_is_read(hospital, series):
    images = series().images()
    for image in images:
        image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    hospital.write(images)
    assert hospital.ingest().stored == 5


def test_what_cannot_be_opened_is_counted(hospital, series):
    hospital.write(series())
    os.mkfifo(hospital.dicom / "pipe")
    (hospital.dicom / "dangling").symlink_to("nowhere")
    (hospital.dicom / "empty").touch()
    (hospital.dicom / "note.txt").write_text("see the other CD")
    counts = hospital.ingest()
    assert counts.quarantined == {Reason.UNREADABLE: 2, Reason.NOT_AN_IMAGE: 2}


def test_nothing_in_the_store_tells_who_the_patient_is(hospital, series):
    over = {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Müller^Jörg", "PatientBirthDate": "19501231"}
    hospital.write(series(patient="MRN-778899", over=over))
    hospital.ingest()
    content = b"".join(path.read_bytes() for path in hospital.store.rglob("*") if path.is_file())
    for secret in ("MRN-778899", "Müller", "Jörg", "19501231"):
        assert secret.encode() not in content


def test_a_patient_id_in_any_character_set_is_one_patient(hospital, series):
    over = {"SpecificCharacterSet": "ISO_IR 100", "PatientID": "Åke-1"}
    hospital.write(series(1, over=over))
    hospital.write(series(2, over=over | {"SpecificCharacterSet": "ISO_IR 192"}))
    hospital.ingest()
    assert len({case.patient for case in hospital.catalog().cases(SPLIT)}) == 1


def _without(images, index, name):
    delattr(images[index], name)
    return images


def _with(images, **attributes):
    for name, value in attributes.items():
        setattr(images[-1], name, value)
    return images


DAMAGE = {
    "good": lambda images: images,
    "gap": lambda images: images[:2] + images[3:],
    "copy": lambda images: [*images, images[0]],
    "no pixels": lambda images: _without(images, 1, "PixelData"),
    "no patient": lambda images: _without(images, 0, "PatientID"),
    "derived": lambda images: _with(images, ImageType=["DERIVED", "SECONDARY"]),
    "unlabelled": lambda images: _with(images[:1], AccessionNumber="?"),
}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(sorted(DAMAGE)), st.integers(-400, 0)), min_size=1, max_size=4))
def test_found_is_stored_plus_quarantined(tmp_path_factory, new_hospital, series, kinds):
    hospital = new_hospital(tmp_path_factory.mktemp("hospital"))
    written = 0
    for number, (kind, cut) in enumerate(kinds, start=1):
        paths = hospital.write(DAMAGE[kind](series(number, patient=f"P{number}").images()))
        paths[-1].write_bytes(paths[-1].read_bytes()[: cut or None])
        written += len(paths)
    hospital.write(series(99, accession="A1", patient="P99"))
    hospital.table("labels.csv", "acc,code\nA1,x\n")
    counts = hospital.ingest(
        labels={"file": "labels.csv", "key": "accession", "key_column": "acc", "label_column": "code"}
    ).check()
    assert counts.found == written + 5
    assert len(hospital.catalog().quarantine()) == sum(counts.quarantined.values())
    assert {Reason(reason) for reason in counts.quarantined} <= set(SENTENCE)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(128, 1100), st.integers(0, 255)), min_size=1, max_size=20))
def test_no_change_of_bytes_stops_an_ingest(tmp_path_factory, new_hospital, series, changes):
    hospital = new_hospital(tmp_path_factory.mktemp("hospital"))
    paths = hospital.write(series(slices=2))
    content = bytearray(paths[0].read_bytes())
    for place, value in changes:
        content[min(place, len(content) - 1)] = value
    paths[0].write_bytes(content)
    assert hospital.ingest().found == 2


def stamps(store: Path):
    return {path.name: path.stat().st_mtime_ns for path in (store / "volumes").iterdir()}


def test_a_second_ingest_reads_nothing_and_counts_the_same(hospital, series):
    paths = hospital.write(series())
    hospital.write(series(2, slices=3))
    first = hospital.ingest()
    before = stamps(hospital.store)
    for path in paths:
        status = path.stat()
        path.write_bytes(b"?" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hospital.ingest() == first
    assert stamps(hospital.store) == before


def test_a_slice_that_comes_later_completes_its_series(hospital, series):
    images = series().images()
    hospital.write(series(2))
    hospital.write(images[:2] + images[3:])
    assert hospital.ingest().quarantined == {Reason.MISSING_SLICES: 4}
    before = stamps(hospital.store)
    hospital.write([images[2]], "late")
    counts = hospital.ingest()
    assert (counts.cases, counts.quarantined) == (2, {})
    assert before.items() <= stamps(hospital.store).items()


def test_what_is_removed_from_the_folder_leaves_the_store(hospital, series):
    hospital.write(series(1))
    for path in hospital.write(series(2)):
        path.touch()
    hospital.ingest()
    for path in (hospital.dicom / f"s{series(2).uid[-6:]}").iterdir():
        path.unlink()
    counts = hospital.ingest()
    assert (counts.found, counts.cases, len(stamps(hospital.store))) == (5, 1, 1)


def test_a_copy_takes_the_place_of_an_original_that_is_gone(hospital, series):
    for path in hospital.write(series(), "a"):
        (hospital.dicom / path.name).write_bytes(path.read_bytes())
    hospital.ingest()
    for path in (hospital.dicom / "a").iterdir():
        path.unlink()
    counts = hospital.ingest()
    assert (counts.found, counts.stored, counts.quarantined) == (5, 5, {})


def test_a_volume_that_was_lost_is_made_again(hospital, series):
    hospital.write(series())
    hospital.ingest()
    (volume,) = (hospital.store / "volumes").iterdir()
    content = volume.read_bytes()
    volume.unlink()
    hospital.ingest()
    assert volume.read_bytes() == content


def test_the_same_data_gives_the_same_store_whatever_the_order(hospital, series, tmp_path):
    hospital.write(series(1))
    hospital.ingest()
    hospital.write(series(2))
    hospital.ingest()
    grown = {path.name: path.read_bytes() for path in (hospital.store / "volumes").iterdir()}
    hospital.store.rename(tmp_path / "old")
    hospital.ingest()
    assert {path.name: path.read_bytes() for path in (hospital.store / "volumes").iterdir()} == grown


KILLED = """
import os, sys, signal
from pathlib import Path
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site

def tell(progress):
    if progress.stage == "storing" and progress.done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
site = load_site({"name": "north", "root": str(folder), "sources": [{"kind": "dicom", "path": "dicom"}]})
ingest(site, folder / "store", keys=Keys.of(bytes(range(32))), progress=tell)
"""


def test_an_ingest_killed_at_any_time_loses_nothing(hospital, series):
    for number in range(1, 141):
        hospital.write(series(number, patient=f"P{number}", slices=2, shape=(2, 2)))
    for stop in (5, 100):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(KILLED), str(hospital.folder), str(stop)], check=False
        )
        assert done.returncode == -signal.SIGKILL
        with pytest.raises(DataError, match="did not finish"):
            hospital.catalog().counts()
    kept = stamps(hospital.store)
    counts = hospital.ingest()
    assert (counts.found, counts.stored, counts.cases) == (280, 280, 140)
    # The second process was killed at its 100th unit: one batch of 64 was committed and is not done again.
    after = stamps(hospital.store)
    assert sum(after.get(name) == stamp for name, stamp in kept.items()) == 64
    assert not list(hospital.store.rglob("*.part"))


def test_a_disk_that_cannot_be_written_is_told_and_loses_nothing(hospital, series):
    hospital.write(series())
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)){textwrap.dedent(KILLED)}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(hospital.folder), "-1"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "RunError" in done.stderr
    assert hospital.ingest().stored == 5


def test_two_ingests_do_not_write_to_one_store(hospital, series):
    hospital.write(series())
    with exclusive(hospital.store), pytest.raises(DataError, match="another ingest"):
        hospital.ingest()


def test_a_store_stays_with_its_site_and_its_key(hospital, series):
    hospital.write(series())
    hospital.ingest()
    with pytest.raises(DataError, match="another site"):
        hospital.ingest(name="south")
    with (
        pytest.raises(DataError, match="another key"),
        Inventory.opened(hospital.store, site="north", keys=Keys.of(b"x" * 32)),
    ):
        pass


def test_a_folder_where_the_catalog_should_be_is_an_error_in_words(hospital, series):
    hospital.write(series())
    (hospital.store / "catalog.sqlite").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot be written"):
        hospital.ingest()


def test_a_catalog_that_is_no_database_is_an_error_in_words(hospital):
    hospital.store.mkdir()
    (hospital.store / "catalog.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(DataError, match="cannot be read"):
        hospital.catalog()


def test_an_ingest_over_what_is_no_catalog_is_an_error_in_words(hospital, series):
    hospital.write(series())
    hospital.store.mkdir()
    (hospital.store / "catalog.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(DataError, match="cannot be read"):
        hospital.ingest()


def test_an_ingest_over_half_a_catalog_is_an_error_in_words(hospital, series):
    hospital.write(series())
    hospital.ingest()
    os.truncate(hospital.store / "catalog.sqlite", 8192)
    with pytest.raises(DataError, match="cannot be read"):
        hospital.ingest()


def test_a_site_without_files_is_empty_and_adds_up(hospital):
    counts = hospital.ingest()
    assert (counts.found, counts.cases) == (0, 0)
    assert hospital.catalog().cases(SPLIT) == ()


def test_progress_tells_every_file_and_every_unit(hospital, series):
    hospital.write(series())
    told = []
    ingest(load_site(hospital.site()), hospital.store, keys=Keys.of(bytes(32)), progress=told.append)
    assert [(step.stage, step.done, step.total) for step in told][-2:] == [("reading", 5, 5), ("storing", 1, 1)]


@pytest.mark.parametrize("budget", [0, 40_000, 1 << 30])
def test_a_hospital_larger_than_the_memory_budget_is_read_again_instead(hospital, series, budget):
    hospital.write(series())
    site, reader = load_site(hospital.site()), Reader(budget)
    items = tuple(find_items(site, hospital.store, Keys.of(bytes(32))))
    watch = Watch(site, reader, Keys.of(bytes(32)), lambda unit: None)
    assert {look(watch, item).known.series for item in items} == {watch.keys.uid(series().uid)}
    assert [reader.read(item).PatientID for item in items] == ["P1"] * 5
    kept = sum(reader.read(item) is reader.read(item) for item in items)
    assert kept == min(budget // 35_000, 5)


@pytest.mark.parametrize("form", ["gzipped", "deflated"])
def test_the_memory_budget_counts_what_a_file_unpacks_to(hospital, series, form):
    pixels = {"PixelData": bytes(2 << 20), "Rows": 1024, "Columns": 1024}
    images = [series(number, slices=1, over=pixels).images()[0] for number in (1, 2)]
    for image in images:
        if form == "deflated":
            image.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    for path in hospital.write(images):
        if form == "gzipped":
            path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    first, second = find_items(load_site(hospital.site()), hospital.store, Keys.of(bytes(32)))
    assert first.size < 10_000
    small, large = Reader(2 << 20), Reader(3 << 20)
    assert small.read(first) is not small.read(first)
    assert large.read(first) is large.read(first)
    assert large.read(second) is not large.read(second)
    large.drop(first)
    assert large.read(second) is large.read(second)


def test_masks_lie_on_the_grid_of_their_images(hospital, series):
    hospital.write(series(accession="A/1"))
    hospital.write(series(2, accession="A2"))
    hospital.write(series(3, accession="A3"))
    hospital.ingest()
    image = nibabel.load(hospital.catalog().cases(SPLIT)[0].image)
    (hospital.folder / "masks").mkdir()
    labels = np.arange(image.shape[0] * image.shape[1] * image.shape[2], dtype=np.uint8).reshape(image.shape) % 3
    turned = nibabel.Nifti1Image(labels[::-1].transpose(2, 0, 1), image.affine @ _turn(image.shape))
    nibabel.save(turned, hospital.folder / "masks" / "A2.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels[1:], image.affine), hospital.folder / "masks" / "A3.nii.gz")
    counts = hospital.ingest(masks={"path": "masks", "key": "accession"})
    assert (counts.cases, counts.quarantined) == (1, {Reason.MASK_MISSING: 5, Reason.MASK_MISMATCH: 5})
    (case,) = hospital.catalog().cases(SPLIT)
    mask = nibabel.load(case.mask)
    assert np.array_equal(np.asarray(mask.dataobj), labels)
    assert np.allclose(mask.affine, nibabel.load(case.image).affine)


def _turn(shape):
    """From indices of `array[::-1].transpose(2, 0, 1)` to those of the array."""
    turn = np.zeros((4, 4))
    turn[0, 1], turn[0, 3] = -1, shape[0] - 1
    turn[1, 2] = turn[2, 0] = turn[3, 3] = 1
    return turn


def test_a_mask_that_changes_is_taken_again(hospital, series):
    hospital.write(series())
    hospital.ingest()
    image = nibabel.load(hospital.catalog().cases(SPLIT)[0].image)
    (hospital.folder / "masks").mkdir()
    for value in (1, 2):
        mask = nibabel.Nifti1Image(np.full(image.shape, value, np.uint8), image.affine)
        nibabel.save(mask, hospital.folder / "masks" / "P1.nii")
        os.utime(hospital.folder / "masks" / "P1.nii", (time.time() + value, time.time() + value))
        assert hospital.ingest(masks={"path": "masks", "key": "patient"}).cases == 1
        stored = nibabel.load(hospital.catalog().cases(SPLIT)[0].mask)
        assert np.unique(stored.dataobj) == [value]


def test_a_mask_without_a_name_is_no_images_mask(hospital, series):
    hospital.write(series(accession=""))
    hospital.ingest()
    image = nibabel.load(hospital.catalog().cases(SPLIT)[0].image)
    (hospital.folder / "masks").mkdir()
    nibabel.save(nibabel.Nifti1Image(np.ones(image.shape, np.uint8), image.affine), hospital.folder / "masks" / ".nii")
    assert hospital.ingest(masks={"path": "masks", "key": "accession"}).quarantined == {Reason.MASK_MISSING: 5}


@pytest.mark.parametrize("known", [False, True])
def test_a_mask_replaced_while_its_image_is_stored_is_taken_at_the_next_ingest(hospital, series, monkeypatch, known):
    hospital.write(series())
    hospital.ingest()
    image = nibabel.load(hospital.catalog().cases(SPLIT)[0].image)
    (hospital.folder / "masks").mkdir()
    mask = hospital.folder / "masks" / "P1.nii"
    first, second = (nibabel.Nifti1Image(np.full(image.shape, value, np.uint8), image.affine) for value in (1, 2))
    nibabel.save(first, mask)
    if not known:
        hospital.store.rename(hospital.folder / "old")
    opened = Path.open

    def replace_and_open(path, *args, **kwargs):
        """The mask has been read and is on its way to the disk."""
        if path.parent == hospital.store / "masks":
            nibabel.save(second, mask)
            os.utime(mask, (time.time() + 5, time.time() + 5))
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", replace_and_open)
        hospital.ingest(masks={"path": "masks", "key": "patient"})
    hospital.ingest(masks={"path": "masks", "key": "patient"})
    assert np.unique(nibabel.load(hospital.catalog().cases(SPLIT)[0].mask).dataobj) == [2]


KEEP = {"deidentification": {"keep_dicom": True}}


def test_cleaned_dicom_is_kept_where_a_site_asks_for_it_and_goes_with_its_case(hospital, series):
    hospital.write(series())
    hospital.write(series(2, patient="P2", accession="A2", slices=3))
    hospital.ingest(**KEEP)
    kept = sorted((hospital.store / "dicom").rglob("*.dcm"))
    assert len(kept) == 8
    keys = Keys.of(bytes(range(32)))
    assert {pydicom.dcmread(path).PatientID for path in kept} == {keys.patient("P1"), keys.patient("P2")}
    assert not any(b"Secret" in path.read_bytes() for path in kept)
    shutil.rmtree(hospital.dicom / f"s{series(2).uid[-6:]}")
    hospital.ingest(**KEEP)
    assert len(list((hospital.store / "dicom").rglob("*.dcm"))) == 5
    hospital.ingest()
    assert not list((hospital.store / "dicom").rglob("*.dcm"))


def test_a_series_of_fewer_slices_leaves_no_old_file_behind(hospital, series):
    paths = hospital.write(series())
    hospital.ingest(**KEEP)
    for path in paths[3:]:
        path.unlink()
    hospital.ingest(**KEEP)
    assert len(list((hospital.store / "dicom").rglob("*.dcm"))) == 3
