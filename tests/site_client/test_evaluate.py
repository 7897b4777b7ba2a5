from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from locum.common.build import metric_of
from locum.common.errors import Code, SiteFailure
from locum.common.metrics import Outcomes
from locum.common.plan import Plan
from locum.simulations.preparation import Prepared
from locum.site_client.imaging.catalog import Case
from locum.site_client.session import Session, at_model, measure, open_session
from locum.site_client.settings import Settings
from locum.site_client.training.evaluate import outcomes, predict
from locum.site_client.training.pictures import sample_pictures
from tests.plans import initial
from tests.site_client.asking import Picture, batch_norm_plan, nifti_store, plan, segmentation_plan

_CPU = torch.device("cpu")


class _Oracle(nn.Module):
    """Says that a voxel is of the class that stands in the image."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        named = nn.functional.one_hot(images[:, 0].long(), self._classes)
        return 50.0 * torch.movedim(named, -1, 1).float()


def _plan(classes: int = 2, **changes: Any) -> Plan:
    names = ["background", *(f"organ{number}" for number in range(1, classes))]
    return segmentation_plan(contract__classes=names, training__input_size=[8, 8, 8], **changes)


def _measured(of: Plan, pairs: list[tuple[np.ndarray, np.ndarray]], spacing: tuple[float, ...] = (1, 1, 1)) -> Outcomes:
    """The outcomes of (prediction, truth) pairs."""
    batches = [
        {
            "image": torch.from_numpy(predicted)[None, None].float(),
            "mask": torch.from_numpy(truth)[None, None].float(),
            "spacing": torch.tensor([spacing]),
        }
        for predicted, truth in pairs
    ]
    cases = [Case(f"c{n}", f"p{n}", Path("i.nii"), Path("m.nii"), None, "test") for n in range(len(pairs))]
    return outcomes(of, _Oracle(len(of.contract.classes)), batches, cases, _CPU)


def _box(*corner: int, size: int = 3, value: int = 1) -> np.ndarray:
    volume = np.zeros((8, 8, 8), np.uint8)
    volume[tuple(slice(c, c + size) for c in corner)] = value
    return volume


def test_a_perfect_prediction_has_dice_one_and_distance_zero() -> None:
    truth = _box(1, 2, 3) + _box(5, 5, 5, size=2, value=2)
    found = _measured(_plan(3), [(truth, truth)])
    assert found.dice.tolist() == [[1.0, 1.0]]
    assert found.surface.tolist() == [[0.0, 0.0]]
    assert found.patients == ("p0",)


@given(shift=st.integers(0, 4), axis=st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_dice_is_twice_the_overlap_over_the_sum(shift: int, axis: int) -> None:
    moved = np.roll(_box(1, 1, 1), shift, axis)
    overlap = max(0, 3 - shift) * 9
    found = _measured(_plan(evaluation__metrics=["Dice"]), [(moved, _box(1, 1, 1))])
    assert found.dice[0, 0] == pytest.approx(2 * overlap / 54)
    assert np.isnan(found.surface).all()


def test_a_class_that_is_in_neither_picture_is_left_out_and_one_that_is_invented_is_zero() -> None:
    empty, box = _box(0, 0, 0, size=0), _box(2, 2, 2)
    of = _plan()
    found = _measured(of, [(empty, empty), (box, empty), (empty, box), (box, box)])
    assert np.isnan(found.dice[0, 0])
    assert found.dice[1:, 0].tolist() == [0.0, 0.0, 1.0]
    assert np.isnan(found.surface[:3, 0]).all()
    assert metric_of("Dice").exact(found, 2) == pytest.approx(1 / 3)
    assert metric_of("surface_distance").exact(found, 2) == 0.0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_surface_distance_is_in_millimetres_along_every_axis(axis: int) -> None:
    spacing = (0.5, 2.0, 7.0)
    found = _measured(_plan(), [(np.roll(_box(2, 2, 2, size=1), 2, axis), _box(2, 2, 2, size=1))], spacing)
    assert found.surface[0, 0] == pytest.approx(2 * spacing[axis])


def test_surface_distance_through_the_store_is_in_the_images_own_millimetres(
    settings: Settings, tmp_path: Path
) -> None:
    truth, predicted = _box(2, 2, 2, size=1), _box(2, 2, 4, size=1)
    picture = Picture("i", predicted.astype(np.int16), fold="test", mask=truth, spacing=(1.0, 1.0, 3.5))
    store = nifti_store(tmp_path / "site", [picture])
    of = _plan(contract__modality=None, transforms={"prepare": []})
    session = _oracle_session(replace(settings, stores=(store,)), of)
    assert measure(session, "test").surface.tolist() == [[7.0]]


def _oracle_session(site: Settings, of: Plan) -> Session:
    session = open_session(site, of)
    session.network = _Oracle(len(of.contract.classes))
    return session


def test_a_sliding_window_over_a_pointwise_network_is_the_whole_image() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(), nn.Conv3d(4, 2, 1)).eval()
    images = torch.rand(1, 1, 19, 11, 8)
    with torch.inference_mode():
        whole, window = (
            predict(_plan(evaluation__sliding_window=sliding), network, images) for sliding in (False, True)
        )
    assert window.shape == (1, 2, 19, 11, 8)
    assert torch.allclose(whole, window, atol=1e-6)


@pytest.mark.parametrize("size", [(5, 6, 7), (8, 8, 8), (9, 20, 8)], ids=str)
def test_a_sliding_window_takes_images_of_any_size(size: tuple[int, ...]) -> None:
    images = torch.randint(0, 2, (1, 1, *size)).float()
    found = predict(_plan(evaluation__sliding_window=True), _Oracle(2), images)
    assert torch.equal(found.argmax(dim=1, keepdim=True).float(), images)


def test_a_probability_that_is_not_finite_is_refused() -> None:
    of = _plan()
    broken = nn.Conv3d(1, 2, 1)
    nn.init.constant_(broken.weight, float("nan"))
    batch = {"image": torch.ones(1, 1, 8, 8, 8), "mask": torch.ones(1, 1, 8, 8, 8), "spacing": torch.ones(1, 3)}
    case = Case("c", "p", Path("i.nii"), None, None, "test")
    with pytest.raises(SiteFailure) as failed:
        outcomes(of, broken, [batch], [case], _CPU)
    assert failed.value.code is Code.LOSS_NOT_FINITE


def test_with_differential_privacy_a_probability_that_is_not_finite_counts_as_a_guess() -> None:
    private = {"epsilon": 2.0, "delta": 1e-3, "clip": 1.0, "metrics_epsilon": 1.0}
    of = _plan(
        protection={"secure_aggregation": "off", "differential_privacy": private},
        evaluation__metrics=["Dice"],
        release={"training_loss": False},
    )
    broken = nn.Conv3d(1, 2, 1)
    nn.init.constant_(broken.weight, float("nan"))
    batch = {"image": torch.ones(1, 1, 8, 8, 8), "mask": torch.ones(1, 1, 8, 8, 8), "spacing": torch.ones(1, 3)}
    case = Case("c", "p", Path("i.nii"), None, None, "test")
    assert outcomes(of, broken, [batch], [case], _CPU).dice.tolist() == [[0.0]]


def test_classes_are_measured_case_by_case_in_the_order_of_the_cases(settings: Settings) -> None:
    of = plan(evaluation__batch_size=2)
    session = open_session(settings, of)
    at_model(session, initial(of), 0)
    found = measure(session, "train")
    cases = session.cases["train"]
    assert found.patients == tuple(case.patient for case in cases)
    assert [of.contract.classes[label] for label in found.labels] == [case.label for case in cases]
    assert found.scores.shape == (7, 2)
    assert found.scores.sum(axis=1) == pytest.approx(np.ones(7))
    whole = measure(open_session(settings, plan(evaluation__batch_size=7)), "train")
    assert np.allclose(found.scores, whole.scores, atol=1e-6)


def test_evaluation_neither_trains_nor_moves_running_statistics(settings: Settings) -> None:
    of = batch_norm_plan()
    session = open_session(settings, of)
    before = {name: tensor.clone() for name, tensor in session.network.state_dict().items()}
    measure(session, "test")
    assert all(torch.equal(before[name], tensor) for name, tensor in session.network.state_dict().items())


def test_pictures_show_a_slice_with_the_lesion_and_what_the_network_said(settings: Settings, masked: Prepared) -> None:
    of = segmentation_plan(transforms__prepare=[])
    session = open_session(replace(settings, stores=(masked.store,)), of)
    header, arrays = sample_pictures(session, 2)
    assert len(header["pictures"]) == 2
    lesions = [session.dataset("test", augment=False)[i]["mask"].sum() > 0 for i in range(len(session.cases["test"]))]
    assert any((arrays[f"truth-{n}"] == 1).any() for n in (0, 1)) is bool(any(lesions))
    for number in (0, 1):
        shapes = {arrays[f"{name}-{number}"].shape for name in ("image", "truth", "prediction")}
        assert shapes == {(16, 16)}
        assert arrays[f"image-{number}"].dtype == np.uint8
    assert {entry["case"] for entry in header["pictures"]} <= {case.id for case in session.cases["test"]}
