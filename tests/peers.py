"""Sites that speak the protocol over the local grid and can be told to misbehave, one method each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import Error, Message, RecordDict

from locum.common import build
from locum.common.fab import build_bundle, plan_of_bundle
from locum.common.messages import (
    DESCRIBE,
    INLINE,
    TRAIN,
    Carrier,
    DescribeTask,
    Description,
    EvaluateResult,
    EvaluateTask,
    Tensors,
    TrainResult,
    TrainTask,
    pack,
    unpack,
)
from locum.common.plan import Plan
from locum.server.checkpoints import Checkpoints
from locum.server.home import Home
from locum.server.link import Direct
from locum.server.records import Events
from locum.server.rounds import Finished, open_engine, run
from locum.simulations.engines.local import LocalGrid
from locum.simulations.institutions import found_federation
from tests.plans import initial

Answer = RecordDict | Error


class Peer:
    """A site whose update is `value` everywhere, with weight `weight`; override a method to misbehave.

    `ready` makes its signed statement of readiness, where it has a key.
    """

    def __init__(self, site: str, value: float = 1.0, weight: float = 1.0) -> None:
        self.site, self.value, self.weight = site, value, weight
        self.trained: list[int] = []
        self.carrier: Carrier = INLINE
        self.ready: Callable[[Plan], str] | None = None
        self.model: Tensors | None = None

    def handle(self, message: Message, bundle: bytes, carrier: Carrier = INLINE) -> Message:
        self.carrier = carrier
        plan = plan_of_bundle(bundle)
        handlers: dict[str, Callable[[Plan, RecordDict], Answer]] = {DESCRIBE: self.describe, TRAIN: self.train}
        answer = handlers.get(message.metadata.message_type, self.evaluate)(plan, message.content)
        return Message(answer, reply_to=message)

    def describe(self, plan: Plan, content: RecordDict) -> Answer:
        unpack(content, DescribeTask)
        return pack(self.description(plan))

    def description(self, plan: Plan) -> Description:
        return Description(
            plan_digest=plan.digest,
            site=self.site,
            configuration=build.configuration(plan, self.model or initial(plan)),
            cases={"train": 8, "validation": 1, "test": 2},
            able=True,
            readiness=None if self.ready is None else self.ready(plan),
        )

    def train(self, plan: Plan, content: RecordDict) -> Answer:
        task, model = unpack(content, TrainTask, self.carrier)
        self.trained.append(task.round)
        return pack(self.header(plan, task), self.update(model), self.carrier)

    def header(self, plan: Plan, task: TrainTask) -> TrainResult:
        return TrainResult(
            plan_digest=plan.digest, round=task.round, weight=self.weight, steps=1, loss=0.5, seconds=0.0
        )

    def update(self, model: Tensors) -> Tensors:
        return {name: np.full_like(tensor, self.value) for name, tensor in model.items()}

    def evaluate(self, plan: Plan, content: RecordDict) -> Answer:
        task, _ = unpack(content, EvaluateTask, self.carrier)
        cases = len(plan.contract.classes)
        header = EvaluateResult(plan_digest=plan.digest, round=task.round, fold=task.fold, cases=cases)
        return pack(header, self.sums(plan, task))

    def sums(self, plan: Plan, task: EvaluateTask) -> Tensors:
        classes = len(plan.contract.classes)
        histogram = np.zeros((classes, 2, 1024))
        histogram[1, 0, 100], histogram[1, 1, 400] = 1, 1
        return {"AUC": histogram.ravel(), "accuracy": np.eye(classes).ravel()}


class Spoiler(Peer):
    """A peer whose update is passed through `spoil` first."""

    def __init__(self, site: str, spoil: Callable[[Tensors], Tensors]) -> None:
        super().__init__(site)
        self.spoil = spoil

    def update(self, model: Tensors) -> Tensors:
        return self.spoil(super().update(model))


class Mute(Peer):
    """A peer that answers everything but training, in the rounds named (all if none is)."""

    def __init__(self, site: str, seconds: float, rounds: tuple[int, ...] = ()) -> None:
        super().__init__(site)
        self.seconds, self.rounds = seconds, rounds

    def train(self, plan: Plan, content: RecordDict) -> Answer:
        task, _ = unpack(content, TrainTask, self.carrier)
        if not self.rounds or task.round in self.rounds:
            time.sleep(self.seconds)
        return super().train(plan, content)


class Failing(Peer):
    """A peer that answers training with an error, as Flower carries it."""

    def __init__(self, site: str, code: int, reason: str) -> None:
        super().__init__(site)
        self.error = Error(code=code, reason=reason)

    def train(self, plan: Plan, content: RecordDict) -> Answer:
        return self.error


def run_peers(plan: Plan, peers: list[Peer], folder: Path) -> Finished:
    """Runs the real round engine over peers, with checkpoints, events and log in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found_federation(folder)
    agents = dict(enumerate(peers, start=2))
    grid = LocalGrid(agents, build_bundle(plan), len(peers))  # type: ignore[arg-type]
    events = Events(folder / "events.jsonl")
    try:
        return run(open_engine(plan, grid, Checkpoints(folder / "checkpoints", plan), events, Direct(Home(folder))))
    finally:
        events.close()
        grid.close()
