"""Pictures of files that nobody has checked yet: right where there is one, one sentence where there is none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import threading
import time
from importlib.resources import files

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from locum.site_client.desk.pictures import SMALL, Studio, Wanted, draw
from locum.site_client.desk.png import png
from tests.site_client.desk.conftest import RADIOGRAPH, radiograph, ramp

STATIC = files("locum.site_client.desk") / "static"


def shown(picture):
    assert picture.content, picture.problem
    return np.asarray(Image.open(io.BytesIO(picture.content)))


def written(tmp_path, image):
    image.save_as(tmp_path / "image", enforce_file_format=True)
    return Wanted(tmp_path / "image", (tmp_path / "image").stat().st_size)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.randoms(use_true_random=False))
def test_a_picture_is_the_same_after_another_program_has_read_it(rows, columns, colour, random):
    shape = (rows, columns, 3) if colour else (rows, columns)
    array = np.frombuffer(random.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(array)))), array)


def test_the_window_of_the_header_is_applied(tmp_path):
    (image,) = radiograph()
    image.WindowCenter, image.WindowWidth = [500, 1], [1000, 1]
    expected = np.clip((ramp().astype(float) - 1024) * 255 / 1000, 0, 255)
    assert np.abs(shown(draw(written(tmp_path, image))) - expected).max() <= 1


def test_an_inverted_picture_is_shown_as_it_is_meant(tmp_path):
    (image,) = radiograph()
    image.WindowCenter, image.WindowWidth = 500, 1000
    upright = shown(draw(written(tmp_path, image)))
    image.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_array_equal(shown(draw(written(tmp_path, image))), 255 - upright)


def test_colour_is_shown_in_colour(tmp_path):
    (image,) = radiograph()
    plane = np.zeros((*RADIOGRAPH, 3), np.uint8)
    plane[:, :50], plane[:, 50:] = (200, 10, 20), (0, 30, 250)
    image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    image.PixelData = plane.tobytes()
    np.testing.assert_array_equal(shown(draw(written(tmp_path, image))), plane)


def test_of_a_film_the_middle_frame_is_shown(tmp_path):
    (image,) = radiograph()
    film = np.stack([np.full(RADIOGRAPH, value, np.uint16) for value in (100, 2000, 300)])
    film[:, :60] = 0
    image.NumberOfFrames, image.PixelData = 3, film.tobytes()
    image.WindowCenter, image.WindowWidth = 1488 - 1024, 4096
    expected = np.clip((film[1].astype(float) - 1024 + 1584) * 255 / 4096, 0, 255)
    assert np.abs(shown(draw(written(tmp_path, image))) - expected).max() <= 1


def test_of_a_nifti_volume_the_middle_slice_is_shown_with_the_front_above(tmp_path):
    volume = np.zeros((6, 8, 5), np.int16)
    volume[:, :, 2] = np.arange(8) * 100
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "image.nii.gz")
    picture = shown(draw(Wanted(tmp_path / "image.nii.gz", (tmp_path / "image.nii.gz").stat().st_size)))
    assert picture.shape == (8, 6)
    assert (np.diff(picture[:, 0].astype(int)) <= 0).all(), "anterior has the highest values here"
    assert picture[0, 0] > picture[-1, 0]


def test_of_a_table_of_images_the_row_is_shown(tmp_path):
    images = np.stack([np.full((4, 6), value, np.uint8) for value in (10, 20, 30)])
    images[1, 0] = 200
    parts = {f"{part}_{what}": images if what == "images" else np.zeros((3, 1)) for part in ("train", "val", "test")
             for what in ("images", "labels")}  # fmt: skip
    np.savez(tmp_path / "rows.npz", **parts)
    size = (tmp_path / "rows.npz").stat().st_size
    picture = shown(draw(Wanted(tmp_path / "rows.npz", size, ("train", 1))))
    assert picture.shape == (4, 6)
    assert picture[0].min() > picture[1].max()
    assert draw(Wanted(tmp_path / "rows.npz", size, ("train", 99))).problem


def test_a_small_picture_is_small_and_says_how_large_the_image_is(tmp_path):
    wanted = written(tmp_path, radiograph()[0])
    picture = draw(Wanted(wanted.path, wanted.size, side=50))
    assert max(shown(picture).shape) <= 50
    assert (picture.rows, picture.columns) == RADIOGRAPH
    assert SMALL < 256


def test_the_facts_name_nobody(tmp_path):
    (image,) = radiograph()
    image.PatientBirthDate, image.StudyDate, image.InstitutionName = "19610203", "20240506", "St Elsewhere"
    image.ReferringPhysicianName, image.StudyDescription = "Who^Refers", "of Mr Secret"
    told = repr(draw(written(tmp_path, image)).facts)
    for secret in ("Secret", "P11", "A11", "1961", "2024", "Elsewhere", "Refers"):
        assert secret not in told
    assert "DX" in told


def test_a_file_that_takes_too_long_is_told_and_the_next_picture_comes(tmp_path):
    os.mkfifo(tmp_path / "endless")
    studio = Studio(seconds=3)
    try:
        assert "It was not ready within 3 seconds" in studio.picture(Wanted(tmp_path / "endless", 10)).problem
        assert studio.picture(written(tmp_path, radiograph()[0])).content
    finally:
        studio.close()


def test_a_file_that_ends_the_program_that_draws_is_told_and_the_next_picture_comes(tmp_path):
    os.mkfifo(tmp_path / "endless")
    studio = Studio()
    found = []
    try:
        assert studio.picture(written(tmp_path, radiograph()[0])).content
        (process,) = (studio._pool._processes or {}).values()
        asking = threading.Thread(target=lambda: found.append(studio.picture(Wanted(tmp_path / "endless", 10))))
        asking.start()
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGSEGV)
        asking.join(60)
        assert "ended the program that draws pictures" in found[0].problem
        assert studio.picture(written(tmp_path, radiograph()[0])).content
    finally:
        studio.close()


@pytest.mark.parametrize("name", ["none", "folder"])
def test_what_is_no_file_is_told(tmp_path, name):
    (tmp_path / "folder").mkdir()
    assert draw(Wanted(tmp_path / name, 10)).problem


# --- the viewer that is shipped


def test_the_viewer_is_to_the_byte_what_its_publisher_gave():
    record = json.loads((STATIC / "niivue.json").read_text())
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest, f"{name}: run make viewer"
    assert record["packages"]["@niivue/niivue"] == record["version"]


def test_the_viewers_licence_goes_with_it():
    record, text = json.loads((STATIC / "niivue.json").read_text()), (STATIC / "niivue.licences.txt").read_text()
    assert "Copyright (c) 2021, Niivue" in text
    assert "BSD 2-Clause License" in text
    assert all(f"== {name}" in text for name in record["packages"] if name != "@niivue/niivue")


def test_nothing_that_is_shipped_names_another_machine_to_load_from():
    for name in ("desk.css", "crop.js", "viewer.js"):
        assert "//" not in "\n".join(
            line for line in (STATIC / name).read_text().splitlines() if not line.startswith("//")
        )
