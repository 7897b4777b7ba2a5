"""The site's part in secure sums, as answers to messages: keys, roster, halves of secrets, uploads, shares.

Rules:
  * The protocol is in `common/secagg`; this module keeps its state, on the disk before anything leaves.
  * A task is admitted only under a context that the coordinator has signed; a model is used only if it is, to the byte,
    the one that the context names (see :mod:`locum.site_client.carrier`).
  * A refusal leaves as a code; which check failed stands in the site's log.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from locum.common.errors import Code, SiteFailure
from locum.common.identity import base64url_bytes, certificate_pem
from locum.common.messages import (
    Arrays,
    BeginResult,
    BeginTask,
    EvaluateTask,
    KeysResult,
    KeysTask,
    PairsResult,
    PairsTask,
    TrainTask,
    UnmaskResult,
    UnmaskTask,
)
from locum.common.plan import Plan
from locum.common.secagg import site
from locum.common.secagg.masks import SEED_BYTES, Stream
from locum.common.secagg.ring import RingError
from locum.common.secagg.roster import Context, Roster, SecureRefusal, Trust, verified
from locum.common.secagg.site import Announced, Joined, Offer, Ready, Request
from locum.common.secagg.upload import Given, Layout, masked
from locum.common.sums import most_noised
from locum.common.tensor_files import Sendable
from locum.site_client.vault import Vault


@dataclass(frozen=True)
class Credentials:
    """Who the site is, and whom it believes."""

    site: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    trust: Trust


#: The random numbers by which an update is rounded and of which its noise is made: of a plan's site, context and
#: nothing else, or of the system.
Rounding = Callable[[Plan, str, Context], Stream]


def drawn(_plan: Plan, _site: str, _context: Context) -> Stream:
    """From the operating system: between hospitals."""
    return Stream(secrets.token_bytes(SEED_BYTES))


def seeded(plan: Plan, name: str, context: Context) -> Stream:
    """From the plan's seed: in a simulation, which is to give the same bits again."""
    text = f"locum rounding\0{plan.seed}\0{name}\0{context.sum}"
    return Stream(hashlib.sha256(text.encode()).digest())


@dataclass(frozen=True)
class SecureSite:
    """One site's part.

    Attributes:
        folder: where its state lies.
        credentials: reads key and certificates; renewal replaces the certificate.
        now: the time, by the coordinator's clock.
        rounding: where the random numbers for rounding and noise come from.
    """

    folder: Path
    credentials: Callable[[], Credentials]
    now: Callable[[], datetime]
    rounding: Rounding = drawn

    @cached_property
    def vault(self) -> Vault:
        """What is kept."""
        return Vault(self.folder)

    # --- set-up

    def keys(self, plan: Plan, task: KeysTask) -> KeysResult:
        """New keys for a set-up; those of the one before are gone."""
        we = self.credentials()
        state, envelope = site.announce(task.run, plan.digest, site=we.site, key=we.key)
        self.vault.keep(task.run, state)
        certificate = certificate_pem(we.certificate).decode()
        return KeysResult(plan_digest=plan.digest, keys=envelope, certificate=certificate)

    def pairs(self, plan: Plan, task: PairsTask, least: int) -> PairsResult:
        """This site's halves of the pairs' secrets; `least` is its own least number of sites."""
        state, we = self.vault.state(task.run), self.credentials()
        if not isinstance(state, Announced):
            raise SiteFailure(Code.SETUP_UNKNOWN, "a roster came without keys of this site before it")
        offer = Offer(task.roster, task.keys, task.certificates)
        with _refusals():
            joined, pairs = site.join(state, offer, trust=we.trust, least=least, key=we.key, now=self.now())
        self.vault.keep(task.run, joined)
        return PairsResult(plan_digest=plan.digest, pairs=pairs)

    def begin(self, plan: Plan, task: BeginTask) -> BeginResult:
        """The peers' halves are here: from now on this site takes part in sums."""
        state = self.vault.state(task.run)
        if not isinstance(state, Joined):
            raise SiteFailure(Code.SETUP_UNKNOWN, "halves of secrets came without a roster before them")
        with _refusals():
            ready = site.begin(state, task.pairs)
        self.vault.keep(task.run, ready)
        return BeginResult(plan_digest=plan.digest, roster=ready.roster.digest)

    # --- a sum

    def admit(self, run: str, task: TrainTask | EvaluateTask) -> tuple[Context, bytes]:
        """What a task is about, signed by the coordinator, and the content key of its model; raises SiteFailure."""
        if task.secured is None:
            raise SiteFailure(Code.SECURE_SUM_REFUSED, "the plan asks for secure sums, and the task is none")
        we = self.credentials()
        with _refusals():
            context = verified(task.secured.context, Context, we.trust.log)
            state = self._ready(run, task.plan_digest, context)
            purpose = "train" if isinstance(task, TrainTask) else task.fold
            if (context.purpose, context.round) != (purpose, task.round):
                raise SecureRefusal("the context is of another task")
            site.check_context(state, context)
            return context, site.model_key(state, context.model, _decoded(task.secured.keys.get(we.site, "")))

    def _ready(self, run: str, plan: str, context: Context) -> Ready:
        """The state for a sum; it is asked for under the name of the run that signed it, so that it has no second one.

        Raises SiteFailure (SETUP_UNKNOWN).
        """
        state = self.vault.state(run)
        if not isinstance(state, Ready) or (state.roster.run, state.roster.plan) != (run, plan):
            raise SiteFailure(Code.SETUP_UNKNOWN, f"no roster of run {run} and plan {plan[:12]}")
        if state.roster.digest != context.roster:
            raise SiteFailure(Code.SETUP_UNKNOWN, f"the roster {context.roster[:12]} of run {run}")
        return state

    def give(
        self, run: str, plan: Plan, context: Context, *, layout: Callable[[Roster], Layout], given: Given
    ) -> tuple[Sendable, Callable[[str], str]]:
        """The tensors of an upload, and what signs its header for the SHA-256 of their file.

        The step's keys are spent before this returns, and an update with site noise is counted. Raises SiteFailure:
        UPDATE_REFUSED for a number beyond its bound, BUDGET_SPENT for one update more than the noise is for; nothing is
        spent then.
        """
        we, state = self.credentials(), self._ready(run, plan.digest, context)
        with _refusals():
            spent, masking = site.mask(state, context)
            try:
                form = layout(state.roster)
                tensors = masked(form, given, masking, self.rounding(plan, we.site, context))
            except RingError as error:
                raise SiteFailure(Code.UPDATE_REFUSED, str(error)) from error
        if form.noise:
            self._count(run, plan, context)
        self.vault.keep(run, spent)
        return tensors, lambda body: site.header(spent, context, body, we.key)

    def _count(self, run: str, plan: Plan, context: Context) -> None:
        """One more update with noise leaves: one that is never unmasked counts too, for this site cannot know it."""
        given, most = self.vault.noised(run), most_noised(plan)
        if given >= most:
            raise SiteFailure(Code.BUDGET_SPENT, f"{given} updates were given, and the site noise is for {most}")
        self.vault.add_noised(run, context.digest)

    def unmask(
        self, run: str, plan: Plan, task: UnmaskTask, tensors: Arrays, least: int
    ) -> tuple[UnmaskResult, Arrays]:
        """This site's shares of the survivors' seeds."""
        we, vault = self.credentials(), self.vault
        with _refusals():
            context = verified(task.context, Context, we.trust.log)
            state = self._ready(run, task.plan_digest, context)
            survivors = tuple(sorted(task.uploads))
            boxes = _rows(tensors, survivors, task.receivers or (we.site,), we.site)
            request = Request(context, survivors, task.uploads, boxes)
            answered, sealed = site.answer(state, request, least=least, before=vault.answered(run, context.sum))
        vault.answer(run, context.sum, survivors)
        vault.keep(run, answered)
        return UnmaskResult(plan_digest=plan.digest), {"sealed": np.frombuffer(sealed, np.uint8)}


def _decoded(text: str) -> bytes:
    try:
        return base64url_bytes(text)
    except ValueError as error:
        raise SecureRefusal("the model's key is not base64url") from error


def _rows(tensors: Arrays, survivors: Sequence[str], receivers: Sequence[str], name: str) -> dict[str, bytes]:
    """The boxes that the survivors have sealed to one of the receivers."""
    boxes, rows = tensors.get("boxes"), len(survivors) * len(receivers)
    if boxes is None or boxes.dtype != np.uint8 or boxes.ndim != 2 or len(boxes) != rows or name not in receivers:
        raise SecureRefusal("there is not one box of each survivor")
    first = receivers.index(name) * len(survivors)
    return {giver: boxes[row].tobytes() for row, giver in enumerate(survivors, start=first)}


@contextmanager
def _refusals() -> Iterator[None]:
    """A refusal of the protocol as a failure that leaves as its code."""
    try:
        yield
    except SecureRefusal as refusal:
        raise SiteFailure(Code.SECURE_SUM_REFUSED, str(refusal)) from refusal
