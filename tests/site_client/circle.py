"""Agents of a federation that sums securely, in one process, and a coordinator's side that asks what a test says.

circle = Circle(tmp_path).set_up()
context = circle.context()
total = circle.collected(context)
circle.unmask("north", total)

The agents are real; in place of a worker each has `Hands`, for no images are needed, and a worker tells the truth.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from safetensors.numpy import save

from locum.common.canonical import sha256_hex
from locum.common.errors import Code, SiteFailure
from locum.common.fab import build_bundle
from locum.common.identity import base64url, new_key, parse_certificate, utc_now
from locum.common.messages import (
    BEGIN,
    EVALUATE,
    INLINE,
    KEYS,
    PAIRS,
    TRAIN,
    UNMASK,
    Arrays,
    BeginResult,
    BeginTask,
    EvaluateTask,
    Fields,
    Header,
    KeysResult,
    KeysTask,
    MaskedResult,
    Opener,
    PairsResult,
    PairsTask,
    Secured,
    Tensors,
    TrainTask,
    UnmaskResult,
    UnmaskTask,
    assemble,
    body_of,
    pack,
    unpack,
)
from locum.common.plan import Plan
from locum.common.secagg import keys
from locum.common.secagg.aggregator import SecureSum, open_roster
from locum.common.secagg.model import seal_bytes
from locum.common.secagg.roster import Context, Roster, RunKeys, Trust, member_keys, member_of, sign
from locum.common.secagg.site import model_purpose
from locum.common.sums import metric_lengths, metrics_layout, training_layout
from locum.server.authority import Authority
from locum.simulations.institutions import site_log
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy
from locum.site_client.privacy.budget import Budget, Signer
from locum.site_client.privacy.ledger import Ledger
from locum.site_client.secure import Credentials, SecureSite, seeded
from tests.common.secagg.federation import authority
from tests.plans import initial, secured
from tests.site_client.asking import message

NAMES = ("harbour", "north", "riverside")
RUN = "run-1"
H = TypeVar("H", bound=Header)


@dataclass
class Hands:
    """What a worker would have found out. `asked` is what it was asked for.

    Attributes:
        value: of each coordinate of the update.
        done: what training tells.
        cases: of the fold that is measured, and each of the metrics' sums.
        patients: of each fold.
        private: what it was told of differential privacy, request by request.
    """

    value: float = 0.01
    done: dict[str, Any] = field(default_factory=lambda: {"loss": 0.5, "steps": 2, "cases": 10})
    cases: float = 4
    asked: list[str] = field(default_factory=list)
    patients: dict[str, int] = field(default_factory=lambda: {"train": 40, "validation": 10, "test": 10})
    private: list[Any] = field(default_factory=list)

    def call(
        self, operation: str, plan: Plan, tensors: Arrays | None = None, *, seconds: float | None = None, **how: Any
    ) -> tuple[dict[str, Any], Tensors]:
        self.asked.append(operation)
        if operation == "patients":
            return {"patients": self.patients}, {}
        self.private.append(how.get("private"))
        if operation == "train":
            return dict(self.done), {name: np.full_like(tensor, self.value) for name, tensor in (tensors or {}).items()}
        if self.cases == 0:
            raise SiteFailure(Code.NO_DATA, "no case of the fold")
        return {"cases": self.cases}, {
            name: np.full(n, float(self.cases)) for name, n in metric_lengths(plan, "validation").items()
        }


@dataclass
class Circle:
    """Agents by name, with a folder each, and the coordinator's keys."""

    folder: Path
    of: Plan = field(default_factory=secured)
    names: Sequence[str] = NAMES
    policies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    root: Authority = field(default_factory=authority)
    log: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    private: bytes = field(default_factory=keys.new_private)
    content_key: bytes = field(default_factory=lambda: secrets.token_bytes(keys.KEY_BYTES))
    agents: dict[str, Agent] = field(init=False)
    roster: Roster = field(init=False)
    run_keys: dict[str, RunKeys] = field(init=False)

    def __post_init__(self) -> None:
        self.credentials = {name: self._enrolled(name) for name in self.names}
        self.hands = {name: Hands() for name in self.names}
        self.agents = {name: self.agent(name) for name in self.names}
        self.model = initial(self.of)

    def _enrolled(self, name: str) -> Credentials:
        key = new_key()
        trust = Trust(self.root.federation, self.root.certificate, self.log.public_key())
        return Credentials(name, key, self.root.issue_site(name, key.public_key()), trust)

    def agent(self, name: str) -> Agent:
        """A site's agent as it starts: all that it knows of sums is in its folder."""
        home = self.folder / name
        home.mkdir(parents=True, exist_ok=True)
        policy = Policy.model_validate(self.policies.get(name, {}))
        log = site_log(home / "site.log", name)
        log.setLevel("DEBUG")
        secure = SecureSite(home / "secagg", lambda: self.credentials[name], utc_now, seeded)
        return Agent(name, policy, self.hands[name], log, secure, budget=self.budget(name))  # type: ignore[arg-type]

    def budget(self, name: str) -> Budget:
        """What a site's patients may still give, by the ledger in its folder."""
        ledger = Ledger(self.folder / name / "ledger.sqlite")
        ledger.begin()
        policy = Policy.model_validate(self.policies.get(name, {}))
        return Budget(ledger, "patients", policy, lambda: Signer(name, self.credentials[name].key), utc_now)

    def restart(self, name: str) -> None:
        """The site's agent was killed, and another one starts."""
        self.agents[name] = self.agent(name)

    def state_file(self, name: str, run: str = RUN) -> Path:
        """Where a site keeps its keys."""
        return self.folder / name / "secagg" / run / "state.json"

    def log_of(self, name: str) -> str:
        """What a site's log says."""
        return (self.folder / name / "site.log").read_text()

    # --- asking

    def ask(
        self,
        name: str,
        kind: str,
        task: Header,
        tensors: Arrays | None = None,
        *,
        model: Fields | None = None,
        of: Plan | None = None,
        run: str = RUN,
        carrier: Opener = INLINE,
    ) -> Message:
        """A site's reply; `model` are the fields of a sealed one."""
        asked = message(assemble(task, model) if model is not None else pack(task, dict(tensors or {})), kind)
        return self.agents[name].handle(asked, build_bundle(of or self.of), carrier, run=run)

    def told(self, name: str, kind: str, task: Header, result: type[H], **how: Any) -> H:
        """The header of a site's reply, which is no error."""
        return unpack(answered(self.ask(name, kind, task, **how)), result)[0]

    # --- set-up

    def announced(self, run: str = RUN, names: Sequence[str] | None = None) -> dict[str, KeysResult]:
        """Each site's keys."""
        task = KeysTask(plan_digest=self.of.digest, run=run)
        return {name: self.told(name, KEYS, task, KeysResult, run=run) for name in names or self.names}

    def offered(
        self, found: Mapping[str, KeysResult], run: str = RUN, key: Ed25519PrivateKey | None = None
    ) -> PairsTask:
        """The roster of these sites, signed."""
        certificates = {name: parse_certificate(one.certificate.encode()) for name, one in found.items()}
        self.run_keys = {
            name: member_keys(one.keys, certificates[name], site=name, run=run, plan=self.of.digest)
            for name, one in found.items()
        }
        members = {name: member_of(name, certificates[name], one.keys) for name, one in found.items()}
        public = keys.public_of(self.private)
        self.roster, envelope = open_roster(members, run=run, plan=self.of.digest, answers=public, key=key or self.log)
        return PairsTask(
            plan_digest=self.of.digest,
            run=run,
            roster=envelope,
            keys={name: one.keys for name, one in found.items()},
            certificates={name: one.certificate for name, one in found.items()},
        )

    def set_up(self, run: str = RUN, names: Sequence[str] | None = None) -> Circle:
        """All three steps."""
        offer = self.offered(self.announced(run, names), run)
        pairs = {name: self.told(name, PAIRS, offer, PairsResult, run=run).pairs for name in offer.keys}
        for name in pairs:
            halves = {peer: pairs[peer][name] for peer in pairs if peer != name}
            task = BeginTask(plan_digest=self.of.digest, run=run, pairs=halves)
            assert self.told(name, BEGIN, task, BeginResult, run=run).roster == self.roster.digest
        return self

    # --- a sum

    def context(self, step: int = 1, **changes: Any) -> Context:
        """The sum of round 1, unless it is told otherwise."""
        fields = {"purpose": "train", "round": 1, "attempt": 1, "model": sha256_hex(save(self.model)), **changes}
        return Context(**{"roster": self.roster.digest, "step": step, **fields})

    def task(
        self, context: Context, *, key: Ed25519PrivateKey | None = None, **changes: Any
    ) -> TrainTask | EvaluateTask:
        """What asks a site to give to a sum."""
        purpose = model_purpose(self.roster, context.model)
        sealed = {
            name: base64url(keys.seal(one.models, purpose, self.content_key)) for name, one in self.run_keys.items()
        }
        fields = {
            "plan_digest": self.of.digest,
            "round": context.round,
            "secured": Secured(context=sign(context, key or self.log), keys=sealed),
            **changes,
        }
        if context.purpose == "train":
            return TrainTask(**fields)
        return EvaluateTask(**{"fold": context.purpose, **fields})

    @property
    def sealed_model(self) -> Fields:
        """The model as it goes out."""
        return {"tensors": seal_bytes(save(self.model), self.content_key)}

    def give(self, name: str, context: Context, **how: Any) -> Message:
        """A site's reply when it is asked to give to a sum."""
        kind = TRAIN if context.purpose == "train" else EVALUATE
        return self.ask(name, kind, self.task(context), model=self.sealed_model, **how)

    def open_sum(self, context: Context) -> SecureSum:
        """A sum to which nobody has given."""
        size = sum(tensor.size for tensor in self.model.values())
        layout = (
            partial(training_layout, size=size)
            if context.purpose == "train"
            else partial(metrics_layout, fold=context.purpose)
        )
        certificates = {name: self.credentials[name].certificate for name in self.roster.places}
        return SecureSum(context, layout(self.of, self.roster), certificates, self.private)

    def collected(self, context: Context, names: Sequence[str] | None = None) -> SecureSum:
        """A sum to which these sites have given."""
        total = self.open_sum(context)
        for name in names or list(self.roster.places):
            fold(total, name, self.give(name, context))
        return total

    def unmask(self, name: str, total: SecureSum, **how: Any) -> Message:
        """A survivor's reply when it is asked for its shares."""
        task = UnmaskTask(plan_digest=self.of.digest, context=sign(total.context, self.log), uploads=total.headers)
        return self.ask(name, UNMASK, task, {"boxes": total.boxes_for(name)}, **how)

    def unmasked(self, total: SecureSum) -> SecureSum:
        """The sum, after all survivors have answered."""
        for name in total.survivors:
            total.take(name, sealed_shares(self.unmask(name, total)))
        assert total.unmask(3) == []
        return total


def answered(reply: Message) -> Any:
    """The content of a reply that is no error."""
    assert not reply.has_error(), reply.error
    return reply.content


def fold(total: SecureSum, name: str, reply: Message) -> None:
    """Adds what a site gave to a sum."""
    header, tensors = unpack(answered(reply), MaskedResult)
    total.fold(name, header.upload, body_of(reply.content), tensors)


def sealed_shares(reply: Message) -> bytes:
    """What a survivor has answered."""
    return unpack(answered(reply), UnmaskResult)[1]["sealed"].tobytes()
