from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from locum.common import build
from locum.common.errors import Code, SiteFailure
from locum.common.plan import Plan, parse_plan
from locum.common.updates import l2_norm
from locum.simulations.preparation import Prepared
from locum.site_client import session as sessions
from locum.site_client.operations import OPERATIONS
from locum.site_client.privacy.noise import NoiseSource
from locum.site_client.session import describe, open_session, train_round
from locum.site_client.settings import Settings
from locum.site_client.training import private as engine
from locum.site_client.training.data import Batch, People
from locum.site_client.training.private import Engine, Setting, admitted
from tests.plans import CLASSIFY, initial, with_changes
from tests.site_client.asking import SEGMENT, Picture, nifti_store
from tests.site_client.privacy.private_plans import private

_PRIVACY = {"epsilon": 2.0, "delta": 1e-3, "clip": 1.0, "images": 2}
_STRONG = Setting(noise=1.0, rate=0.5)
_FAINT = Setting(noise=1e-6, rate=1.0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As a worker has; threads of test processes beside each other wait for one another."""
    torch.set_num_threads(1)


def _plan(base: Mapping[str, Any] = CLASSIFY, **changes: Any) -> Plan:
    protection = {"secure_aggregation": "off", "differential_privacy": _PRIVACY}
    fields = {"protection": protection, "release": {"training_loss": False, "metrics": []}, "transforms": {}, **changes}
    return parse_plan(json.dumps(with_changes(dict(base), **fields)).encode())


class _Cases:
    """Prepared cases, as a dataset gives them."""

    def __init__(self, plan: Plan, count: int, *, crops: int = 1, scale: float = 1.0) -> None:
        draw, size = torch.Generator().manual_seed(4), plan.training.input_size
        self._crops = crops
        self._items = [self._item(plan, i, scale * torch.randn(1, *size, generator=draw), draw) for i in range(count)]

    def _item(self, plan: Plan, index: int, image: torch.Tensor, draw: torch.Generator) -> dict[str, Any]:
        if plan.contract.task == "classification":
            return {"image": image, "label": index % 2}
        return {"image": image, "mask": torch.randint(0, 2, image.shape, generator=draw).float()}

    def __getitem__(self, index: int) -> Any:
        item = self._items[index]
        return [item] * self._crops if self._crops > 1 else item


def _people(plan: Plan, counts: list[int], **how: Any) -> People:
    ends = np.cumsum(counts)
    cases = tuple(tuple(range(end - count, end)) for end, count in zip(ends, counts, strict=True))
    return People(_Cases(plan, sum(counts), **how), cases)  # type: ignore[arg-type]


def _of_each(of: Plan, network: nn.Module, batches: list[Batch]) -> list[list[torch.Tensor]]:
    """The gradients of patients by a plain loop of autograd, one patient after the other."""
    found, criterion = [], build.loss(of)
    for batch in batches:
        loss = criterion(build.logits(network, batch["image"]), engine.truth_of(of, batch, torch.device("cpu")))
        found.append(list(torch.autograd.grad(loss, list(network.parameters()))))
    return found


def _clipped(gradients: list[torch.Tensor], clip: float) -> list[torch.Tensor]:
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradients))
    return [part * min(1.0, clip / norm) for part in gradients]


def _released(found: Engine, std: float = 1e-9) -> torch.Tensor:
    found.release(NoiseSource(), std, expected=1.0)
    return torch.cat([parameter.grad.flatten() for parameter in found.trainable.values() if parameter.grad is not None])


# --- gradients

_UNET: dict[str, Any] = {"name": "UNet", "channels": [4, 8], "strides": [2]}
_DYN: dict[str, Any] = {
    "name": "DynUNet",
    "filters": [4, 8, 8],
    "kernel_size": [3, 3, 3],
    "strides": [1, 2, 2],
    "upsample_kernel_size": [2, 2],
}
_NETWORKS: dict[str, tuple[Mapping[str, Any], dict[str, Any], list[int]]] = {
    "Classifier": (CLASSIFY, {"name": "Classifier", "channels": [4, 8]}, [16, 16, 8]),
    "DenseNet121": (CLASSIFY, {"name": "DenseNet121", "norm": "instance"}, [64, 64]),
    "UNet": (SEGMENT, _UNET, [8, 8, 8]),
    "UNet, a picture": (SEGMENT, _UNET, [16, 16]),
    "SegResNet": (SEGMENT, {"name": "SegResNet", "init_filters": 8}, [16, 16, 16]),
    "DynUNet": (SEGMENT, _DYN, [8, 8, 8]),
}


def _network_plan(name: str, **changes: Any) -> Plan:
    base, network, size = _NETWORKS[name]
    fields = {"network": network, "training__input_size": size, "contract__dimensions": len(size), **changes}
    return _plan(base, **fields)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", list(_NETWORKS))
def test_the_sum_is_that_of_a_plain_loop_over_patients(name: str, together: bool) -> None:
    of = _network_plan(name)
    network = build.initial_state(of)[0].train()
    people = _people(of, [1, 2, 1, 2])
    batches = [people.read(cases) for cases in people.cases]
    each = _of_each(of, network, batches)
    norms = [math.sqrt(sum(float(part.square().sum()) for part in one)) for one in each]
    clip = float(np.median(norms))  # of some it clips, of others it does not
    of = _network_plan(name, protection__differential_privacy={**_PRIVACY, "clip": clip})
    found = Engine(of, network, together=together)
    found.add(batches)
    clipped = [_clipped(one, clip * (1 - 1e-3)) for one in each]
    expected = torch.cat([torch.stack(parts).sum(dim=0).flatten() for parts in zip(*clipped, strict=True)])
    assert torch.linalg.vector_norm(_released(found) - expected) < 1e-4 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("name", list(_NETWORKS))
def test_every_network_of_the_list_is_admitted_and_side_by_side(name: str) -> None:
    of = _network_plan(name)
    network = build.initial_state(of)[0]
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    assert admitted(of, network, _people(of, [2, 1]))
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert build.check_buildable(of) == []


@pytest.mark.parametrize("loss", ["DiceLoss", "DiceCELoss", "DiceFocalLoss", "GeneralizedDiceLoss", "TverskyLoss"])
def test_losses_of_segmentation_give_a_private_step(loss: str) -> None:
    of = _network_plan("UNet", loss={"name": loss})
    admitted(of, build.initial_state(of)[0], _people(of, [2, 1]))


@pytest.mark.parametrize("together", [True, False])
def test_dropout_is_another_for_each_patient(together: bool) -> None:
    of = _network_plan("UNet", network={**_UNET, "dropout": 0.5})
    network = build.initial_state(of)[0].train()
    batch = _people(of, [1]).read([0])
    found = Engine(of, network, together=together)
    first, second = found.add([batch, batch])
    assert first != second


def test_all_crops_of_a_patient_are_one_patient() -> None:
    of = _plan()
    network = build.initial_state(of)[0].train()
    one, three = (_people(of, [2], crops=crops) for crops in (1, 3))
    assert len(three.read([0, 1])["image"]) == 6
    found = Engine(of, network)
    found.add([one.read([0, 1])])
    single = _released(found)
    found.add([three.read([0, 1])])
    assert torch.allclose(_released(found), single, atol=1e-6)


def test_no_patient_moves_the_sum_by_more_than_the_clip_however_many_images() -> None:
    of = _plan(protection__differential_privacy={**_PRIVACY, "clip": 0.01, "images": 64})
    network = build.initial_state(of)[0].train()
    people = _people(of, [1, 50, 3], scale=100.0)
    without, whole = Engine(of, network), Engine(of, network)
    without.add([people.read(people.cases[0]), people.read(people.cases[2])])
    whole.add([people.read(cases) for cases in people.cases])
    moved_by = float(torch.linalg.vector_norm(_released(whole, 1e-12) - _released(without, 1e-12)))
    assert 0.005 < moved_by <= 0.01


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    of = _plan()
    network = build.initial_state(of)[0].train()
    people = _people(of, [1, 1])
    good, bad = people.read([0]), dict(people.read([1]))
    bad["image"] = torch.full_like(bad["image"], math.nan)
    found = Engine(of, network)
    found.add([good])
    alone = _released(found)
    found.add([good, bad])
    assert torch.allclose(_released(found), alone, atol=1e-6)


# --- noise


def test_the_noise_of_the_stated_scale_is_in_what_is_released() -> None:
    of = _plan(network={"name": "Classifier", "channels": [16, 32]})
    found = Engine(of, build.initial_state(of)[0].train())
    people = _people(of, [1, 1, 1])
    found.add([people.read(cases) for cases in people.cases])
    clean = _released(found)
    found.add([people.read(cases) for cases in people.cases])
    found.release(NoiseSource(), 1.3 * 2.0, expected=4.0)
    parts = [parameter.grad.flatten() for parameter in found.trainable.values() if parameter.grad is not None]
    noise = (torch.cat(parts) * 4.0 - clean).numpy()
    assert noise.std() == pytest.approx(2.6, rel=5 / math.sqrt(2 * noise.size))
    assert stats.kstest(noise / 2.6, "norm").pvalue > 1e-6


def test_a_canary_is_found_as_often_as_the_noise_lets_and_no_more() -> None:
    """The best test of one patient's presence in one release has the area Φ(1/(σ√2)) (Neyman & Pearson)."""
    of, sigma, tries = _plan(), 0.8, 400
    network = build.initial_state(of)[0].train()
    people = _people(of, [1, 1], scale=100.0)
    of = _plan(protection__differential_privacy={**_PRIVACY, "clip": 1e-3})  # every gradient is longer than this
    found = Engine(of, network)
    canary, other = (people.read(cases) for cases in people.cases)
    found.add([canary])
    direction = _released(found, 1e-12) / 1e-3

    def seen(batches: list[Batch]) -> list[float]:
        scores = []
        for _ in range(tries):
            found.add(batches)
            scores.append(float(_released(found, sigma * 1e-3) @ direction))
        return scores

    inside, outside = seen([other, canary]), seen([other])
    area = stats.mannwhitneyu(inside, outside).statistic / tries**2
    assert area == pytest.approx(stats.norm.cdf(1 / (sigma * math.sqrt(2))), abs=4 * 0.5 / math.sqrt(tries) / 2)


def test_a_step_that_draws_nobody_is_a_step_of_noise(settings: Settings) -> None:
    of = private(optimiser={"name": "SGD", "lr": 1.0}, training__local_steps=1)
    session = open_session(settings, of)
    patients = len(session.people().cases)
    nobody = Setting(noise=2.0, rate=1e-9)
    update, done, _ = train_round(session, initial(of), 1, setting=nobody)
    moved_by = np.concatenate([array.ravel() for array in update.values()])
    assert done.steps == 1
    assert done.loss == 0.0
    assert moved_by.std() == pytest.approx(2.0 / (1e-9 * patients), rel=0.2)


# --- rounds of a session


def test_a_private_round_is_never_the_same_twice(settings: Settings) -> None:
    session = open_session(settings, private())
    first, second = (train_round(session, initial(session.plan), 1, setting=_STRONG)[0] for _ in range(2))
    assert not any(np.array_equal(first[name], second[name]) for name in first)


def test_with_hardly_any_noise_a_private_round_is_clipped_gradient_descent(settings: Settings) -> None:
    fields: dict[str, Any] = {"transforms__augment": [], "optimiser": {"name": "SGD", "lr": 1.0}}
    of = private(training__local_steps=1, clip=0.05, images=64, **fields)
    session = open_session(settings, of)
    people = session.people()
    network = build.initial_state(of)[0].train()
    each = [_clipped(one, 0.05) for one in _of_each(of, network, [people.read(cases) for cases in people.cases])]
    mean = torch.cat([torch.stack(parts).mean(dim=0).flatten() for parts in zip(*each, strict=True)]).numpy()
    update, done, told = train_round(session, initial(of), 1, setting=_FAINT)
    assert np.linalg.norm(np.concatenate([a.ravel() for a in update.values()]) + mean) < 5e-3 * np.linalg.norm(mean)
    assert (done.steps, told) == (1, len(people.cases))


def test_patients_are_told_for_cases(tmp_path: Path, hospitals: dict[str, Prepared]) -> None:
    session = open_session(Settings("north", (hospitals["north"].store,), tmp_path), private())
    told, _ = OPERATIONS["patients"](session, {}, {})
    unique = {fold: len({case.patient for case in cases}) for fold, cases in session.cases.items()}
    assert told == {"patients": unique}
    request = {"round": 1, "private": {"noise": 1.0, "rate": 0.5}}
    assert OPERATIONS["train"](session, request, initial(session.plan))[0]["cases"] == unique["train"]


@pytest.mark.parametrize("clip", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-20, 1e-12, 1.0, 1e12, 1e18, 1e25, 1e38])
def test_no_patient_gives_more_than_the_clip_however_small_or_large_its_gradient(clip: float, scale: float) -> None:
    of = _plan(protection__differential_privacy={**_PRIVACY, "clip": clip})
    summing = Engine(of, nn.Linear(100, 100))
    summing.add_rows(torch.full((1, 10_100), scale))
    noise = NoiseSource()
    summing.release(noise, clip * 1e-6, expected=1.0)
    given = {name: parameter.grad.numpy() for name, parameter in summing.network.named_parameters()}
    assert l2_norm(given) <= clip * (1 + 1e-6)


@pytest.mark.parametrize("operation", ["train", "evaluate"])
def test_a_plan_and_a_request_that_disagree_on_noise_are_refused(operation: str, settings: Settings) -> None:
    private_plan, plain = private(), private(protection={"secure_aggregation": "off"})
    for of, noise in ((private_plan, None), (plain, {"noise": 1.0, "rate": 0.5})):
        request = {"round": 1, "fold": "test", **({} if noise is None else {"private": noise})}
        with pytest.raises(SiteFailure) as refused:
            OPERATIONS[operation](open_session(settings, of), request, initial(of))
        assert refused.value.code is Code.PRIVACY_REFUSED


def test_weights_that_end_up_not_finite_are_told_and_a_loss_is_not(settings: Settings) -> None:
    of = private(optimiser={"name": "SGD", "lr": 1e30, "weight_decay": 1.0}, training__local_steps=8)
    with pytest.raises(SiteFailure, match="weights are not finite") as failed:
        train_round(open_session(settings, of), initial(of), 1, setting=_STRONG)
    assert failed.value.code is Code.LOSS_NOT_FINITE


# --- what is refused


@pytest.mark.parametrize(
    ("network", "remedy"),
    [
        ({"name": "DenseNet121"}, "set norm: instance"),
        ({"name": "ResNet10"}, "norm"),
    ],
)
def test_batch_normalisation_is_refused_with_the_remedy(network: dict[str, Any], remedy: str) -> None:
    of = _plan(network=network, training__input_size=[64, 64, 64])
    problem = next(found for found in build.check_buildable(of) if found.location == ("network",))
    assert "normalises over the batch" in problem.message
    assert remedy in problem.remedy
    with pytest.raises(SiteFailure, match="over the batch") as refused:
        admitted(of, build.initial_state(of)[0], _people(of, [1]))
    assert refused.value.code is Code.PRIVACY_REFUSED


class _Counting(nn.Module):
    """Keeps a mean of what it saw in a buffer that has no telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(1))
        self.head = nn.LazyLinear(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.memory += images.mean()
        scores: torch.Tensor = self.head(images.flatten(1))
        return scores


@pytest.mark.parametrize(
    "made",
    [
        lambda: nn.Sequential(nn.Conv3d(1, 2, 1), nn.SyncBatchNorm(2), nn.Flatten(), nn.LazyLinear(2)),
        lambda: nn.Sequential(nn.InstanceNorm3d(1, track_running_stats=True), nn.Flatten(), nn.LazyLinear(2)),
        _Counting,
    ],
)
def test_statistics_of_images_are_refused(made: Callable[[], nn.Module]) -> None:
    of, network = _plan(), made()
    network.eval()(torch.zeros(1, 1, *of.training.input_size))  # lazy layers get their size
    with pytest.raises(SiteFailure) as refused:
        admitted(of, network, _people(of, [1, 1]))
    assert refused.value.code is Code.PRIVACY_REFUSED


def test_a_network_that_cannot_be_trained_so_is_told_before_the_first_round(settings: Settings) -> None:
    network = {"name": "ResNet10", "widen_factor": 0.0625, "norm": "batch"}
    with pytest.raises(SiteFailure, match="over the batch") as refused:
        describe(open_session(settings, private(network=network)))
    assert refused.value.code is Code.PRIVACY_REFUSED


def test_distances_without_bound_cannot_be_released_with_noise() -> None:
    paid = {**_PRIVACY, "metrics_epsilon": 1.0}
    of = _plan(SEGMENT, release={"training_loss": False}, protection__differential_privacy=paid)
    assert [found.message.split(":")[0] for found in build.check_buildable(of)] == ["surface_distance"]


# --- images of one patient


def test_a_site_of_one_patient_with_many_images_draws_one_patient(tmp_path: Path) -> None:
    volume = np.zeros((8, 8, 8), np.float32)
    store = nifti_store(tmp_path / "site", [Picture(f"p{i}", volume + i) for i in range(3)])
    of = private(contract__modality=None, transforms={"prepare": [{"name": "Resized", "spatial_size": [16, 16, 8]}]})
    session = open_session(Settings("by-hand", (store,), tmp_path / "run"), of)
    one = tuple(replace(case, patient="x") for case in session.cases["train"])
    same = replace(session, cases={**session.cases, "train": one})
    assert len(same.people().cases) == 1
    assert sessions.patients(same)["train"] == 1


def test_local_tensors_are_within_the_same_clip(settings: Settings) -> None:
    fields: dict[str, Any] = {"transforms__augment": [], "optimiser": {"name": "SGD", "lr": 1.0}}
    of = private(tensors={"local": ["0.*"]}, training__local_steps=1, clip=1e-3, **fields)
    session = open_session(settings, of)
    before = {name: p.detach().clone() for name, p in build.initial_state(of)[0].named_parameters()}
    train_round(session, initial(of), 1, setting=Setting(noise=1e-6, rate=1.0))
    moves = {name: (p - before[name]).detach().numpy() for name, p in session.network.named_parameters()}
    assert l2_norm({name: move for name, move in moves.items() if name.startswith("0.")}) > 0
    assert l2_norm(moves) <= 1e-3
