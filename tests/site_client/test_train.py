from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from locum.common.build import Model
from locum.common.errors import Code, SiteFailure
from locum.common.plan import Plan
from locum.common.updates import l2_norm
from locum.simulations.preparation import Prepared
from locum.site_client.session import open_session, train_round
from locum.site_client.settings import Settings
from locum.site_client.training.train import Trained, schedule_factor
from tests.plans import initial
from tests.site_client.asking import batch_norm_plan, equal, plan, segmentation_plan

#: One step of plain gradient descent over all cases at once: the update is −rate × gradient.
_ONE_STEP: dict[str, Any] = {
    "transforms__augment": [],
    "training__batch_size": 100,
    "training__local_steps": 1,
    "optimiser": {"name": "SGD", "lr": 1.0},
}


def _round(settings: Settings, of: Plan, number: int = 1) -> tuple[Model, Trained]:
    update, done, _ = train_round(open_session(settings, of), initial(of), number)
    return update, done


def test_the_loss_that_is_told_is_the_mean_over_the_steps(settings: Settings) -> None:
    _, done = _round(settings, plan(**_ONE_STEP))
    session = open_session(settings, plan(**_ONE_STEP))
    items = [session.dataset("train", augment=False)[index] for index in range(7)]
    images, labels = torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(session.network(images), labels)
    assert done.loss == pytest.approx(float(expected), rel=1e-5)


def test_a_clipped_gradient_has_the_norm_of_the_clip(settings: Settings) -> None:
    free = l2_norm(_round(settings, plan(**_ONE_STEP))[0])
    for clip in (free / 10, free * 10):
        update, _ = _round(settings, plan(**_ONE_STEP, training__gradient_clip=clip))
        assert l2_norm(update) == pytest.approx(min(clip, free), rel=1e-3)


def test_the_cosine_schedule_goes_from_one_towards_zero_over_the_rounds() -> None:
    of = plan(training__schedule="cosine", rounds=10)
    factors = [schedule_factor(of, number) for number in range(1, 11)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.5)
    assert factors[9] == pytest.approx((1 + math.cos(0.9 * math.pi)) / 2)
    assert factors == sorted(factors, reverse=True)
    assert {schedule_factor(plan(rounds=10), number) for number in range(1, 11)} == {1.0}


def test_the_learning_rate_of_a_round_follows_the_schedule(settings: Settings) -> None:
    of = plan(**_ONE_STEP, training__schedule="cosine", rounds=4)
    norms = [l2_norm(_round(settings, of, number)[0]) for number in (1, 2, 3, 4)]
    assert [norm / norms[0] for norm in norms] == pytest.approx([1, 0.8536, 0.5, 0.1464], rel=1e-3)


def test_a_loss_that_is_not_finite_ends_the_round(settings: Settings) -> None:
    with pytest.raises(SiteFailure, match="in round 1") as failed:
        _round(settings, plan(optimiser={"name": "SGD", "lr": 1e30}, training__local_steps=4))
    assert failed.value.code is Code.LOSS_NOT_FINITE


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop"])
def test_the_optimiser_carries_nothing_from_round_to_round(name: str, settings: Settings) -> None:
    of = plan(optimiser={"name": name, "lr": 0.01})
    session = open_session(settings, of)
    first = train_round(session, initial(of), 2)[0]
    train_round(session, initial(of), 1)
    assert equal(train_round(session, initial(of), 2)[0], first)


@pytest.mark.parametrize(
    "loss", ["DiceLoss", "DiceCELoss", "DiceFocalLoss", "FocalLoss", "GeneralizedDiceLoss", "TverskyLoss"]
)
def test_every_segmentation_loss_trains(loss: str, settings: Settings, masked: Prepared) -> None:
    of = segmentation_plan(loss={"name": loss})
    update, done = _round(replace(settings, stores=(masked.store,)), of)
    assert math.isfinite(done.loss)
    assert l2_norm(update) > 0


def test_mixed_precision_on_a_cpu_is_float32_to_the_bit(settings: Settings, masked: Prepared) -> None:
    cpu, masks = replace(settings, device="cpu"), replace(settings, device="cpu", stores=(masked.store,))
    for site, make in ((cpu, plan), (masks, segmentation_plan)):
        plain, mixed = (_round(site, make(training__precision=kind)) for kind in ("float32", "mixed"))
        assert equal(plain[0], mixed[0])
        assert plain[1] == mixed[1]


_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU that torch can use")


@_gpu
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_gpu_trains_what_a_cpu_trains_as_nearly_as_its_precision_allows(precision: str, settings: Settings) -> None:
    of = plan(training__precision=precision)
    slow, fast = (_round(replace(settings, device=device), of) for device in ("cpu", "cuda"))
    tolerance = 1e-3 if precision == "float32" else 5e-2
    assert fast[1].loss == pytest.approx(slow[1].loss, rel=tolerance)
    assert all(array.dtype == np.float32 for array in fast[0].values())
    apart = l2_norm({name: fast[0][name] - slow[0][name] for name in fast[0]})
    assert apart < 10 * tolerance * l2_norm(slow[0])


@_gpu
def test_a_gpu_repeats_itself_to_the_bit_when_the_plan_is_deterministic(settings: Settings, tmp_path: Path) -> None:
    of = batch_norm_plan()
    runs = [_round(replace(settings, device="cuda", run_dir=tmp_path / str(run)), of) for run in (1, 2)]
    assert equal(runs[0][0], runs[1][0])
