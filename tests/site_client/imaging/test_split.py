"""The split: by patient, stable, and in the stated shares."""

from __future__ import annotations

import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import UID

from locum.common.errors import DataError
from locum.site_client.imaging.geometry import Volume
from locum.site_client.imaging.keys import KEY_BYTES, Keys, load_or_create_keys
from locum.site_client.imaging.nifti import regrid
from locum.site_client.imaging.reasons import RefusedError
from locum.site_client.imaging.split import FOLDS, check_shares, fold_of

KEYS = st.binary(min_size=32, max_size=32)


@given(KEYS, st.text())
def test_a_patient_is_always_at_the_same_place_within_the_unit_interval(key, patient):
    u = Keys.of(key).place(patient)
    assert 0 <= u < 1
    assert u == Keys.of(key).place(patient)


@given(KEYS, KEYS, st.text(min_size=1))
def test_another_key_for_names_leaves_a_patient_in_its_place(key, other, patient):
    before, after = Keys.of(key), Keys(names=other, folds=key)
    assert after.place(patient) == before.place(patient)
    assert (after.patient(patient) == before.patient(patient)) == (key == other)


@given(KEYS, st.text(min_size=1))
def test_dates_move_back_by_at_least_a_day_and_at_most_ten_years(key, patient):
    assert 1 <= Keys.of(key).days(patient) <= 3652


@given(KEYS, st.lists(st.integers(0, 9999), min_size=2, max_size=8))
def test_a_keyed_uid_is_a_valid_one_and_those_of_the_standard_stay(key, parts):
    uid = Keys.of(key).uid("1.2." + ".".join(map(str, parts)))
    assert UID(uid).is_valid
    assert len(uid) <= 64
    assert Keys.of(key).uid("1.2.840.10008.1.2.1") == "1.2.840.10008.1.2.1"


@given(st.floats(0, 1, exclude_max=True), st.lists(st.integers(0, 100), min_size=3, max_size=3).filter(any))
def test_a_patient_is_in_one_fold_that_has_a_share(u, weights):
    split = tuple(weight / sum(weights) for weight in weights)
    fold = fold_of(u, None, split)
    if abs(u - split[0]) > 1e-9 and abs(u - split[0] - split[1]) > 1e-9:
        assert split[FOLDS.index(fold)] > 0


@given(st.floats(0, 1, exclude_max=True), st.sampled_from(FOLDS))
def test_a_stated_fold_wins_if_the_table_has_all_three(u, stated):
    assert fold_of(u, stated, (0.8, 0.1, 0.1), table_folds=FOLDS) == stated


def test_a_name_is_the_same_in_whichever_form_its_letters_are_written():
    keys, composed, decomposed = Keys.of(b"k" * 32), "M\u00fcller", "Mu\u0308ller"
    assert composed != decomposed
    assert keys.patient(composed) == keys.patient(decomposed)
    assert keys.accession(composed) == keys.accession(decomposed)
    assert (keys.days(composed), keys.place(composed)) == (keys.days(decomposed), keys.place(decomposed))


def test_folds_have_their_shares():
    places = [Keys.of(b"k" * 32).place(f"p{number}") for number in range(20_000)]
    folds = [fold_of(u, None, (0.7, 0.1, 0.2)) for u in places]
    shares = np.array([folds.count(fold) / len(folds) for fold in FOLDS])
    assert np.allclose(shares, (0.7, 0.1, 0.2), atol=0.015)


def test_a_larger_test_share_keeps_the_patients_it_had():
    places = [Keys.of(b"k" * 32).place(f"p{number}") for number in range(200)]
    small = {u for u in places if fold_of(u, None, (0.8, 0.1, 0.1)) == "test"}
    large = {u for u in places if fold_of(u, None, (0.6, 0.1, 0.3)) == "test"}
    assert small < large


@pytest.mark.parametrize("split", [(0.8, 0.1, 0.2), (1.2, -0.1, -0.1)])
def test_shares_that_do_not_add_up_are_an_error(split):
    with pytest.raises(DataError, match="add up"):
        check_shares(split)


def test_another_key_gives_another_pseudonym():
    assert Keys.of(b"a" * 32).patient("P1") != Keys.of(b"b" * 32).patient("P1")
    assert len(Keys.of(b"a" * 32).patient("P1")) == 16


def test_a_key_is_drawn_once_and_only_its_owner_can_read_it(tmp_path):
    path = tmp_path / "store" / "split.key"
    keys = load_or_create_keys(path)
    assert len(keys.names) == len(keys.folds) == KEY_BYTES
    assert load_or_create_keys(path) == keys
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_no_key_is_an_error(tmp_path):
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(DataError, match="5 bytes"):
        load_or_create_keys(tmp_path / "key")


GRID = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 1], [0, 0, 0, 1]])


@given(st.permutations([0, 1, 2]), st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_mask_in_any_order_of_its_axes_comes_onto_the_grid(axes, flips):
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    shown = labels.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    move = np.zeros((4, 4))
    move[3, 3] = 1
    for place, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        move[axis, place] = -1 if flip else 1
        move[axis, 3] = shown.shape[place] - 1 if flip else 0
    mask, image = Volume(shown, GRID @ move), Volume(np.zeros((3, 4, 5), np.int16), GRID)
    assert np.array_equal(regrid(mask, image), labels)


@pytest.mark.parametrize(
    "off", [np.diag([1, 1, 2.0, 1]), np.eye(4) + np.eye(4, k=3) * 0.3, np.eye(4) + np.eye(4, k=1) * 0.2]
)
def test_a_mask_that_would_need_resampling_is_refused(off):
    labels = np.zeros((3, 4, 5), np.uint8)
    with pytest.raises(RefusedError, match="mask_mismatch"):
        regrid(Volume(labels, GRID @ off), Volume(labels, GRID))
