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
from dataclasses import dataclass, field

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
    """

    site: str
    policy: Policy
    worker: Worker
    log: logging.Logger
    admit: Callable[[Policy, Plan], None] = gate.admit_plan
    told: Callable[[Activity, int], None] = _nobody
    _plans: dict[str, Plan] = field(default_factory=dict)

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
        plan = self._plan(bundle)
        self.admit(self.policy, plan)
        answers: dict[str, Callable[[_Task], Release]] = {
            DESCRIBE: self._describe,
            TRAIN: self._train,
            EVALUATE: self._evaluate,
        }
        kind = message.metadata.message_type
        if kind not in answers or not message.has_content():
            raise SiteFailure(Code.MESSAGE_UNREADABLE, f"message type {kind!r}")
        released = answers[kind](_Task(plan, message.content, carrier))
        return pack(released.header, released.tensors, carrier)

    def _plan(self, bundle: bytes) -> Plan:
        key = sha256_hex(bundle)
        if key not in self._plans:
            try:
                self._plans[key] = plan_of_bundle(bundle)
            except PlanError as error:
                raise SiteFailure(Code.PLAN_UNREADABLE, str(error)) from error
        return self._plans[key]

    def _describe(self, asked: _Task) -> Release:
        asked.read(DescribeTask)
        found, _ = self.worker.call("describe", asked.plan)
        return gate.release_description(self.policy, asked.plan, self.site, found)

    def _train(self, asked: _Task) -> Release:
        task, model = asked.read(TrainTask)
        began = time.monotonic()
        self.told("training", task.round)
        done, update = self.worker.call("train", asked.plan, model, round=task.round)
        done["seconds"] = time.monotonic() - began
        return gate.release_update(self.policy, asked.plan, task, model=model, update=update, done=done)

    def _evaluate(self, asked: _Task) -> Release:
        task, model = asked.read(EvaluateTask)
        self.told("evaluating", task.round)
        done, sums = self.worker.call("evaluate", asked.plan, model, round=task.round, fold=task.fold)
        return gate.release_metrics(self.policy, asked.plan, task, cases=done["cases"], sums=sums)


@dataclass(frozen=True)
class _Task:
    """A message's content, and the plan that it belongs to."""

    plan: Plan
    content: RecordDict
    carrier: Carrier

    def read(self, kind: type[H]) -> tuple[H, Arrays]:
        """The task and its tensors; raises SiteFailure (MESSAGE_UNREADABLE, PLAN_MISMATCH)."""
        try:
            task, tensors = unpack(self.content, kind, self.carrier)
        except MessageError as error:
            raise SiteFailure(Code.MESSAGE_UNREADABLE, str(error)) from error
        if task.plan_digest != self.plan.digest:
            raise SiteFailure(Code.PLAN_MISMATCH, task.plan_digest)
        return task, tensors
