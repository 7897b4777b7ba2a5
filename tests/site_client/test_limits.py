"""What a worker takes of the site's machine: no more than the site allows."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from locum.common.errors import Code, SiteFailure
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker, _limit_gpu
from tests.plans import initial
from tests.site_client.asking import equal, plan

_LOG = logging.getLogger("tests.limits")


@pytest.fixture
def limited(settings: Settings) -> Iterator[Callable[..., Worker]]:
    """Makes workers with limits."""
    made: list[Worker] = []

    def make(**limits: Any) -> Worker:
        made.append(Worker(replace(settings, **limits), _LOG))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


def _train(worker: Worker, **changes: Any) -> dict[str, np.ndarray]:
    of = plan(**changes)
    return worker.call("train", of, initial(of), round=1)[1]


_BIG_IMAGE = {"transforms__prepare": [{"name": "Resized", "spatial_size": [700, 700, 700]}]}
_BIG_NETWORK = {"network": {"name": "Classifier", "channels": [4096, 8192]}}
_BIG_BATCH = {
    "transforms__prepare": [{"name": "Resized", "spatial_size": [64, 64, 64]}],
    "training__input_size": [64, 64, 64],
    "training__batch_size": 64,
    "network": {"name": "Classifier", "channels": [1024, 8]},
}


@pytest.mark.parametrize("changes", [_BIG_IMAGE, _BIG_NETWORK, _BIG_BATCH], ids=["image", "network", "batch"])
def test_memory_beyond_the_limit_has_its_own_code_and_the_worker_goes_on(
    changes: dict[str, Any], limited: Callable[..., Worker]
) -> None:
    worker = limited(memory_bytes=1 << 30)
    of, small = plan(**changes), plan()
    worker.call("describe", small)
    pid = worker.pid
    with pytest.raises(SiteFailure) as failed:
        worker.call("train", of, {} if changes is _BIG_NETWORK else initial(of), round=1)
    assert failed.value.code is Code.OUT_OF_MEMORY
    assert worker.call("train", small, initial(small), round=1)[0]["steps"] == 2
    assert worker.pid == pid


def test_a_large_model_takes_none_of_the_workers_memory_on_its_way(limited: Callable[..., Worker]) -> None:
    worker = limited(memory_bytes=768 << 20)
    with pytest.raises(SiteFailure, match="not those of the plan's network"):
        worker.call("train", plan(), {"w": np.zeros(400 << 20, np.uint8)}, round=1)
    pid = worker.pid
    assert len(_train(worker)) > 0
    assert worker.pid == pid


def test_limits_change_no_bit_of_an_update(limited: Callable[..., Worker]) -> None:
    cpu = min(os.sched_getaffinity(0))
    limits = {"cpus": (cpu,), "nice": 5, "memory_bytes": 4 << 30, "gpu_memory_fraction": 0.5, "device": "cpu"}
    assert equal(_train(limited()), _train(limited(**limits)))


def test_every_thread_of_a_worker_stays_on_its_cpus_and_steps_back(limited: Callable[..., Worker]) -> None:
    cpu = max(os.sched_getaffinity(0))
    worker = limited(cpus=(cpu,), nice=7, threads=2)
    _train(worker)
    assert worker.pid is not None
    threads = [int(path.name) for path in Path(f"/proc/{worker.pid}/task").iterdir()]
    assert len(threads) > 1
    assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {frozenset({cpu})}
    assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {7}
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0


def test_a_share_of_a_gpu_asks_for_no_gpu(limited: Callable[..., Worker]) -> None:
    assert len(_train(limited(gpu_memory_fraction=0.25))) > 0


@pytest.mark.parametrize(("device", "index"), [("auto", 3), ("cuda", 3), ("cuda:1", 1)])
def test_a_share_of_a_gpu_is_of_the_one_that_the_worker_uses(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *share: taken.append(share), raising=False)
    _limit_gpu(0.5, device)
    assert taken == [(0.5, index)]
