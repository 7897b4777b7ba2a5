"""What a model says of the cases of a fold, as :class:`locum.common.metrics.Outcomes`.

Metrics are measured on the prepared image grid (after the plan's deterministic transforms); surface distances are in mm
of that grid's spacing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.metrics import compute_average_surface_distance, compute_dice
from monai.networks.utils import one_hot
from torch import nn

from locum.common import build
from locum.common.errors import Code, SiteFailure
from locum.common.metrics import Floats, Outcomes
from locum.common.plan import Plan
from locum.site_client.imaging.catalog import Case
from locum.site_client.training.data import Batch


def predict(plan: Plan, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Class probabilities: batch × classes (× space)."""
    if plan.contract.task == "segmentation" and plan.evaluation.sliding_window:
        scores: torch.Tensor = sliding_window_inference(
            images, plan.training.input_size, 4, lambda patch: build.logits(network, patch), overlap=0.25
        )
    else:
        scores = build.logits(network, images)
    return scores.float().softmax(dim=1)


def outcomes(
    plan: Plan, network: nn.Module, batches: Iterator[Batch] | Sequence[Batch], cases: Sequence[Case],
    device: torch.device,
) -> Outcomes:  # fmt: skip
    """Runs `network` over the batches of `cases`, in their order.

    Under differential privacy a probability that is not finite counts as that of a guess: a failure would tell, without
    noise, that some patient's image made it so, and who sends a model can choose which does.

    Raises:
        SiteFailure: LOSS_NOT_FINITE if a probability is not finite.
    """
    network.eval()
    measure = _measure_masks if plan.contract.task == "segmentation" else _measure_classes
    rows: list[tuple[Floats, Floats]] = []
    with torch.inference_mode():
        for batch in batches:
            probabilities = predict(plan, network, batch["image"].to(device)).cpu()
            finite = torch.isfinite(probabilities)
            if plan.private is not None:
                probabilities = probabilities.where(finite, 1 / len(plan.contract.classes))
            elif not finite.all():
                raise SiteFailure(Code.LOSS_NOT_FINITE, "a probability is not finite")
            rows.append(measure(plan, probabilities, batch))
    first, second = (np.concatenate(column) for column in zip(*rows, strict=True))
    patients = tuple(case.patient for case in cases)
    empty = np.zeros((0, 0))
    if plan.contract.task == "segmentation":
        return Outcomes(patients, np.zeros(0, np.int64), empty, first, second)
    return Outcomes(patients, first.astype(np.int64), second, empty, empty)


def _measure_classes(_plan: Plan, probabilities: torch.Tensor, batch: Batch) -> tuple[Floats, Floats]:
    return batch["label"].numpy().astype(np.float64), probabilities.double().numpy()


def _measure_masks(plan: Plan, probabilities: torch.Tensor, batch: Batch) -> tuple[Floats, Floats]:
    classes = len(plan.contract.classes)
    predicted = one_hot(probabilities.argmax(dim=1, keepdim=True), classes)
    truth = one_hot(batch["mask"].long(), classes)
    dice = compute_dice(predicted, truth, include_background=False, ignore_empty=False).double().numpy()
    dice[_both_empty(predicted, truth)] = np.nan
    if "surface_distance" not in plan.evaluation.metrics:
        return dice, np.full_like(dice, np.nan)
    spacing = [float(size) for size in batch["spacing"][0]]
    surface = compute_average_surface_distance(predicted, truth, symmetric=True, spacing=spacing).double().numpy()
    return dice, np.where(np.isfinite(surface), surface, np.nan)


def _both_empty(predicted: torch.Tensor, truth: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    either = (predicted + truth).flatten(2).sum(dim=2)[:, 1:]
    return (either == 0).numpy()
