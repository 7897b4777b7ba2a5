"""Sites of a secure run over the local grid: a real agent each, with keys and a vault of its own, whose worker gives
what a test has chosen. They can be told to misbehave, one method each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Error, Message

from locum.common import build
from locum.common.fab import build_bundle
from locum.common.messages import (
    BEGIN,
    EVALUATE,
    KEYS,
    LOCAL,
    PAIRS,
    TRAIN,
    UNMASK,
    Arrays,
    EvaluateTask,
    Tensors,
    TrainTask,
    parse_header,
)
from locum.common.plan import Plan
from locum.common.secagg.roster import Context, verified
from locum.common.secagg.site import Ready
from locum.common.sums import metric_lengths
from locum.server.checkpoints import Checkpoints
from locum.server.home import Home
from locum.server.link import Direct
from locum.server.records import Events
from locum.server.rounds import Finished, open_engine, run
from locum.simulations.engines.local import LocalGrid
from locum.simulations.institutions import Federation, credentials_of, found_federation, secure_site
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy
from tests.plans import initial
from tests.readiness import ready

#: Threads a site: one that does not answer keeps one busy, as a lost message does not.
_THREADS = 4


class SecurePeer:
    """A site whose update is `value` everywhere, and which has `cases`; override a method to misbehave.

    `failing` are clauses of the contract that its data do not meet.
    `contexts` are those of the sums that it was asked for, `trained` the rounds and attempts that it has trained.
    """

    def __init__(self, site: str, value: float = 0.1, cases: int = 8, policy: Policy | None = None) -> None:
        self.site, self.value, self.cases, self.policy = site, value, cases, policy or Policy()
        self.failing: tuple[str, ...] = ()
        self.contexts: list[Context] = []
        self.trained: list[tuple[int, int]] = []

    def join(self, folder: Path, federation: Federation) -> None:
        """Gives the site an agent with a certificate of the federation."""
        self.federation = federation
        secure = secure_site(folder / "sites" / self.site / "secagg", self.site, federation)
        log = logging.getLogger(f"locum.test.{self.site}")
        self.agent = Agent(
            self.site,
            self.policy,
            _Worker(self),  # type: ignore[arg-type]
            log,
            secure,
            ready=lambda plan, run: ready(
                plan, self.site, credentials_of(self.site, federation).key, run, self.failing
            ),
        )

    @property
    def ready(self) -> Ready:
        """What it keeps of the set-up that holds."""
        state = self.agent.secure.vault.state(LOCAL)
        assert isinstance(state, Ready)
        return state

    # --- messages

    def handle(self, message: Message, bundle: bytes) -> Message:
        """Answers a message as the agent does; each kind can be answered in another way."""
        answers: dict[str, Callable[[Message, bytes], Message]] = {
            KEYS: self.keys,
            PAIRS: self.pairs,
            BEGIN: self.begin,
            TRAIN: self.train,
            EVALUATE: self.evaluate,
            UNMASK: self.unmask,
        }
        kind = message.metadata.message_type
        if kind in {TRAIN, EVALUATE}:
            self.contexts.append(self._context(message, TrainTask if kind == TRAIN else EvaluateTask))
        return answers.get(kind, self.answer)(message, bundle)

    def _context(self, message: Message, kind: type[TrainTask | EvaluateTask]) -> Context:
        content = message.content.config_records["locum"]["json"]
        assert isinstance(content, bytes)
        task = parse_header(content, kind)
        assert task.secured is not None
        return verified(task.secured.context, Context, self.federation.log)

    def answer(self, message: Message, bundle: bytes) -> Message:
        """The agent's own answer."""
        return self.agent.handle(message, bundle)

    keys = pairs = begin = train = evaluate = unmask = answer

    # --- what the worker does

    def update(self, model: Arrays) -> Tensors:
        """The change to the weights."""
        return {name: np.full_like(tensor, self.value) for name, tensor in model.items()}

    def loss(self, _round_number: int) -> float:
        """The mean training loss."""
        return 0.5

    def sums(self, plan: Plan, _request: dict[str, Any]) -> Tensors:
        """The metric sums of a fold."""
        return {name: np.arange(length, dtype=float) % 7 for name, length in metric_lengths(plan, "validation").items()}

    def cells(self, _request: dict[str, Any]) -> dict[str, list[int]]:
        """By cell of the plan's subgroups, the numbers of its patients."""
        return {}


class _Worker:
    """Answers as a site's worker does (see `site_client/operations.py`)."""

    def __init__(self, peer: SecurePeer) -> None:
        self._peer = peer

    def call(
        self, operation: str, plan: Plan, tensors: Arrays | None = None, **request: Any
    ) -> tuple[dict[str, Any], Arrays]:
        peer = self._peer
        if operation == "describe":
            cases = {"train": peer.cases, "validation": peer.cases, "test": peer.cases}
            return {"configuration": build.configuration(plan, initial(plan)), "cases": cases, "missing_classes": [],
                    "able": True, "reason": ""}, {}  # fmt: skip
        if operation == "train":
            peer.trained.append((request["round"], request["attempt"]))
            return {"steps": 1, "loss": peer.loss(request["round"]), "cases": peer.cases}, peer.update(tensors or {})
        return {"cases": peer.cases, "cells": peer.cells(request)}, peer.sums(plan, request)


def failed(message: Message, code: int) -> Message:
    """An error reply, as Flower carries it."""
    return Message(Error(code=code, reason=""), reply_to=message)


def run_secure(plan: Plan, peers: Sequence[SecurePeer], folder: Path) -> Finished:
    """Runs the real round engine over peers, with checkpoints and events in `folder`, which has a new authority."""
    folder.mkdir(parents=True, exist_ok=True)
    federation = found_federation(folder)
    for peer in peers:
        peer.join(folder, federation)
    agents = dict(enumerate(peers, start=2))
    grid = LocalGrid(agents, build_bundle(plan), _THREADS * len(peers))  # type: ignore[arg-type]
    events = Events(folder / "events.jsonl")
    try:
        checkpoints = Checkpoints(folder / "checkpoints", plan)
        return run(open_engine(plan, grid, checkpoints, events, Direct(Home(folder))))
    finally:
        events.close()
        grid.close()
