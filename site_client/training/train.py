"""One round of local training.

The optimiser is new every round (McMahan et al., AISTATS 2017, algorithm 1: ClientUpdate), so that a site carries
nothing from round to round but the tensors the plan calls local.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from locum.common import build
from locum.common.errors import Code, SiteFailure
from locum.common.plan import Plan
from locum.site_client.training.data import Batch


@dataclass(frozen=True)
class Trained:
    """What a round of training did: optimiser steps, and the mean loss over them."""

    steps: int
    loss: float


def schedule_factor(plan: Plan, round_number: int) -> float:
    """The learning rate of a round relative to the plan's (Loshchilov & Hutter, ICLR 2017, eq. 5, for `cosine`)."""
    if plan.training.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (round_number - 1) / plan.rounds))


def truth_of(plan: Plan, batch: Batch, device: torch.device) -> torch.Tensor:
    """The integer truth of a batch: batch × 1 (class) or batch × 1 × space (mask)."""
    if plan.contract.task == "segmentation":
        mask: torch.Tensor = batch["mask"].to(device)
        return mask
    labels: torch.Tensor = batch["label"].to(device)
    return labels[:, None]


def train(
    plan: Plan,
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    round_number: int,
    device: torch.device,
    frozen: Collection[str] = (),
) -> Trained:
    """Trains `network` in place over `batches`; the tensors named in `frozen` stay as they are.

    Raises:
        SiteFailure: LOSS_NOT_FINITE if the loss became NaN or infinite.
    """
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = build.optimiser(plan, trainable, schedule_factor(plan, round_number))
    criterion = build.loss(plan)
    precision, scaler = _precision(plan, device)
    _training_mode(network, frozen)
    total, steps = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        optimiser.zero_grad(set_to_none=True)
        with precision():
            scores = build.logits(network, batch["image"].to(device))
            loss = criterion(scores.float(), truth_of(plan, batch, device))
        torch.autograd.backward(scaler.scale(loss))
        if plan.training.gradient_clip is not None:
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(trainable, plan.training.gradient_clip)
        scaler.step(optimiser)
        scaler.update()
        total += loss.detach()
        steps += 1
    mean = float(total) / max(1, steps)
    if not math.isfinite(mean):
        raise SiteFailure(Code.LOSS_NOT_FINITE, f"mean loss {mean} in round {round_number}")
    return Trained(steps, mean)


def _training_mode(network: nn.Module, frozen: Collection[str]) -> None:
    """Training mode, but layers whose running statistics are frozen normalise with them, as in evaluation."""
    network.train()
    for layer in {name.rpartition(".")[0] for name in frozen if name.endswith(("running_mean", "running_var"))}:
        network.get_submodule(layer).eval()


def _precision(
    plan: Plan, device: torch.device
) -> tuple[Callable[[], AbstractContextManager[object]], torch.amp.GradScaler]:
    """What makes a step's autocast context, and the loss's scaler.

    Mixed precision is used on a GPU (bfloat16, or float16 where it has no other); on a CPU the same plan trains in
    float32.
    """
    dtype = None
    if plan.training.precision == "mixed" and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return nullcontext if dtype is None else partial(torch.autocast, "cuda", dtype), scaler
