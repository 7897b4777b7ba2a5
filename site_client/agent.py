"""The agent: answers the coordinator's messages for one site.

One message in, one reply out:
  1. read the bundle's plan (as data), and check that the message belongs to it;
  2. ask the policy gate;
  3. let the worker do it;
  4. send out only what the release gate makes of it. A failure leaves as type and code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from locum.common.activity import Activity
from locum.common.canonical import sha256_hex
from locum.common.errors import Code, PlanError, SiteFailure
from locum.common.fab import plan_of_bundle
from locum.common.messages import (
    DESCRIBE,
    EVALUATE,
    INLINE,
    TRAIN,
    Arrays,
    Carrier,
    DescribeTask,
    EvaluateTask,
    H,
    MessageError,
    TrainTask,
    pack,
    unpack,
)
from locum.common.plan import Plan
from locum.site_client import gate
from locum.site_client.gate import Policy, Release
from locum.site_client.worker import Worker


def _nobody(_activity: Activity, _round: int) -> None:
    """Nobody is told."""


def _endless(_message: Message) -> None:
    """No time is set."""


@dataclass
class Agent:
    """One site's agent.

    Attributes:
        site: the site's name.
        policy: what the site allows.
        worker: the process that holds data and torch.
        log: the site's own log.
        admit: raises SiteFailure unless a plan may run here now.
        told: is told what the agent does, and in which round.
        seconds_left: how long the worker may take over a message; None for as long as it takes.
    """

    site: str
    policy: Policy
    worker: Worker
    log: logging.Logger
    admit: Callable[[Policy, Plan], None] = gate.admit_plan
    told: Callable[[Activity, int], None] = _nobody
    seconds_left: Callable[[Message], float | None] = _endless
    _plan: tuple[str, Plan] | None = None

    def handle(self, message: Message, bundle: bytes, carrier: Carrier = INLINE) -> Message:
        """Answers a message of the run that `bundle` belongs to; never raises for what arrives.

        `carrier` says how tensors come in and go out.
        """
        try:
            return Message(self._answer(message, bundle, carrier), reply_to=message)
        except SiteFailure as failure:
            self.log.warning("refused %s: %s", message.metadata.message_type, failure)
            return Message(gate.release_failure(failure), reply_to=message)
        except Exception:  # the edge of the site: whatever went wrong, its text stays here
            self.log.exception("failed on %s", message.metadata.message_type)
            return Message(gate.release_failure(SiteFailure(Code.INTERNAL)), reply_to=message)

    def _answer(self, message: Message, bundle: bytes, carrier: Carrier) -> RecordDict:
        plan = self.plan_of(bundle)
        self.admit(self.policy, plan)
        answers: dict[str, Callable[[_Task], Release]] = {
            DESCRIBE: self._describe,
            TRAIN: self._train,
            EVALUATE: self._evaluate,
        }
        kind = message.metadata.message_type
        if kind not in answers or not message.has_content():
            raise SiteFailure(Code.MESSAGE_UNREADABLE, f"message type {kind!r}")
        released = answers[kind](_Task(plan, message.content, carrier, self.seconds_left(message)))
        return pack(released.header, released.tensors, carrier)

    def plan_of(self, bundle: bytes) -> Plan:
        """The plan of a bundle, the same object while bundles are the same; raises SiteFailure (PLAN_UNREADABLE)."""
        key = sha256_hex(bundle)
        if self._plan is None or self._plan[0] != key:
            try:
                self._plan = key, plan_of_bundle(bundle)
            except PlanError as error:
                raise SiteFailure(Code.PLAN_UNREADABLE, str(error)) from error
        return self._plan[1]

    def _describe(self, asked: _Task) -> Release:
        asked.read(DescribeTask)
        found, _ = self.worker.call("describe", asked.plan, seconds=asked.seconds)
        return gate.release_description(self.policy, asked.plan, self.site, found)

    def _train(self, asked: _Task) -> Release:
        task, model = asked.read(TrainTask)
        began = time.monotonic()
        self.told("training", task.round)
        done, update = self.worker.call("train", asked.plan, model, seconds=asked.seconds, round=task.round)
        done["seconds"] = time.monotonic() - began
        return gate.release_update(self.policy, asked.plan, task, model=model, update=update, done=done)

    def _evaluate(self, asked: _Task) -> Release:
        task, model = asked.read(EvaluateTask)
        self.told("evaluating", task.round)
        request = {"round": task.round, "fold": task.fold}
        done, sums = self.worker.call("evaluate", asked.plan, model, seconds=asked.seconds, **request)
        return gate.release_metrics(self.policy, asked.plan, task, cases=done["cases"], sums=sums)


@dataclass(frozen=True)
class _Task:
    """A message's content, the plan that it belongs to, and how long the worker may take over it."""

    plan: Plan
    content: RecordDict
    carrier: Carrier
    seconds: float | None

    def read(self, kind: type[H]) -> tuple[H, Arrays]:
        """The task and its tensors; raises SiteFailure (MESSAGE_UNREADABLE, PLAN_MISMATCH)."""
        try:
            task, tensors = unpack(self.content, kind, self.carrier)
        except MessageError as error:
            raise SiteFailure(Code.MESSAGE_UNREADABLE, str(error)) from error
        if task.plan_digest != self.plan.digest:
            raise SiteFailure(Code.PLAN_MISMATCH, task.plan_digest)
        if isinstance(task, TrainTask | EvaluateTask) and task.round > self.plan.rounds:
            raise SiteFailure(Code.PLAN_MISMATCH, f"round {task.round} of a plan of {self.plan.rounds}")
        return task, tensors
