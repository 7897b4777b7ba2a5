from __future__ import annotations

import io

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from locum.simulations.phantoms import Grid
from locum.simulations.scans import (
    VENDORS,
    Instance,
    Patient,
    Protocol,
    Storage,
    Study,
    localizer,
    repeated,
    series,
    uid,
)

STUDY = Study("key", Patient("N-000001", "Müller^Jörg", "19600229", "F"), "A1", "20210302")
OBLIQUE = Grid(
    (5, 12, 10),
    (4.0, 2.0, 1.5),
    row=(0.96, 0.28, 0.0),
    column=(-0.168, 0.576, 0.8),
    centre=(10.0, -20.0, 300.5),
)
SAGITTAL = Grid((5, 12, 10), (4.0, 2.0, 1.5), row=(0.0, 1.0, 0.0), column=(0.0, 0.0, -1.0))
STORAGES = (
    Storage(),
    Storage(bits=16, signed=True, intercept=0.0),
    Storage(bits=14, slope=0.5),
    Storage(bits=13, signed=True, intercept=0.0),
)


def _protocol(**changes: object) -> Protocol:
    standard = Protocol("CT", VENDORS["siemens"], Storage(), "ISO_IR 100", "north (simulated)")
    return standard._replace(**changes)


def _volume(grid: Grid, low: int = -1000, high: int = 2000) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, grid.shape).astype(np.float32)


def _read(instances: list[Instance]) -> list[Dataset]:
    return [pydicom.dcmread(io.BytesIO(instance.data)) for instance in instances]


@pytest.mark.parametrize("vendor", sorted(VENDORS))
@pytest.mark.parametrize("modality", ["CT", "MR", "CR", "DX"])
def test_every_file_is_valid_and_survives_being_written_by_pydicom(
    vendor: str, modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    grid = Grid((1, 12, 10), (1.0, 2.0, 1.5)) if modality in {"CR", "DX"} else OBLIQUE
    made = series(STUDY, _volume(grid), grid, _protocol(vendor=VENDORS[vendor], modality=modality))
    assert len(made) == grid.shape[0]
    for instance, dataset in zip(made, _read(made), strict=True):
        assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID == instance.uid
        assert dataset.InstanceNumber == instance.number
        again = io.BytesIO()
        pydicom.dcmwrite(again, dataset, enforce_file_format=True)
        again.seek(0)
        assert pydicom.dcmread(again) == dataset
        assert instance.data.endswith(dataset.PixelData)
        assert len(dataset.PixelData) == 2 * 12 * 10


@pytest.mark.parametrize("grid", [OBLIQUE, SAGITTAL], ids=["oblique", "sagittal"])
@pytest.mark.parametrize("feet_first", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_series_reads_back_voxel_by_voxel_at_its_place(grid: Grid, feet_first: bool, storage: Storage) -> None:
    volume = _volume(grid)
    made = series(STUDY, volume, grid, _protocol(feet_first=feet_first, storage=storage))
    read = hd.get_volume_from_series(_read(made), apply_presentation_lut=False)
    index = np.argwhere(np.ones(grid.shape))
    places = np.c_[index, np.ones(len(index))] @ grid.affine.T
    there = np.rint(places @ np.linalg.inv(read.affine).T)[:, :3].astype(int)
    assert np.allclose(np.c_[there, np.ones(len(there))] @ read.affine.T, places, atol=1e-4)
    assert np.array_equal(read.array[tuple(there.T)], volume[tuple(index.T)])


def test_instance_numbers_run_against_the_slices_where_scans_start_at_the_feet() -> None:
    head, feet = (series(STUDY, _volume(OBLIQUE), OBLIQUE, _protocol(feet_first=first)) for first in (False, True))
    heights = [[float(dataset.SliceLocation) for dataset in _read(made)] for made in (head, feet)]
    assert heights[0] == heights[1][::-1] == sorted(heights[0])


@pytest.mark.parametrize("bits", range(12, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_values_beyond_the_bits_are_clipped_and_the_header_says_how_many(bits: int, signed: bool) -> None:
    storage = Storage(bits=bits, signed=signed, intercept=0.0)
    pixels = storage.stored(np.array([-1e6, 1e6], dtype=np.float32))
    assert tuple(int(pixel) for pixel in pixels) == storage.limits()
    (dataset, *_) = _read(series(STUDY, _volume(OBLIQUE), OBLIQUE, _protocol(storage=storage)))
    assert (dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit) == (16, bits, bits - 1)
    assert dataset.PixelRepresentation == int(signed)


def test_an_inverted_radiograph_is_black_where_values_are_high() -> None:
    storage = Storage(bits=12, intercept=0.0, inverted=True)
    grid = Grid((1, 12, 10), (1.0, 2.0, 1.5))
    volume = _volume(grid, 0, 4000)
    (dataset,) = _read(series(STUDY, volume, grid, _protocol(modality="DX", storage=storage)))
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    assert np.array_equal(4095 - dataset.pixel_array.astype(int), volume[0].astype(int))


@pytest.mark.parametrize(
    ("charset", "name"),
    [("", "Archer^Ada"), ("ISO_IR 100", "Müller^Jörg"), ("ISO_IR 192", "山田^太郎"), ("ISO_IR 144", "Иванова^Ольга")],
)
def test_a_name_survives_its_character_set(charset: str, name: str) -> None:
    study = STUDY._replace(patient=STUDY.patient._replace(name=name))
    (dataset, *_) = _read(series(study, _volume(OBLIQUE), OBLIQUE, _protocol(charset=charset)))
    assert str(dataset.PatientName) == name


def test_vendors_keep_private_blocks() -> None:
    for vendor in VENDORS.values():
        (dataset, *_) = _read(series(STUDY, _volume(OBLIQUE), OBLIQUE, _protocol(vendor=vendor)))
        block = dataset.private_block(vendor.group, vendor.creator)
        assert all(offset in block for offset, _, _ in vendor.elements)


def test_a_repeated_slice_has_its_own_uid_at_the_same_position() -> None:
    made = series(STUDY, _volume(OBLIQUE), OBLIQUE, _protocol())
    first, second = _read([made[2], repeated(made[2], STUDY, 6)])
    assert first.SOPInstanceUID != second.SOPInstanceUID == second.file_meta.MediaStorageSOPInstanceUID
    assert (second.InstanceNumber, second.ImagePositionPatient) == (6, first.ImagePositionPatient)
    assert second.PixelData == first.PixelData


def test_a_localizer_shares_the_series_and_not_its_plane() -> None:
    volume = _volume(OBLIQUE)
    made = series(STUDY, volume, OBLIQUE, _protocol())
    slice_, scout = _read([made[0], localizer(STUDY, volume, OBLIQUE, _protocol())])
    assert scout.SeriesInstanceUID == slice_.SeriesInstanceUID
    assert scout.ImageOrientationPatient != slice_.ImageOrientationPatient
    assert "LOCALIZER" in scout.ImageType


def test_uids_are_valid_and_depend_on_their_text_only() -> None:
    made = [uid(f"text {number}") for number in range(500)]
    assert len(set(made)) == 500
    assert {len(one) for one in made} == {44}
    assert all(pydicom.uid.UID(one).is_valid for one in made)
    assert uid("text 7") == made[7]


def test_two_studies_share_no_uid() -> None:
    other = STUDY._replace(key="another")
    sets = [
        {
            value
            for dataset in _read(series(study, _volume(OBLIQUE), OBLIQUE, _protocol()))
            for value in (dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID)
        }
        for study in (STUDY, other)
    ]
    assert not sets[0] & sets[1]
