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
from functools import partial
from typing import Any, TypeVar

from flwr.app import Message, RecordDict

from locum.common.activity import Activity
from locum.common.blobs import DISK_FULL
from locum.common.canonical import sha256_hex
from locum.common.errors import Code, PlanError, SiteFailure
from locum.common.fab import plan_of_bundle
from locum.common.messages import (
    BEGIN,
    DESCRIBE,
    EVALUATE,
    INLINE,
    KEYS,
    LOCAL,
    PAIRS,
    TRAIN,
    UNMASK,
    Arrays,
    BeginTask,
    DescribeTask,
    EvaluateTask,
    Fields,
    H,
    KeysTask,
    MessageError,
    Opener,
    PairsTask,
    TrainTask,
    UnmaskTask,
    pack,
    take_apart,
)
from locum.common.plan import Fold, Plan
from locum.common.secagg.roster import Context, Roster
from locum.common.secagg.upload import Layout
from locum.common.sums import metrics_layout, training_layout
from locum.site_client import gate
from locum.site_client.gate import Made, Masked, Policy, Ready, Release
from locum.site_client.privacy.budget import Budget, Reserved
from locum.site_client.privacy.ledger import LedgerError
from locum.site_client.secure import SecureSite
from locum.site_client.worker import Worker

M = TypeVar("M", TrainTask, EvaluateTask)
T = TypeVar("T", KeysTask, PairsTask, BeginTask)


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
        secure: the site's part in secure sums.
        admit: raises SiteFailure unless a plan may run here now.
        budget: what may be spent of the patients' privacy; without one, plans with differential privacy are refused.
        told: is told what the agent does, and in which round.
        seconds_left: how long the worker may take over a message; None for as long as it takes.
        ready: says whether the site's data meet a plan's contract, for a run; without it nothing is said of them.
    """

    site: str
    policy: Policy
    worker: Worker
    log: logging.Logger
    secure: SecureSite
    admit: Callable[[Policy, Plan], None] = gate.admit_plan
    budget: Budget | None = None
    told: Callable[[Activity, int], None] = _nobody
    seconds_left: Callable[[Message], float | None] = _endless
    ready: Callable[[Plan, str], Ready] | None = None
    _plan: tuple[str, Plan] | None = None

    def handle(self, message: Message, bundle: bytes, carrier: Opener = INLINE, *, run: str = LOCAL) -> Message:
        """Answers a message of the run that `bundle` belongs to; never raises for what arrives.

        `carrier` says how tensors come in and go out, `run` is the run's name.
        """
        try:
            return Message(self._answer(message, bundle, carrier, run), reply_to=message)
        except SiteFailure as failure:
            self.log.warning("refused %s: %s", message.metadata.message_type, failure)
            return Message(gate.release_failure(failure), reply_to=message)
        except Exception as error:  # the edge of the site: whatever went wrong, its text stays here
            self.log.exception("failed on %s", message.metadata.message_type)
            full = isinstance(error, OSError) and error.errno in DISK_FULL
            told = SiteFailure(Code.DISK_FULL if full else Code.INTERNAL)
            return Message(gate.release_failure(told), reply_to=message)

    def _answer(self, message: Message, bundle: bytes, carrier: Opener, run: str) -> RecordDict:
        plan = self.plan_of(bundle)
        self.admit(self.policy, plan)
        answers: dict[str, Callable[[_Task], Release]] = {
            DESCRIBE: self._describe,
            TRAIN: self._train,
            EVALUATE: self._evaluate,
            KEYS: self._keys,
            PAIRS: self._pairs,
            BEGIN: self._begin,
            UNMASK: self._unmask,
        }
        kind = message.metadata.message_type
        if kind not in answers or not message.has_content():
            raise SiteFailure(Code.MESSAGE_UNREADABLE, f"message type {kind!r}")
        released = answers[kind](_Task(plan, run, message.content, carrier, self.seconds_left(message)))
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
        ready = None if self.ready is None else self.ready(asked.plan, asked.run)
        found, _ = self.worker.call("describe", asked.plan, seconds=asked.seconds)
        if ready is not None and ready.said.failing:
            self.log.warning("the contract is not met: %s; see locum site readiness", ", ".join(ready.said.failing))
        return gate.release_description(self.policy, asked.plan, self.site, found, ready)

    def _train(self, asked: _Task) -> Release:
        task, context, model = self._opened(asked, TrainTask)
        began = time.monotonic()
        self.told("training", task.round)
        reserved = self._reserved(asked, task.round, "train")
        request = {"round": task.round, "start": task.start, "attempt": context.attempt if context else 1}
        done, update = self._asked_of_worker("train", asked, model, reserved, **request)
        made = Made(update, {**done, "seconds": time.monotonic() - began}, self._spend(reserved))
        if context is None:
            return gate.release_update(self.policy, asked.plan, task, model=model, made=made)
        masked = gate.mask_update(self.policy, asked.plan, model=model, made=made)
        size = sum(tensor.size for tensor in model.values())
        return self._given(asked, context, masked, partial(training_layout, asked.plan, size=size))

    def _evaluate(self, asked: _Task) -> Release:
        task, context, model = self._opened(asked, EvaluateTask)
        self.told("evaluating", task.round)
        made = self._measured(asked, task, model)
        if context is None:
            return gate.release_metrics(self.policy, asked.plan, task, made)
        masked = gate.mask_metrics(self.policy, asked.plan, task, made)
        return self._given(asked, context, masked, partial(metrics_layout, asked.plan, fold=task.fold))

    def _measured(self, asked: _Task, task: EvaluateTask, model: Arrays) -> Made:
        """The metric sums and the number of cases; in a secure sum nobody learns of a site that has none."""
        try:
            reserved = self._reserved(asked, task.round, task.fold)
            request = {"round": task.round, "fold": task.fold}
            done, sums = self._asked_of_worker("evaluate", asked, model, reserved, **request)
        except SiteFailure as failure:
            if failure.code is Code.NO_DATA and asked.plan.secured:
                return Made({}, {"cases": 0}, self._spend_nothing(asked, task))
            raise
        return Made(sums, done, self._spend(reserved))

    # --- privacy

    def _reserved(self, asked: _Task, round_number: int, purpose: Fold) -> Reserved | None:
        """What a step may use of a fold's patients; None if no noise is asked for, or nothing of the fold is released.

        Raises SiteFailure (PRIVACY_REFUSED, BUDGET_SPENT, NO_DATA).
        """
        plan = asked.plan
        if plan.private is None:
            self._note_unprotected(asked, round_number, purpose)
            return None
        if self.budget is None:
            raise SiteFailure(Code.PRIVACY_REFUSED, "this agent has no ledger")
        if purpose != "train" and not plan.released_metrics:
            return None
        found, _ = self.worker.call("patients", plan, seconds=asked.seconds)
        patients = found["patients"][purpose]
        made = self.budget.reserve(plan, run=asked.run, round_number=round_number, purpose=purpose, patients=patients)
        if made.reservation.of_lifetime > self.policy.warn_epsilon:
            spent, most = made.reservation.of_lifetime, self.policy.lifetime_epsilon
            self.log.warning("the ledger stands at epsilon %.3g of %g", spent, most)
        return made

    def _note_unprotected(self, asked: _Task, round_number: int, purpose: Fold) -> None:
        if self.budget is None:
            return
        try:
            self.budget.note_unprotected(asked.plan, run=asked.run, round_number=round_number, purpose=purpose)
        except LedgerError as error:
            self.log.warning("the ledger does not know of this run: %s; %s", error, error.remedy)

    def _asked_of_worker(
        self, operation: str, asked: _Task, model: Arrays, reserved: Reserved | None, **request: Any
    ) -> tuple[dict[str, Any], Arrays]:
        """What the worker answers; with differential privacy it tells no cases but patients, which are not protected.

        Raises SiteFailure, INTERNAL if the worker did more than was reserved.
        """
        if reserved is None:
            return self.worker.call(operation, asked.plan, model, seconds=asked.seconds, **request)
        private = reserved.request
        done, made = self.worker.call(operation, asked.plan, model, seconds=asked.seconds, private=private, **request)
        if done.get("steps", 1) > reserved.mechanism.steps:
            raise SiteFailure(Code.INTERNAL, f"{done['steps']} steps, {reserved.mechanism.steps} were reserved")
        return {**done, "cases": reserved.patients}, made

    def _spend_nothing(self, asked: _Task, task: EvaluateTask) -> gate.Spend:
        """Of a fold without a patient: a statement too, for whoever contributes makes one; its epsilon is 0."""
        if asked.plan.private is None or self.budget is None or not asked.plan.released_metrics:
            return gate.nothing_spent
        return partial(self.budget.nothing, asked.plan, run=asked.run, round_number=task.round, purpose=task.fold)

    def _spend(self, reserved: Reserved | None) -> gate.Spend:
        if reserved is None or self.budget is None:
            return gate.nothing_spent
        return partial(self.budget.commit, reserved)

    def _opened(self, asked: _Task, kind: type[M]) -> tuple[M, Context | None, Arrays]:
        """A task with its model, and what its sum is about if that is a secure one."""
        if not asked.plan.secured:
            task, model = asked.read(kind)
            return task, None, model
        task, fields = asked.take_apart(kind)
        context, key = self.secure.admit(asked.run, task)
        try:
            return task, context, asked.carrier.open(fields, key, context.model)
        except MessageError as error:
            raise SiteFailure(Code.SECURE_SUM_REFUSED, str(error)) from error

    # --- secure sums

    def _given(self, asked: _Task, context: Context, masked: Masked, layout: Callable[[Roster], Layout]) -> Release:
        tensors, signed = self.secure.give(asked.run, asked.plan, context, layout=layout, given=masked.given)
        return masked.release(tensors, signed)

    def _keys(self, asked: _Task) -> Release:
        return Release(self.secure.keys(asked.plan, asked.of_this_run(asked.read(KeysTask)[0])))

    def _pairs(self, asked: _Task) -> Release:
        task = asked.of_this_run(asked.read(PairsTask)[0])
        gate.admit_roster(self.policy, len(task.keys))
        return Release(self.secure.pairs(asked.plan, task, self.policy.min_sites))

    def _begin(self, asked: _Task) -> Release:
        return Release(self.secure.begin(asked.plan, asked.of_this_run(asked.read(BeginTask)[0])))

    def _unmask(self, asked: _Task) -> Release:
        task, boxes = asked.read(UnmaskTask)
        gate.admit_roster(self.policy, len(task.uploads))
        return Release(*self.secure.unmask(asked.run, asked.plan, task, boxes, self.policy.min_sites))


@dataclass(frozen=True)
class _Task:
    """A message's content, the plan and the run that it belongs to, and how long the worker may take over it."""

    plan: Plan
    run: str
    content: RecordDict
    carrier: Opener
    seconds: float | None

    def read(self, kind: type[H]) -> tuple[H, Arrays]:
        """The task and its tensors; raises SiteFailure (MESSAGE_UNREADABLE, PLAN_MISMATCH)."""
        task, fields = self.take_apart(kind)
        try:
            return task, self.carrier.fetch(fields)
        except MessageError as error:
            raise SiteFailure(Code.MESSAGE_UNREADABLE, str(error)) from error

    def take_apart(self, kind: type[H]) -> tuple[H, Fields]:
        """The task and the fields that carry or name its tensors; raises SiteFailure as :meth:`read`."""
        try:
            task, fields = take_apart(self.content, kind)
        except MessageError as error:
            raise SiteFailure(Code.MESSAGE_UNREADABLE, str(error)) from error
        if task.plan_digest != self.plan.digest:
            raise SiteFailure(Code.PLAN_MISMATCH, task.plan_digest)
        if isinstance(task, TrainTask | EvaluateTask) and task.round > self.plan.rounds:
            raise SiteFailure(Code.PLAN_MISMATCH, f"round {task.round} of a plan of {self.plan.rounds}")
        return task, fields

    def of_this_run(self, task: T) -> T:
        """A step of a set-up; raises SiteFailure unless it is of this run, and of a plan that asks for secure sums."""
        if task.run != self.run or not self.plan.secured:
            raise SiteFailure(Code.SECURE_SUM_REFUSED, f"a set-up of the run {task.run}")
        return task
