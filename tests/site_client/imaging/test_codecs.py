"""Every transfer syntax: decoded to the voxels of pydicom, or refused with a reason; a codec that dies is survived."""

from __future__ import annotations

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import warnings
from collections import defaultdict

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut
from pydicom.uid import ExplicitVRBigEndian, JPEGLSLossless, RLELossless

from locum.site_client.imaging import decoding
from locum.site_client.imaging.decoding import decoded
from locum.site_client.imaging.dicom import MULTI_FRAME, RELEASABLE, look, read
from locum.site_client.imaging.geometry import volume_of
from locum.site_client.imaging.items import Item
from locum.site_client.imaging.known import Known
from locum.site_client.imaging.reasons import Reason, RefusedError
from tests.site_client.imaging.cases import thirteen
from tests.site_client.imaging.conftest import SHARED

FOLDER = SHARED / "dicom_codecs_objects"
FILES = list(csv.DictReader((FOLDER / "files.csv").open(newline=""))) if FOLDER.is_dir() else []
KNOWN = Known(patient="0123456789abcdef", series="2.25.1")

#: Syntaxes of the list that no codec among the dependencies decodes.
NOT_DECODED = {"High-Throughput JPEG 2000", "1.2.840.10008.1.2.8.1"}


def of(name):
    return next(FOLDER.rglob(name))


def opened(path):
    return read(path, path.stat().st_size)


def theirs(dataset):
    """What pydicom decodes in this process; None if it cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dataset.pixel_array
    except Exception:  # noqa: BLE001 (whatever it raises)
        return None


def ours(dataset):
    try:
        return decoded(dataset)
    except RefusedError as refused:
        return refused.reason


def volume_or_reason(dataset):
    try:
        return volume_of([dataset])
    except RefusedError as refused:
        return refused.reason


def opened_or_reason(row):
    try:
        return opened(FOLDER / row["path"])
    except RefusedError as refused:
        return refused.reason


@pytest.mark.parametrize("row", FILES, ids=lambda row: row["path"].rpartition("/")[2])
def test_every_file_decodes_to_the_voxels_of_pydicom_or_is_refused(row):
    dataset = opened_or_reason(row)
    if dataset is Reason.NOT_AN_IMAGE:
        with pytest.raises(InvalidDicomError):
            pydicom.dcmread(FOLDER / row["path"])
        return
    expected = theirs(dataset)
    if expected is None:
        assert ours(dataset) is Reason.DECODE_FAILED
        return
    pixels = ours(dataset)
    assert pixels.dtype == expected.dtype
    assert np.array_equal(pixels, expected)


def test_every_transfer_syntax_is_decoded_or_known_not_to_be():
    if not FILES:
        pytest.skip("no real data beside the checkout")
    decoded_of = defaultdict(bool)
    for row in FILES:
        dataset = opened_or_reason(row)
        if isinstance(dataset, pydicom.Dataset) and "PixelData" in dataset:
            decoded_of[row["transfer_syntax"]] |= isinstance(ours(dataset), np.ndarray)
    assert len(decoded_of) >= 15
    never = {syntax for syntax, found in decoded_of.items() if not found}
    assert {syntax.split(" Image")[0] for syntax in never} <= NOT_DECODED


@pytest.mark.parametrize("row", FILES, ids=lambda row: row["path"].rpartition("/")[2])
def test_every_image_becomes_its_modality_values_or_has_a_reason(row):
    dataset = opened_or_reason(row)
    if dataset is Reason.NOT_AN_IMAGE:
        return
    seen = look(Item("a", FOLDER, 0, 1, 1), dataset, KNOWN, "2.25.2", RELEASABLE)
    if seen.annotation or seen.reason is not None:
        assert seen.annotation or seen.reason in set(Reason)
        return
    volume = volume_or_reason(dataset)
    if isinstance(volume, Reason):
        assert volume in {Reason.DECODE_FAILED, Reason.NO_GEOMETRY}
        assert volume is Reason.NO_GEOMETRY or theirs(dataset) is None
        return
    if "SequenceOfUltrasoundRegions" in dataset or dataset.PhotometricInterpretation == "PALETTE COLOR":
        return  # test_pictures has these
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = apply_modality_lut(dataset.pixel_array, dataset).astype(volume.array.dtype)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        assert volume.array.T.min() == (1 << dataset.BitsStored) - 1 - dataset.pixel_array.max()
    elif seen.sop_class in MULTI_FRAME:
        frames = {frame.tobytes() for frame in values}
        slices = {np.ascontiguousarray(volume.array[:, :, k].T).tobytes() for k in range(volume.array.shape[2])}
        assert slices == frames
    elif dataset.SamplesPerPixel == 3:
        assert np.array_equal(volume.array[:, :, 0].transpose(1, 0, 2), values)
    else:
        assert np.array_equal(volume.array.T, values)


def test_compression_and_byte_order_change_no_frame(shared):
    names = ["emri_small.dcm", "emri_small_RLE.dcm", "emri_small_big_endian.dcm", "emri_small_jpeg_2k_lossless.dcm"]
    plain, *others = (decoded(opened(of(name))) for name in [*names, "emri_small_jpeg_ls_lossless.dcm"])
    assert plain.shape == (10, 64, 64)
    assert all(np.array_equal(other, plain) for other in others)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless])
def test_a_compressed_multi_frame_object_is_the_volume_of_its_slices(series, syntax):
    (whole,) = thirteen(series)["enhanced multi-frame"].images
    plain = volume_of([whole])
    whole.compress(syntax)
    volume = volume_of([whole])
    assert whole.file_meta.TransferSyntaxUID == syntax
    assert np.array_equal(volume.array, plain.array)
    assert np.allclose(volume.affine, plain.affine)


def test_a_series_in_big_endian_is_the_same_volume(series, tmp_path):
    images = series().images()
    for number, image in enumerate(images):
        image.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        image.PixelData = np.frombuffer(image.PixelData, "<u2").astype(">u2").tobytes()
        image.save_as(tmp_path / f"{number}.dcm", little_endian=False, implicit_vr=False, enforce_file_format=True)
    volume = volume_of([opened(path) for path in sorted(tmp_path.iterdir())])
    assert np.array_equal(volume.array, volume_of(series().images()).array)


def inflated(name, marker):
    """A compressed image whose stream says that it has 60000 rows and columns."""
    dataset = opened(of(name))
    frame = bytearray(next(generate_frames(dataset["PixelData"].value, number_of_frames=1)))
    struct.pack_into(">HH", frame, frame.index(marker) + 5, 60000, 60000)
    dataset.PixelData = encapsulate([bytes(frame)])
    return dataset


@pytest.mark.parametrize(
    ("name", "marker"), [("JLSL_16_15_1_1F.dcm", b"\xff\xf7"), ("JPEGLossless_1s_1f_u_16_12.dcm", b"\xff\xc3")]
)
def test_a_stream_that_claims_to_be_huge_is_refused_and_the_next_one_is_decoded(shared, name, marker):
    with pytest.raises(RefusedError, match="decode_failed"):
        decoded(inflated(name, marker))
    good = opened(of(name))
    assert np.array_equal(decoded(good), good.pixel_array)


@pytest.mark.parametrize("name", ["JLSL_16_15_1_1F.dcm", "RG3_J2KR.dcm"])
def test_a_codec_that_hangs_is_ended(shared, monkeypatch, name):
    # The second is larger than a pipe holds: then the hang is seen in writing.
    good = opened(of(name))
    decoded(good)
    child = decoding._CODECS._child.pid
    os.kill(child, signal.SIGSTOP)
    monkeypatch.setattr(decoding, "_PATIENCE", 0.2)
    with pytest.raises(RefusedError, match="not decoded after"):
        decoded(good)
    monkeypatch.undo()
    assert np.array_equal(decoded(good), good.pixel_array)
    assert decoding._CODECS._child.pid != child


def test_a_box_without_a_length_hangs_nobody(shared, monkeypatch):
    # pydicom 3.0 goes from box to box of a JP2 header by their lengths, and never leaves one of length 0.
    dataset = opened(of("ELSCINT1_JP2vsJ2K.dcm"))
    frame = bytearray(next(generate_frames(dataset["PixelData"].value, number_of_frames=1)))
    assert frame[4:8] == b"jP  "
    frame[12:16] = bytes(4)
    dataset.PixelData = encapsulate([bytes(frame)])
    decoded(opened(of("JLSL_16_15_1_1F.dcm")))
    monkeypatch.setattr(decoding, "_PATIENCE", 1.0)
    with pytest.raises(RefusedError, match="not decoded after"):
        decoded(dataset)


def test_the_codecs_end_with_the_process_that_needed_them(shared, tmp_path):
    path = of("JLSL_16_15_1_1F.dcm")
    code = f"""
        import time
        from pathlib import Path
        from locum.site_client.imaging import decoding, dicom
        path = Path({str(path)!r})
        decoding.decoded(dicom.read(path, path.stat().st_size))
        print(decoding._CODECS._child.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the codecs outlived their parent")


def test_a_codec_that_hangs_when_nobody_waits_any_more_ends_too(shared):
    child = subprocess.Popen(
        [sys.executable, "-m", "locum.site_client.imaging.decoding"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    good = opened(of("JLSL_16_15_1_1F.dcm"))
    numbers = {name: int(good.get(name, 0)) for name in decoding._COUNTS}
    syntax, content = str(good.file_meta.TransferSyntaxUID), good.PixelData
    about = {"syntax": syntax, "frames": 1, "photometric": "MONOCHROME2", "length": len(content), "alarm": 1e-6}
    # Within a microsecond no codec is ready: as if it hung.
    child.stdin.write(json.dumps(numbers | about).encode() + b"\n" + content)
    child.stdin.flush()
    assert child.wait(timeout=60) == -signal.SIGALRM
    child.stdin.close()
    child.stdout.close()


def test_what_a_codec_prints_is_no_pixel(shared):
    # gdcm warns on standard output and error; the answer must not be mixed with it.
    dataset = opened(of("JPEGLossless_1s_1f_i_16_16_bad.dcm"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(decoded(dataset), pydicom.dcmread(of("JPEGLossless_1s_1f_i_16_16_bad.dcm")).pixel_array)
