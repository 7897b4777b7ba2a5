"""The `local` engine: the same ServerApp and the same agents, in one process, with an in-process Flower `Grid`.

Each site has its own agent and its own worker process; as many sites work at a time as there are cores. Nothing is
random here and sums are made in roster order, so a run is bit-identical however the operating system schedules it.

Flower's private parts used: `TaskIdentity`, which `Message` reads, and the message id that a SuperLink would set.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NoReturn, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from locum.server.app import app

_RUN_ID, _SERVER_NODE = 1, 1


class Answering(Protocol):
    """Who answers messages."""

    def handle(self, message: Message, bundle: bytes) -> Message:
        """The answer to a message of the run with this bundle."""


class LocalGrid(Grid):
    """Delivers messages to agents in this process, a few at a time, and to one agent one at a time.

    Args:
        agents: the agents by node id.
        bundle: the run's bundle, which every agent opens as a SuperNode's agent would.
        parallel: how many agents work at once.
    """

    def __init__(self, agents: Mapping[int, Answering], bundle: bytes, parallel: int) -> None:
        self._agents = dict(agents)
        self._bundle = bundle
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="site")
        self._turns = {node: Lock() for node in agents}
        self._replies: dict[str, Future[Message]] = {}
        self._ids = itertools.count(1)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _SERVER_NODE, 1

    def get_node_ids(self) -> list[int]:
        """The nodes of all agents."""
        return list(self._agents)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queues each message for its agent; returns the ids by which to pull the replies."""
        pushed = []
        for message in messages:
            number = f"m{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = number
            self._replies[number] = self._pool.submit(self._handled, message)
            pushed.append(number)
        return pushed

    def _handled(self, message: Message) -> Message:
        """An agent's answer, in its turn: a hospital's agent takes one message at a time, and relies on it."""
        node = message.metadata.dst_node_id
        with self._turns[node]:
            return self._agents[node].handle(message, self._bundle)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are ready, each once."""
        ready = [number for number in message_ids if number in self._replies and self._replies[number].done()]
        return [self._replies.pop(number).result() for number in ready]

    def close(self) -> None:
        """Drops what has not begun and waits for nothing."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def run(self) -> Run:
        """Information on the run; the local engine has one run and no registry of them."""
        return Run.create_empty(_RUN_ID)

    def set_run(self, run: Run) -> None:
        """A local grid serves one run from its start."""
        del run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> NoReturn:
        """Not offered: the round engine pushes and pulls, so that it can fold replies as they arrive."""
        del messages, timeout
        raise TypeError("use push_messages and pull_messages")


def run_local(agents: Mapping[int, Answering], bundle: bytes, run_dir: Path, parallel: int) -> None:
    """Runs the ServerApp over `agents` to the end of the plan in `run_dir`; raises RunError."""
    grid = LocalGrid(agents, bundle, parallel)
    context = Context(
        run_id=_RUN_ID,
        node_id=_SERVER_NODE,
        node_config={},
        state=RecordDict(),
        run_config={"run-dir": str(run_dir)},
    )
    try:
        app(grid, context)
    finally:
        grid.close()
