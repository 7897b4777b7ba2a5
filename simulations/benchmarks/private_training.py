"""A private step against a plain one, and against Opacus' hooks: time and memory, each in a process of its own.

Seconds are those of a processor with one thread, for a machine that does other work tells of little else. Memory is the
most that a process held above what it had with its libraries loaded. Every step has eight patients of one image each,
whose gradients are clipped, summed and noised, and an optimiser's step.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from locum.simulations.benchmarks.rows import Row

_PATIENTS, _STEPS = 8, 3
_CLIP, _NOISE = 1.0, 1.0
_NETWORKS: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "DenseNet121, 128 × 128": ("classification", [128, 128], {"name": "DenseNet121", "norm": "instance"}),
    "DenseNet121, 64 × 64 × 64": ("classification", [64, 64, 64], {"name": "DenseNet121", "norm": "instance"}),
    "UNet, 48 × 48 × 48": (
        "segmentation",
        [48, 48, 48],
        {"name": "UNet", "channels": [16, 32, 64, 128], "strides": [2, 2, 2], "num_res_units": 2},
    ),
}
_WAYS = ("plain", "locum", "opacus")


def measure() -> Iterator[Row]:
    """For each network, seconds and memory of the three, and their ratios."""
    for network in _NETWORKS:
        plain, ours, opacus = (_in_a_process(network, way) for way in _WAYS)
        yield Row(f"{network}: plain, seconds a step", plain["seconds"], "s")
        yield Row(f"{network}: private, seconds a step", ours["seconds"], "s")
        yield Row(f"{network}: Opacus, seconds a step", opacus["seconds"], "s")
        yield Row(f"{network}: private / plain", ours["seconds"] / plain["seconds"], "×")
        yield Row(f"{network}: private / Opacus", ours["seconds"] / opacus["seconds"], "×")
        yield Row(f"{network}: memory, private", ours["bytes"] / 2**20, "MiB")
        yield Row(f"{network}: memory, private / Opacus", ours["bytes"] / opacus["bytes"], "×")


def _in_a_process(network: str, way: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name, network, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - this module itself
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measured(network: str, way: str) -> dict[str, float]:
    """Seconds of a step (median, after one) and the memory above the libraries' (bytes)."""
    import torch
    import torch._dynamo  # an optimiser's first step would load it

    import locum.site_client.training.private  # noqa: F401 - libraries are loaded before memory is looked at

    if way == "opacus":
        import opacus  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step = {"plain": _plain, "locum": _ours, "opacus": _opacus}[way](network)
    step()
    seconds = []
    for _ in range(_STEPS):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds), "bytes": peak - before}


def _plan(network: str) -> Any:
    from locum.common.plan import parse_plan

    task, size, part = _NETWORKS[network]
    segmentation = task == "segmentation"
    content = {
        "name": "private-training",
        "purpose": "to measure a private step",
        "contract": {"task": task, "dimensions": len(size), "classes": ["background", "organ"]},
        "network": part,
        "loss": {"name": "DiceCELoss" if segmentation else "CrossEntropyLoss"},
        "optimiser": {"name": "SGD", "lr": 0.01},
        "training": {"input_size": size, "batch_size": _PATIENTS, "local_steps": 1},
        "rounds": 1,
        "protection": {"differential_privacy": {"epsilon": 8, "delta": 1e-5, "clip": _CLIP}},
        "evaluation": {"metrics": ["Dice" if segmentation else "accuracy"]},
        "release": {"training_loss": False, "metrics": []},
    }
    return parse_plan(json.dumps(content).encode())


def _batch(network: str) -> dict[str, Any]:
    import torch

    task, size, _ = _NETWORKS[network]
    images = torch.randn(_PATIENTS, 1, *size)
    if task == "segmentation":
        return {"image": images, "mask": torch.randint(0, 2, images.shape).float()}
    return {"image": images, "label": torch.arange(_PATIENTS) % 2}


def _ours(network: str) -> Callable[[], None]:
    from locum.common import build
    from locum.site_client.privacy.noise import NoiseSource
    from locum.site_client.training.private import Engine

    plan = _plan(network)
    built = build.initial_state(plan)[0].train()
    engine, noise, batch = Engine(plan, built), NoiseSource(), _batch(network)
    optimiser = build.optimiser(plan, engine.trainable.values())
    patients = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(_PATIENTS)]

    def step() -> None:
        engine.add(patients)
        engine.release(noise, _NOISE * _CLIP, expected=_PATIENTS)
        optimiser.step()

    return step


def _plain(network: str) -> Callable[[], None]:
    from locum.common import build

    plan = _plan(network)
    built = build.initial_state(plan)[0].train()
    return _step_of(network, built, build.optimiser(plan, built.parameters()))


def _opacus(network: str) -> Callable[[], None]:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    from locum.common import build

    plan = _plan(network)
    built = GradSampleModule(build.initial_state(plan)[0].train())
    optimiser = DPOptimizer(
        build.optimiser(plan, built.parameters()),
        noise_multiplier=_NOISE,
        max_grad_norm=_CLIP,
        expected_batch_size=_PATIENTS,
    )
    return _step_of(network, built, optimiser)


def _step_of(network: str, built: Any, optimiser: Any) -> Callable[[], None]:
    """A step as any training loop has it."""
    import torch

    from locum.common import build
    from locum.site_client.training.train import truth_of

    plan, batch = _plan(network), _batch(network)
    criterion, truth = build.loss(plan), truth_of(plan, batch, torch.device("cpu"))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(criterion(build.logits(built, batch["image"]), truth))
        optimiser.step()

    return step


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))  # noqa: T201 - to the process that asked
