from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locum.common import names
from locum.common.errors import Code, SiteFailure
from locum.common.plan import Fold, Plan
from locum.simulations.preparation import Prepared
from locum.site_client.imaging.catalog import Case
from locum.site_client.session import Session, open_session, train_round
from locum.site_client.settings import Settings
from locum.site_client.training import data
from locum.site_client.training.data import Draws, draw_seed, steps_of
from tests.plans import initial
from tests.site_client.asking import Picture, equal, nifti_store, plan, segmentation_plan

#: Parameters that make an augmentation act on every case.
_PARAMETERS: dict[str, dict[str, Any]] = {
    "RandScaleIntensityd": {"factors": 0.5},
    "RandShiftIntensityd": {"offsets": 0.5},
    "RandStdShiftIntensityd": {"factors": 0.5},
    "RandCoarseDropoutd": {"holes": 2, "spatial_size": 3},
    "RandCoarseShuffled": {"holes": 2, "spatial_size": 3},
    "RandAffined": {"rotate_range": [0.5]},
    "RandRotated": {"range_x": 0.5},
    "RandZoomd": {"min_zoom": 0.7, "max_zoom": 0.8},
    "Rand2DElasticd": {"spacing": [4, 4], "magnitude_range": [1, 2]},
    "Rand3DElasticd": {"sigma_range": [1, 2], "magnitude_range": [5, 9]},
    "RandSpatialCropd": {"roi_size": [8, 8, 8], "random_size": False},
    "RandCropByPosNegLabeld": {"spatial_size": [8, 8, 8]},
    "RandCropByLabelClassesd": {"spatial_size": [8, 8, 8], "num_classes": 2},
    "RandGibbsNoised": {"alpha": [0.5, 0.9]},
    "RandAdjustContrastd": {"gamma": [2.0, 4.0]},
}
_CROPS = {"RandSpatialCropd", "RandCropByPosNegLabeld", "RandCropByLabelClassesd"}
_AUGMENTATIONS = sorted(name for name, entry in names.TRANSFORMS.items() if entry.random)


def _batches(session: Session, number: int) -> list[dict[str, Any]]:
    prepared = session.dataset("train", augment=True)
    site = session.settings.site
    return list(data.training_loader(session.plan, prepared, site=site, round_number=number))


def _order(batches: list[dict[str, Any]]) -> list[int]:
    return [int(index) for batch in batches for index in batch["index"]]


def test_every_round_has_its_own_order_and_its_own_augmentation(settings: Settings) -> None:
    noise = [{"name": "RandGaussianNoised", "prob": 1.0}]
    session = open_session(settings, plan(transforms__augment=noise, training__local_steps=7))
    rounds = [_batches(session, number) for number in (1, 2, 1)]
    assert _order(rounds[0]) != _order(rounds[1])
    assert _order(rounds[0]) == _order(rounds[2])
    images = [
        {int(i): image for b in batches for i, image in zip(b["index"], b["image"], strict=True)} for batches in rounds
    ]
    for index in set(images[0]) & set(images[1]):
        assert not torch.equal(images[0][index], images[1][index])
        assert torch.equal(images[0][index], images[2][index])


def test_the_same_case_is_augmented_anew_each_time_within_a_round(settings: Settings) -> None:
    noise = [{"name": "RandGaussianNoised", "prob": 1.0}]
    (first, second) = _batches(open_session(settings, plan(transforms__augment=noise, training__batch_size=7)), 1)
    a, b = (batch["image"][batch["index"].tolist().index(0)] for batch in (first, second))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", _AUGMENTATIONS)
def test_no_augmentation_writes_into_the_cached_cases(
    name: str, settings: Settings, masked: Prepared, flat: Prepared
) -> None:
    part = {"name": name, **({} if name in _CROPS else {"prob": 1.0}), **_PARAMETERS.get(name, {})}
    size = [8, 8, 8] if name in _CROPS else [16, 16, 8]
    of = segmentation_plan(transforms__augment=[part], training__input_size=size, training__local_steps=1)
    if name == "Rand2DElasticd":
        of = plan(
            contract__modality=["DX"], contract__dimensions=2, training__input_size=[16, 16],
            training__local_steps=1, transforms={"augment": [part]},
        )  # fmt: skip
        masked = flat
    session = open_session(replace(settings, stores=(masked.store,)), of)
    prepared = session.dataset("train", augment=True)
    before = [
        {key: torch.clone(value) for key, value in item.items() if torch.is_tensor(value)} for item in prepared._cache
    ]
    first, _ = _batches(session, 1), _batches(session, 2)
    for item, kept in zip(prepared._cache, before, strict=True):
        assert all(torch.equal(item[key], value) for key, value in kept.items())
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, _batches(session, 1), strict=True))
    plain = replace(settings, stores=(masked.store,), cache_bytes=0)
    again = _batches(open_session(plain, of), 1)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))


def test_a_prepared_case_is_not_read_again(settings: Settings, hospitals: dict[str, Prepared], tmp_path: Path) -> None:
    of = plan()
    for budget, served in ((1 << 30, True), (0, False)):
        store = shutil.copytree(hospitals["north"].store, tmp_path / f"store-{budget}")
        session = open_session(replace(settings, stores=(store,), cache_bytes=budget), of)
        expected = train_round(session, initial(of), 1)[0]
        shutil.rmtree(store / "volumes")
        if served:
            assert equal(train_round(session, initial(of), 1)[0], expected)
            continue
        with pytest.raises(SiteFailure) as failed:
            train_round(session, initial(of), 1)
        assert failed.value.code is Code.DATA_UNREADABLE
        assert str(store) in failed.value.detail


def test_as_many_cases_are_kept_as_the_budget_holds(settings: Settings) -> None:
    crop = {"name": "RandSpatialCropd", "roi_size": [4, 4, 4], "random_size": False}
    one = 16 * 16 * 8 * 4 + 3 * 4
    for of in (plan(), plan(transforms__augment=[crop], training__input_size=[4, 4, 4])):
        for cases in (0, 1, 3, 7):
            session = open_session(replace(settings, cache_bytes=cases * one), of)
            assert len(session.dataset("train", augment=True)._cache) == cases


def test_the_folds_together_keep_as_many_cases_as_the_budget_holds(settings: Settings) -> None:
    one = 16 * 16 * 8 * 4 + 3 * 4
    session = open_session(replace(settings, cache_bytes=8 * one), plan())
    folds: list[tuple[Fold, int]] = [("train", 7), ("validation", 1), ("test", 0)]
    for fold, kept in folds:
        prepared = session.dataset(fold, augment=fold == "train")
        assert len(prepared._cache) == kept
        assert len(prepared) == len(session.cases[fold]) >= 3


def test_a_damaged_volume_is_unreadable_and_the_log_says_which_and_why(
    settings: Settings, hospitals: dict[str, Prepared], tmp_path: Path
) -> None:
    store = shutil.copytree(hospitals["north"].store, tmp_path / "store")
    session = open_session(replace(settings, stores=(store,)), plan())
    broken = session.cases["train"][3].image
    broken.write_bytes(broken.read_bytes()[:700])
    with pytest.raises(SiteFailure) as failed:
        session.dataset("train", augment=True)
    assert failed.value.code is Code.DATA_UNREADABLE
    assert broken.name in failed.value.detail


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        ([], "the transforms give 1 channels of [16, 16, 8], the plan says 1 of [12, 12, 8]"),
        ([{"name": "Resized", "spatial_size": [12, 12, 9]}], "1 channels of [12, 12, 9]"),
        ([{"name": "RepeatChanneld", "repeats": 3}], "3 channels"),
        ([{"name": "Resized", "spatial_size": [12, 12]}], "Resize"),
    ],
)
def test_transforms_that_do_not_give_the_input_size_are_told_in_the_detail(
    prepare: list[dict[str, Any]], told: str, settings: Settings
) -> None:
    of = plan(transforms={"prepare": prepare}, training__input_size=[12, 12, 8])
    with pytest.raises(SiteFailure) as failed:
        train_round(open_session(settings, of), initial(of), 1)
    assert failed.value.code is Code.DATA_UNREADABLE
    assert told in failed.value.detail


def test_volumes_of_different_sizes_in_one_batch_are_unreadable_and_not_an_inner_error(
    settings: Settings, tmp_path: Path
) -> None:
    arrays = [np.zeros((16, 16, depth), np.int16) for depth in (8, 8, 8, 9)]
    store = nifti_store(tmp_path / "site", [Picture(f"i{n}", array) for n, array in enumerate(arrays)])
    of = plan(contract__modality=None, transforms={"prepare": []})
    with pytest.raises(SiteFailure) as failed:
        train_round(open_session(replace(settings, stores=(store,)), of), initial(of), 1)
    assert failed.value.code is Code.DATA_UNREADABLE


def test_a_mask_value_that_is_no_class_is_unreadable(settings: Settings, tmp_path: Path) -> None:
    volume, mask = np.zeros((16, 16, 8), np.int16), np.zeros((16, 16, 8), np.uint8)
    mask[2, 2, 2] = 3
    store = nifti_store(tmp_path / "site", [Picture("i", volume, mask=mask)])
    of = segmentation_plan(contract__modality=None)
    with pytest.raises(SiteFailure) as failed:
        train_round(open_session(replace(settings, stores=(store,)), of), initial(of), 1)
    assert failed.value.code is Code.DATA_UNREADABLE
    assert "the mask has the value 3, the plan has 2 classes" in failed.value.detail


def test_an_empty_fold_is_no_data() -> None:
    with pytest.raises(SiteFailure) as failed:
        data.dataset(plan(), (), augment=False, budget_bytes=1)
    assert failed.value.code is Code.NO_DATA


def test_a_case_of_an_unknown_class_or_without_a_mask_is_unreadable() -> None:
    case = Case("c1", "p1", Path("c1.nii"), None, "cyst", "train")
    for of, told in ((plan(), "'cyst'"), (segmentation_plan(), "no mask")):
        with pytest.raises(SiteFailure, match=told) as failed:
            data.dataset(of, (case,), augment=False, budget_bytes=1)
        assert failed.value.code is Code.DATA_UNREADABLE


# --- what a loaded image is


def _only(of: Plan, store: Path, settings: Settings) -> dict[str, Any]:
    item: dict[str, Any] = open_session(replace(settings, stores=(store,)), of).dataset("train", augment=False)[0]
    return item


def _plain(shape: tuple[int, ...], channels: int = 1) -> Plan:
    return plan(
        contract__modality=None, contract__dimensions=len(shape), contract__channels=channels,
        transforms={"prepare": []}, training__input_size=list(shape),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 9, 5), (8, 9, 5, 2), (8, 9), (8, 9, 1, 3)], ids=str)
def test_an_image_has_its_channels_first_and_every_voxel_in_its_place(
    shape: tuple[int, ...], settings: Settings, tmp_path: Path
) -> None:
    array = np.random.default_rng(3).integers(-1000, 3000, shape).astype(np.int16)
    store = nifti_store(tmp_path / "site", [Picture("i", array, spacing=(0.5, 0.7, 3.0))])
    flat, channels = shape[2:] in {(), (1, 3)}, shape[3] if len(shape) == 4 else 1
    item = _only(_plain(shape[: 2 if flat else 3], channels), store, settings)
    expected = array.reshape(shape + (1,) * (4 - len(shape)))
    assert item["image"].dtype == torch.float32
    for channel in range(channels):
        found = item["image"][channel].numpy()
        assert np.array_equal(found, expected[:, :, 0, channel] if flat else expected[..., channel])
    assert item["spacing"].tolist() == pytest.approx([0.5, 0.7] if flat else [0.5, 0.7, 3.0])


def test_the_spacing_is_that_of_the_prepared_grid(settings: Settings, tmp_path: Path) -> None:
    store = nifti_store(tmp_path / "site", [Picture("i", np.zeros((8, 8, 4), np.int16), spacing=(1.0, 1.0, 4.0))])
    for prepare, size, spacing in (
        ([{"name": "Spacingd", "pixdim": [2.0, 2.0, 2.0]}], [4, 4, 7], [2, 2, 2]),
        ([{"name": "Resized", "spatial_size": [16, 4, 4]}], [16, 4, 4], [0.5, 2, 4]),
        ([{"name": "Orientationd", "axcodes": "SAR"}], [4, 8, 8], [4, 1, 1]),
        ([{"name": "Rotate90d", "spatial_axes": [0, 2]}], [4, 8, 8], [4, 1, 1]),
        ([{"name": "Zoomd", "zoom": 0.5}], [8, 8, 4], [2, 2, 8]),
    ):
        of = plan(contract__modality=None, transforms={"prepare": prepare}, training__input_size=size)
        assert _only(of, store, settings)["spacing"].tolist() == pytest.approx(spacing), prepare


def test_a_mask_goes_through_the_same_moves_as_its_image_and_stays_whole_numbers(
    settings: Settings, tmp_path: Path
) -> None:
    rng = np.random.default_rng(4)
    mask = (rng.random((16, 16, 8)) > 0.7).astype(np.uint8)
    store = nifti_store(tmp_path / "site", [Picture("i", mask.astype(np.int16), mask=mask)])
    spatial = [
        {"name": "RandFlipd", "prob": 1.0, "spatial_axis": 0},
        {"name": "RandRotate90d", "prob": 1.0, "spatial_axes": [0, 1]},
        {"name": "RandSpatialCropd", "roi_size": [8, 8, 8], "random_size": False},
    ]
    of = segmentation_plan(
        contract__modality=None, transforms={"prepare": [], "augment": spatial}, training__input_size=[8, 8, 8]
    )
    session = open_session(replace(settings, stores=(store,)), of)
    (batch, _) = _batches(session, 1)
    assert torch.equal(batch["image"], batch["mask"])
    rotate = [{"name": "RandAffined", "prob": 1.0, "rotate_range": [0.5, 0.5, 0.5]}]
    of = segmentation_plan(
        contract__modality=None, transforms={"prepare": [], "augment": rotate}, training__input_size=[16, 16, 8]
    )
    (batch, _) = _batches(open_session(replace(settings, stores=(store,)), of), 1)
    assert set(batch["mask"].unique().tolist()) == {0.0, 1.0}
    assert len(batch["image"].unique()) > 2


# --- how cases are drawn


@given(count=st.integers(1, 30), total=st.integers(0, 200), seed=st.integers(0, 2**31))
def test_every_pass_takes_each_case_once(count: int, total: int, seed: int) -> None:
    drawn = list(Draws(None, count, total, torch.Generator().manual_seed(seed)))
    assert len(drawn) == total
    for start in range(0, total, count):
        part = drawn[start : start + count]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(count))


@given(rare=st.integers(1, 5), common=st.integers(5, 60))
def test_balanced_draws_give_every_class_the_same_chance(rare: int, common: int) -> None:
    labels = [0] * common + [1] * rare
    draws = Draws(labels, len(labels), 4000, torch.Generator().manual_seed(rare * 100 + common))
    share = sum(labels[index] for index in draws) / len(draws)
    assert 0.45 < share < 0.55


def test_balanced_sampling_is_what_the_plan_asks_for(settings: Settings, tmp_path: Path) -> None:
    volume = np.zeros((16, 16, 8), np.int16)
    pictures = [Picture(f"i{n}", volume + n, "lesion" if n == 0 else "no_lesion") for n in range(8)]
    few = replace(settings, stores=(nifti_store(tmp_path / "site", pictures),))
    for sampling, least, most in (("uniform", 50, 50), ("balanced", 150, 250)):
        of = plan(contract__modality=None, training__local_steps=100, training__sampling=sampling)
        seen = Counter(int(label) for batch in _batches(open_session(few, of), 1) for label in batch["label"])
        assert least <= seen[1] <= most, sampling


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"training__local_steps": 5}, 5),
        ({"training__local_steps": None, "training__local_epochs": 1}, 2),
        ({"training__local_steps": None, "training__local_epochs": 3}, 6),
        ({"training__local_steps": None, "training__local_epochs": 2, "training__batch_size": 7}, 2),
        ({"training__local_steps": None, "training__local_epochs": 2, "training__batch_size": 100}, 2),
    ],
)
def test_a_round_has_the_steps_that_the_plan_says_each_with_a_full_batch(
    changes: dict[str, Any], steps: int, settings: Settings
) -> None:
    of = plan(**changes)
    session = open_session(settings, of)
    assert steps_of(of, 7) == steps
    assert [len(batch["index"]) for batch in _batches(session, 1)] == [min(of.training.batch_size, 7)] * steps
    assert train_round(session, initial(of), 1)[1].steps == steps


def test_an_epoch_sees_every_case(settings: Settings) -> None:
    of = plan(training__local_steps=None, training__local_epochs=1)
    assert set(_order(_batches(open_session(settings, of), 1))) == set(range(7))


def test_seeds_differ_by_every_part_and_are_the_same_everywhere() -> None:
    parts = [(0, "a", 1, "train"), (1, "a", 1, "train"), (0, "b", 1, "train"), (0, "a", 2, "train"), (0, "a", 1, "n")]
    assert len({draw_seed(*one) for one in parts}) == len(parts)
    assert draw_seed(0, "north", 1) == 2_618_492_757
