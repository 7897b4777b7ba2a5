"""One round of local training with differential privacy of patients: DP-SGD (Abadi et al., CCS 2016, algorithm 1).

A step draws each patient with probability q. What a patient gives is the gradient of the mean loss over some of its
images, clipped to the L2 norm C over all trainable tensors together, the local ones too. The sum of these gets Gaussian
noise of standard deviation σ·C and is divided by the number of patients expected, q·N. What the optimiser then does is
post-processing. A step that draws nobody is a step of noise.

Rules:
  * One patient's part never depends on another patient: each has its own gradient, and augmentation and dropout draw
    from seeds of the operating system, which nobody knows.
  * A gradient that is not finite counts as zero. A loss is looked at only for the site's own log.
  * A network that keeps statistics of what it saw, or normalises over a batch, is refused.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.overrides import TorchFunctionMode

from locum.common import build, names
from locum.common.errors import Code, SiteFailure
from locum.common.plan import DifferentialPrivacy, Plan
from locum.site_client.privacy.noise import NoiseSource
from locum.site_client.privacy.sampling import PoissonSampler, steps_of
from locum.site_client.training.data import Batch, People
from locum.site_client.training.train import Trained, schedule_factor, truth_of

if TYPE_CHECKING:
    from locum.site_client.training.canaries import Canaries

#: Patients whose gradients are computed at once, at most. On a CPU more are hardly faster, and take more memory.
_AT_ONCE = {"cpu": 4, "cuda": 16}
#: The most memory that the gradients of these may take.
_GRADIENT_BYTES = 1 << 30
#: Gradients are clipped a little below C: float32 sums of some hundred patients are rounded by less than that.
_CLOSE = 1 - 1e-3

#: What torch and MONAI raise where a network cannot be run for each patient apart.
_CANNOT = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Setting:
    """What the site's ledger has reserved for a round: σ, the noise multiplier, and q, the rate of drawing."""

    noise: float
    rate: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise > 0 and 0 < self.rate <= 1):
            raise ValueError(f"no setting of a private round: {self}")


def train_privately(
    plan: Plan,
    engine: Engine,
    people: People,
    *,
    round_number: int,
    setting: Setting,
    canaries: Canaries | None = None,
) -> Trained:
    """Trains the engine's network in place for one round; the loss told is the mean over the patients drawn.

    `canaries` are for a check (:mod:`locum.site_client.check`) whose update goes nowhere.

    Raises:
        SiteFailure: PRIVACY_REFUSED for a plan without differential privacy, DATA_UNREADABLE, LOSS_NOT_FINITE if the
            weights are not finite afterwards.
    """
    private = _private(plan)
    sampler = PoissonSampler(people.cases, setting.rate, private.images)
    noise = NoiseSource() if canaries is None else canaries.noise
    optimiser = build.optimiser(plan, engine.trainable.values(), schedule_factor(plan, round_number))
    engine.network.train()
    people.reseed()
    torch.manual_seed(int.from_bytes(os.urandom(8), "big"))
    losses: list[float] = []
    steps, expected = steps_of(plan, setting.rate), setting.rate * len(people.cases)
    for _ in range(steps):
        losses += engine.add(people.read(drawn) for drawn in sorted(sampler.draw(), key=len))
        if canaries is not None:
            canaries.join(engine)
        engine.release(noise, setting.noise * private.clip, expected=expected)
        if canaries is not None:
            canaries.watch(engine, expected=expected)
        optimiser.step()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in engine.trainable.values()):
        raise SiteFailure(Code.LOSS_NOT_FINITE, f"the weights are not finite after round {round_number}")
    finite = [loss for loss in losses if math.isfinite(loss)]
    return Trained(steps, sum(finite) / max(1, len(finite)))


def _private(plan: Plan) -> DifferentialPrivacy:
    if plan.private is None:
        raise SiteFailure(Code.PRIVACY_REFUSED, "the plan has no differential privacy")
    return plan.private


class Engine:
    """Sums clipped gradients of patients, and releases the sum with noise as the gradient of the network.

    Patients are computed side by side (`vmap`), or one after the other where the network cannot be mapped, as
    :func:`admitted` finds; both give the same numbers.
    """

    def __init__(self, plan: Plan, network: nn.Module, *, together: bool = True) -> None:
        self._plan, self.network, self._criterion = plan, network, build.loss(plan)
        self._clip = _private(plan).clip * _CLOSE
        self.trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._sizes = [parameter.numel() for parameter in self.trainable.values()]
        first = next(iter(self.trainable.values()))
        self._total = torch.zeros(sum(self._sizes), device=first.device)
        self._parts = dict(zip(self.trainable, torch.split(self._total, self._sizes), strict=True))
        self._at_once = max(1, min(_AT_ONCE[first.device.type], _GRADIENT_BYTES // self._total.nbytes))
        self.together = together

    def add(self, patients: Iterable[Batch]) -> list[float]:
        """Adds the clipped gradients of patients, each a batch of its images; returns their losses."""
        losses: list[float] = []
        for batches in self._chunks(patients):
            images = torch.stack([batch["image"] for batch in batches]).to(self._total.device)
            truth = torch.stack([truth_of(self._plan, batch, self._total.device) for batch in batches])
            gradients, values = self._gradients(images, truth)
            self._add_clipped([gradients[name].flatten(1) for name in self._parts])
            losses += values.tolist()
        return losses

    def add_rows(self, rows: torch.Tensor) -> None:
        """Adds patients whose gradients are given (patients × numbers of the network), clipped as all others are."""
        self._add_clipped(torch.split(rows.to(self._total.device), self._sizes, dim=1))

    def _chunks(self, patients: Iterable[Batch]) -> Iterable[list[Batch]]:
        """As many as are computed at once, all with the same number of images; reads no further than it must."""
        limit = self._at_once if self.together else 1
        for _, alike in groupby(patients, key=lambda batch: len(batch["image"])):
            held: list[Batch] = []
            for batch in alike:
                held.append(batch)
                if len(held) == limit:
                    yield held
                    held = []
            if held:
                yield held

    def _gradients(self, images: torch.Tensor, truth: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The gradient of each patient by tensor (patients × shape), and the losses (patients)."""
        parameters = {name: parameter.detach() for name, parameter in self.trainable.items()}
        of_one = grad_and_value(self._loss)
        if self.together:
            mapped: Callable[..., tuple[dict[str, torch.Tensor], torch.Tensor]] = vmap(
                of_one, in_dims=(None, 0, 0), randomness="different"
            )
            return mapped(parameters, images, truth)
        gradients, value = of_one(parameters, images[0], truth[0])
        return {name: gradient[None] for name, gradient in gradients.items()}, value[None]

    def _loss(self, parameters: Mapping[str, torch.Tensor], images: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        output = functional_call(self.network, dict(parameters), (images,))
        # A loss of one's own may rely on what it writes in place.
        with _OutOfPlace() if self._plan.loss.name in names.LOSSES else nullcontext():
            return self._criterion(build.scores_of(output).float(), truth)

    def _add_clipped(self, gradients: Sequence[torch.Tensor]) -> None:
        """Adds rows of gradients (patients × numbers), each multiplied by min(1, C/norm)."""
        norms = torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in gradients]).norm(dim=0)
        kept = torch.isfinite(norms)
        factors = (self._clip / norms[kept]).clamp(max=1.0)
        for part, rows in zip(self._parts.values(), gradients, strict=True):
            part.addmv_(rows.T if bool(kept.all()) else rows[kept].T, factors)

    def release(self, noise: NoiseSource, std: float, *, expected: float) -> None:
        """Sets the gradients of the network: the sum with noise, over the number of patients expected. Starts anew."""
        noised = torch.from_numpy(noise.noised(self._total.cpu().numpy(), std)).to(self._total.device)
        noised /= expected
        parts = torch.split(noised, self._sizes)
        for parameter, part in zip(self.trainable.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self._total.zero_()


class _OutOfPlace(TorchFunctionMode):
    """MONAI's losses write the truth of an image into a tensor of zeros; zeros that are no patient's cannot take it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls what is asked for, but scatters into a copy."""
        meant = torch.Tensor.scatter if func is torch.Tensor.scatter_ else func
        return meant(*args, **(kwargs or {}))


def admitted(plan: Plan, network: nn.Module, people: People) -> bool:
    """Whether patients can be computed side by side (else one after the other): found by real steps on a copy.

    Raises:
        SiteFailure: PRIVACY_REFUSED where the network can do neither, or keeps statistics of what it saw.
    """
    problem = build.privacy_problem(network)
    if problem:
        raise SiteFailure(Code.PRIVACY_REFUSED, problem)
    try:
        _try_step(plan, copy.deepcopy(network), people, together=True)
    except _CANNOT:
        try:
            _try_step(plan, copy.deepcopy(network), people, together=False)
        except _CANNOT as error:
            raise SiteFailure(Code.PRIVACY_REFUSED, f"no private step: {type(error).__name__}: {error}") from error
        return False
    return True


def _try_step(plan: Plan, network: nn.Module, people: People, *, together: bool) -> None:
    """One step of two patients; what it makes is thrown away."""
    private = _private(plan)
    network.train()
    engine = Engine(plan, network, together=together)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    engine.add(people.read(cases[: private.images]) for cases in people.cases[:2])
    engine.release(NoiseSource(), private.clip, expected=1.0)
    build.optimiser(plan, engine.trainable.values()).step()
    if not all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers()):
        raise SiteFailure(Code.PRIVACY_REFUSED, "a step changes buffers of the network: they are statistics of images")
