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

from locum.common.canonical import sha256_hex
from locum.common.errors import Code, PlanError, SiteFailure
from locum.common.fab import plan_of_bundle
from locum.common.messages import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    DescribeTask,
    EvaluateTask,
    H,
    MessageError,
    Tensors,
    TrainTask,
    unpack,
)
from locum.common.plan import Plan
from locum.site_client import gate
from locum.site_client.gate import Policy
from locum.site_client.worker import Worker


@dataclass
class Agent:
    """One site's agent.

    Attributes:
        site: the site's name.
        policy: what the site allows.
        worker: the process that holds data and torch.
        log: the site's own log.
    """

    site: str
    policy: Policy
    worker: Worker
    log: logging.Logger
    _plans: dict[str, Plan] = field(default_factory=dict)

    def handle(self, message: Message, bundle: bytes) -> Message:
        """Answers a message of the run that `bundle` belongs to; never raises for what arrives."""
        try:
            return Message(self._answer(message, bundle), reply_to=message)
        except SiteFailure as failure:
            self.log.warning("refused %s: %s", message.metadata.message_type, failure)
            return Message(gate.release_failure(failure), reply_to=message)
        except Exception:  # the edge of the site: whatever went wrong, its text stays here
            self.log.exception("failed on %s", message.metadata.message_type)
            return Message(gate.release_failure(SiteFailure(Code.INTERNAL)), reply_to=message)

    def _answer(self, message: Message, bundle: bytes) -> RecordDict:
        plan = self._plan(bundle)
        gate.admit_plan(self.policy, plan)
        answers: dict[str, Callable[[Plan, RecordDict], RecordDict]] = {
            DESCRIBE: self._describe,
            TRAIN: self._train,
            EVALUATE: self._evaluate,
        }
        kind = message.metadata.message_type
        if kind not in answers or not message.has_content():
            raise SiteFailure(Code.MESSAGE_UNREADABLE, f"message type {kind!r}")
        return answers[kind](plan, message.content)

    def _plan(self, bundle: bytes) -> Plan:
        key = sha256_hex(bundle)
        if key not in self._plans:
            try:
                self._plans[key] = plan_of_bundle(bundle)
            except PlanError as error:
                raise SiteFailure(Code.PLAN_UNREADABLE, str(error)) from error
        return self._plans[key]

    def _describe(self, plan: Plan, content: RecordDict) -> RecordDict:
        _read(content, DescribeTask, plan)
        found, _ = self.worker.call("describe", plan)
        return gate.release_description(self.policy, plan, self.site, found)

    def _train(self, plan: Plan, content: RecordDict) -> RecordDict:
        task, model = _read(content, TrainTask, plan)
        began = time.monotonic()
        done, update = self.worker.call("train", plan, model, round=task.round)
        done["seconds"] = time.monotonic() - began
        return gate.release_update(self.policy, plan, task, model=model, update=update, done=done)

    def _evaluate(self, plan: Plan, content: RecordDict) -> RecordDict:
        task, model = _read(content, EvaluateTask, plan)
        done, sums = self.worker.call("evaluate", plan, model, round=task.round, fold=task.fold)
        return gate.release_metrics(self.policy, plan, task, cases=done["cases"], sums=sums)


def _read(content: RecordDict, kind: type[H], plan: Plan) -> tuple[H, Tensors]:
    """A task and its tensors; raises SiteFailure (MESSAGE_UNREADABLE, PLAN_MISMATCH)."""
    try:
        task, tensors = unpack(content, kind)
    except MessageError as error:
        raise SiteFailure(Code.MESSAGE_UNREADABLE, str(error)) from error
    if task.plan_digest != plan.digest:
        raise SiteFailure(Code.PLAN_MISMATCH, task.plan_digest)
    return task, tensors
