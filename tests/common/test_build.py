from __future__ import annotations

import numpy as np
import pytest
import torch

from locum.common import build, names
from locum.common.plan import Plan, changed
from tests.plans import plan

SMALL = {
    "UNet": {"channels": [8, 16], "strides": [2]},
    "AttentionUnet": {"channels": [8, 16], "strides": [2]},
    "SwinUNETR": {"feature_size": 12},
    "ViT": {"patch_size": 16, "hidden_size": 48, "num_heads": 4, "num_layers": 2, "mlp_dim": 64},
    "UNETR": {"hidden_size": 48, "num_heads": 4, "mlp_dim": 64, "feature_size": 8},
    "DynUNet": {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
    "EfficientNetBN": {"model_name": "efficientnet-b0"},
    "FlexibleUNet": {"backbone": "efficientnet-b0"},
    "Classifier": {"channels": [8, 16]},
}


def _plan_of(network: str, dimensions: int) -> Plan:
    task = names.NETWORKS[network].tasks[0]
    segmentation = task == "segmentation"
    return plan(
        contract={"task": task, "dimensions": dimensions, "channels": 2, "classes": ["a", "b", "c"]},
        transforms=None,
        network={"name": network, **SMALL.get(network, {})},
        loss={"name": "DiceCELoss" if segmentation else "CrossEntropyLoss"},
        training={"input_size": [64] * dimensions, "local_steps": 1},
        evaluation={"metrics": ["Dice" if segmentation else "AUC"]},
    )


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("network", sorted(names.NETWORKS))
def test_every_network_of_the_allow_list_builds_in_two_and_three_dimensions(network: str, dimensions: int) -> None:
    assert build.check_buildable(_plan_of(network, dimensions)) == []


@pytest.mark.parametrize("loss", sorted(names.LOSSES))
def test_every_loss_of_the_allow_list_has_a_finite_gradient(loss: str) -> None:
    task = names.LOSSES[loss].tasks[-1]
    of = _plan_of("UNet" if task == "segmentation" else "ResNet10", 2)
    criterion = build.loss(changed(of, loss={"name": loss}))
    shape = (2, 3, 8, 8) if task == "segmentation" else (2, 3)
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    truth = torch.randint(3, (2, 1, *shape[2:]), generator=torch.Generator().manual_seed(1)).float()
    torch.autograd.backward(criterion(scores, truth))
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert scores.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(names.TRANSFORMS))
def test_every_transform_of_the_allow_list_exists_in_the_library(name: str) -> None:
    assert callable(build.load_target(names.TRANSFORMS[name].target))


@pytest.mark.parametrize("name", sorted({**names.METRICS, **names.OPTIMISERS, **names.STRATEGIES}))
def test_every_other_name_of_the_allow_lists_resolves(name: str) -> None:
    entry = {**names.METRICS, **names.OPTIMISERS, **names.STRATEGIES}[name]
    assert build.load_target(entry.target) is not None


def test_a_network_whose_output_does_not_match_the_classes_is_told_with_both_shapes() -> None:
    wrong = plan(
        contract={"task": "segmentation", "classes": ["a", "b", "c"]},
        transforms=None,
        network={"name": "UNet", "channels": [4, 8], "strides": [2]},
        loss={"name": "DiceLoss"},
        training={"input_size": [9, 9, 9], "local_steps": 1},
        evaluation={"metrics": ["Dice"]},
    )
    (problem,) = build.check_buildable(wrong)
    assert problem.location == ("network",)
    assert "9" in problem.message


@pytest.mark.parametrize(
    ("changes", "location", "told"),
    [
        ({"network": {"name": "DenseNet121", "growth": 3}}, ("network",), "growth"),
        ({"optimiser": {"name": "SGD", "lrr": 0.1}}, ("optimiser", "lrr"), "did you mean 'lr'"),
        ({"optimiser": {"name": "SGD", "lr": -1.0}}, ("optimiser",), "Invalid learning rate"),
        ({"loss": {"name": "CrossEntropyLoss", "smoothing": 0.1}}, ("loss", "smoothing"), "label_smoothing"),
        ({"tensors": {"local": ["0.*", "bn9.*"]}}, ("tensors", "local", 1), "names no tensor"),
        ({"strategy": {"name": "FedAvg", "server_lr": 99}}, ("strategy",), "server_lr"),
        ({"strategy": {"name": "FedAvg", "momentum": 0.9}}, ("strategy", "momentum"), "no parameter"),
        (
            {"transforms": {"prepare": [{"name": "Spacingd", "pixdims": [1, 1, 1]}]}},
            ("transforms", "prepare", 0, "pixdims"),
            "did you mean 'pixdim'",
        ),
    ],
)
def test_a_wrong_parameter_is_told_where_it_stands(
    changes: dict[str, object], location: tuple[str | int, ...], told: str
) -> None:
    (problem,) = build.check_buildable(plan(**changes))
    assert problem.location[: len(location)] == location
    assert told in f"{problem.message} {problem.remedy}"


def test_the_seed_gives_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = (build.shared_tensors(*build.initial_state(plan(seed=3))) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(np.array_equal(first[name], second[name]) for name in first)
    other = build.shared_tensors(*build.initial_state(plan(seed=4)))
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_running_statistics_stay_local_and_counters_never_travel() -> None:
    of = plan(network={"name": "ResNet10"}, training={"input_size": [16, 16, 8], "local_steps": 1})
    roles = build.initial_state(of)[1]
    assert {roles[name] for name in roles if "running" in name or "num_batches" in name} == {"local"}
    shared = changed(of, tensors={"shared": ["*running_mean", "*running_var", "*num_batches_tracked"]})
    roles = build.initial_state(shared)[1]
    assert {roles[name] for name in roles if "running" in name} == {"shared"}
    assert {roles[name] for name in roles if "num_batches" in name} == {"local"}


def test_a_frozen_tensor_wins_over_a_local_one() -> None:
    of = plan(tensors={"frozen": ["0.*"], "local": ["0.*", "1.*"]})
    roles = build.initial_state(of)[1]
    assert {role for name, role in roles.items() if name.startswith("0.")} == {"frozen"}
    assert {role for name, role in roles.items() if name.startswith("1.")} == {"local"}


def test_the_codes_of_the_classes_are_a_topic_on_which_sites_agree() -> None:
    def topic(codes: dict[str, list[str]]) -> str:
        return build.configuration(plan(contract__codes=codes), {})["codes"]

    mass, more = {"lesion": ["SCT:4147007"]}, {"lesion": ["SCT:4147007", "RADLEX:RID3874"]}
    assert topic(more) == topic({"lesion": ["RADLEX:RID3874", "SCT:4147007"]})
    assert len({topic({}), topic(mass), topic(more)}) == 3
