"""What a round costs when training costs nothing: 8 sites, a 1 MB model, the real round engine, agents and gate.

The sites' workers are replaced by one that returns an update at once; everything else is what runs in a simulation:
messages packed and unpacked, the update checked by the site's gate and by admission, folded, stepped, and committed to
the disk. Beside it, in the same run, the floor: the sum of eight models of that size and one flushed file.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from locum.common import build
from locum.common.durable import replace_file
from locum.common.envelope import CLAUSES, Readiness, seal_readiness
from locum.common.fab import build_bundle
from locum.common.messages import Tensors
from locum.common.plan import Plan, parse_plan
from locum.server.checkpoints import Checkpoints
from locum.server.home import Home
from locum.server.link import Direct
from locum.server.records import Events
from locum.server.rounds import open_engine, run
from locum.simulations.benchmarks.rows import Row
from locum.simulations.engines.local import LocalGrid
from locum.simulations.institutions import credentials_of, found_federation, secure_site
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy, Ready
from locum.site_client.secure import Credentials

_SITES, _ROUNDS = 8, 40

_PLAN = b"""
name: overhead
purpose: Measure what a round costs when training costs nothing.
contract: {task: classification, dimensions: 2, classes: [a, b]}
network: {name: Classifier, channels: [56, 112, 180], num_groups: 4}
loss: {name: CrossEntropyLoss}
optimiser: {name: SGD, lr: 0.1}
training: {input_size: [32, 32], local_steps: 1}
rounds: 40
participation: {quorum: 8, deadline: 60 s}
protection: {secure_aggregation: "off"}
evaluation: {metrics: [accuracy], every_rounds: 40}
"""


@dataclass
class _IdleWorker:
    """Answers at once: an update of zeros, the sums of one case."""

    description: dict[str, Any]

    def call(
        self, operation: str, plan: Plan, tensors: Tensors | None = None, **_request: Any
    ) -> tuple[dict[str, Any], Tensors]:
        """What a worker would answer, without doing anything."""
        if operation == "describe":
            return self.description, {}
        if operation == "train":
            update = {name: np.zeros_like(tensor) for name, tensor in (tensors or {}).items()}
            return {"steps": 1, "loss": 0.0, "cases": 1}, update
        return {"cases": 1}, {name: np.eye(2).ravel() for name in plan.evaluation.metrics}


def measure() -> list[Row]:
    """Milliseconds a round of the engine, and of the floor, medians of one run."""
    plan = parse_plan(_PLAN)
    model = build.shared_tensors(*build.initial_state(plan))
    size = sum(tensor.nbytes for tensor in model.values())
    with tempfile.TemporaryDirectory() as folder:
        seconds = _rounds(plan, model, Path(folder))
        floor = _floor(model, Path(folder))
    return [
        Row("model", size / 1e6, "MB"),
        Row("sites", _SITES, ""),
        Row("round, engine and agents", 1e3 * seconds, "ms"),
        Row("floor: sum of eight models and a flushed file", 1e3 * floor, "ms"),
        Row("round / floor", seconds / floor, "×"),
    ]


def _rounds(plan: Plan, model: Mapping[str, Any], folder: Path) -> float:
    with _engine(plan, model, folder) as engine:
        finished = run(engine)
    return statistics.median(record.seconds for record in finished.history[5:])


@contextmanager
def _engine(plan: Plan, model: Mapping[str, Any], folder: Path) -> Iterator[Any]:
    description = {
        "configuration": build.configuration(plan, model),
        "cases": {"train": 1, "validation": 1, "test": 1},
        "missing_classes": [],
        "able": True,
        "reason": "",
    }
    log, authority = logging.getLogger("locum.benchmark"), found_federation(folder)
    names = {node: f"site-{node}" for node in range(2, 2 + _SITES)}
    secure = {node: secure_site(folder / name, name, authority) for node, name in names.items()}
    agents = {
        node: Agent(
            name,
            Policy(),
            _IdleWorker(description),  # type: ignore[arg-type]
            log,
            secure[node],
            ready=partial(_ready, credentials_of(name, authority)),
        )
        for node, name in names.items()
    }
    grid = LocalGrid(agents, build_bundle(plan), 2)
    events = Events(folder / "events.jsonl")
    try:
        yield open_engine(plan, grid, Checkpoints(folder / "checkpoints", plan), events, Direct(Home(folder)))
    finally:
        events.close()
        grid.close()


def _ready(credentials: Credentials, plan: Plan, run: str) -> Ready:
    """What a site without images would say of its data if it had those that the plan asks for."""
    said = Readiness(
        site=credentials.site,
        run=run,
        plan=plan.digest,
        at=time.time(),
        ready=True,
        clauses=dict.fromkeys(CLAUSES, True),
        step=10,
    )
    return Ready(said, seal_readiness(said, credentials.key).decode())


def _floor(model: Mapping[str, Any], folder: Path) -> float:
    times = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        totals = {name: np.zeros(tensor.shape) for name, tensor in model.items()}
        for _ in range(_SITES):
            for name, tensor in model.items():
                totals[name] += 1.0 * tensor
        moved = {name: (model[name] + totals[name] / _SITES).astype(np.float32) for name in model}
        replace_file(folder / "floor", b"".join(tensor.tobytes() for tensor in moved.values()))
        times.append(time.perf_counter() - began)
    return statistics.median(times[5:])
