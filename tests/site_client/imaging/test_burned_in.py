"""Images with text in their pixels stay out, or lose it; nothing here reads letters."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import nibabel
import numpy as np
import pydicom
import pytest

from locum.site_client.imaging import dicom
from locum.site_client.imaging.catalog import FILE_NAME, Catalog
from locum.site_client.imaging.geometry import volume_of
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.quarantine import Wish, decide, held
from locum.site_client.imaging.reasons import Reason
from locum.site_client.imaging.sources import load_site

KEYS = Keys.of(bytes(range(32)))
#: By what each image of the folders that carries text is kept out.
KEEPS_OUT = {Reason.BURNED_IN, Reason.DERIVED, Reason.LOCALIZER, Reason.NO_PIXELS, Reason.NO_REGIONS,
             Reason.SECONDARY_CAPTURE, Reason.DUPLICATE_INSTANCE}  # fmt: skip


def taken(folder, store):
    site = load_site({"name": "real", "root": str(folder), "sources": [{"kind": "dicom", "path": "."}]})
    counts = ingest(site, store, keys=KEYS)
    assert counts.found == counts.stored + counts.annotations + sum(counts.quarantined.values())
    with closing(Catalog.open(store)) as catalog:
        return counts, {name: reason for name, reason, _ in catalog.quarantine()}, catalog.cases((0.8, 0.1, 0.1))


def with_text(folder):
    """The images that have text in their pixels: as their publishers say, or as their own header says."""
    published = [*folder.glob("presidio/*.dcm"), *folder.glob("deid-data/*/*.dcm")]
    said = [path for path in folder.glob("dicognito/**/burned_in_*.dcm") if path.name != "burned_in_no.dcm"]
    return published + said


def test_every_image_with_text_in_its_pixels_is_kept_out(shared, tmp_path):
    folder = shared / "deid_burned_in"
    _, refused, _ = taken(folder, tmp_path / "store")
    truth = with_text(folder)
    assert len(truth) > 25
    assert {path.relative_to(folder).as_posix() for path in truth} <= refused.keys()
    reasons = {refused[path.relative_to(folder).as_posix()] for path in truth}
    assert reasons <= KEEPS_OUT | {Reason.NO_PATIENT_ID, Reason.INCOMPLETE_HEADER}


def test_the_annotated_words_are_in_images_that_were_kept_out(shared, tmp_path):
    folder = shared / "deid_burned_in" / "presidio"
    words = json.loads((folder / "ground_truth.json").read_text())
    _, refused, cases = taken(folder, tmp_path / "store")
    assert words
    assert cases == ()
    assert set(refused.values()) <= KEEPS_OUT | {Reason.NOT_AN_IMAGE}


@pytest.mark.parametrize("kind", ["CR", "DX", "US", "XA", "RF", "OT", "SC"])
def test_a_kind_that_often_carries_text_must_say_that_it_has_none(hospital, series, kind):
    hospital.write(series(slices=1, over={"Modality": kind}))
    assert hospital.ingest().quarantined == {Reason.BURNED_IN: 1}


def test_a_released_ultrasound_comes_in_without_what_surrounds_its_picture(shared, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    source = shared / "deid_burned_in/deid-data/ultrasounds/GREYSCALE_IMAGE.dcm"
    image = pydicom.dcmread(source)
    image.PatientID = "P1"
    image.save_as(folder / "us.dcm", enforce_file_format=True)
    store = tmp_path / "store"
    _, refused, _ = taken(folder, store)
    assert set(refused.values()) == {Reason.BURNED_IN}
    release(store)
    _, _, (case,) = taken(folder, store)
    (item,) = image.SequenceOfUltrasoundRegions
    left, top = item.RegionLocationMinX0, item.RegionLocationMinY0
    right, bottom = item.RegionLocationMaxX1 + 1, item.RegionLocationMaxY1 + 1
    stored = np.asarray(nibabel.load(case.image).dataobj)
    assert np.array_equal(stored.T, image.pixel_array[top:bottom, left:right])


def test_a_released_capture_comes_in_as_far_as_the_person_let_it(shared, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    image = pydicom.dcmread(shared / "deid_burned_in/presidio/RGB_ORIGINAL.dcm")
    image.PatientID = "P1"
    image.save_as(folder / "capture.dcm", enforce_file_format=True)
    store = tmp_path / "store"
    _, refused, _ = taken(folder, store)
    assert set(refused.values()) == {Reason.SECONDARY_CAPTURE}
    release(store, crop=(100, 150, 300, 200))
    _, refused, _ = taken(folder, store)
    # Its type is DERIVED\SECONDARY as well: another reason, another look.
    if refused:
        assert set(refused.values()) == {Reason.DERIVED}
        release(store, crop=(100, 150, 300, 200))
    _, _, (case,) = taken(folder, store)
    stored = np.asarray(nibabel.load(case.image).dataobj)
    assert stored.shape == (300, 200, 1, 3)
    assert np.array_equal(stored[:, :, 0].transpose(1, 0, 2), image.pixel_array[150:350, 100:400])


@pytest.mark.parametrize("name", ["OBXXXX1A.dcm", "gdcm-US-ALOKA-16_big.dcm", "JPEGExtended_3s_1f_u_08_08.dcm"])
def test_released_colour_ultrasound_has_after_cleaning_the_colours_it_had_before(shared, tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    source = next((shared / "dicom_codecs_objects").rglob(name))
    (folder / "us.dcm").write_bytes(source.read_bytes())
    _, refused, _ = taken(folder, tmp_path / "store")
    assert set(refused.values()) == {Reason.BURNED_IN}
    release(tmp_path / "store")
    _, _, (case,) = taken(folder, tmp_path / "store")
    expected = volume_of([dicom.read(source, source.stat().st_size)])
    stored = nibabel.load(case.image)
    assert stored.shape[2:] == (1, 3)
    assert np.array_equal(np.asarray(stored.dataobj), expected.array)
    assert stored.header.get_zooms()[:2] == pytest.approx(expected.spacing[:2])
    assert min(expected.spacing[:2]) < 1


def release(store, crop=None):
    with closing(sqlite3.connect(store / FILE_NAME)) as connection:
        (one,) = held(connection)
    decide(store, Wish(one.handle, "release", "A. Person", crop=crop))
