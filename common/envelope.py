"""Signed statements: a plan proposed by the coordinator; a site's approval, what it spent, whether its data are ready.

Rules:
  * An envelope is the canonical JSON (RFC 8785) of {"kind", "body", "signature"}; any other spelling is refused, so
    that one statement has one digest.
  * The signature is over "locum ", the kind, a line feed, and the canonical JSON of the body: a signature of one kind
    is none of another, and none of what Flower or TLS sign with the same key.
  * ECDSA P-384 with SHA-384 (FIPS 186-5) or Ed25519 (RFC 8032), by the kind of the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from locum.common.canonical import canonical_json, digest
from locum.common.identity import PrivateKey, PublicKey, SiteName, base64url, base64url_bytes, is_p384
from locum.common.plan import Plan, parse_plan

PROPOSAL, APPROVAL, SPENT, READINESS = "proposal", "approval", "spent", "readiness"
_FIELDS = {"kind", "body", "signature"}
#: A plan is at most 1 MiB; the rest of a proposal is a few hundred bytes.
MOST_BYTES = (1 << 20) + 4096
_ECDSA = ec.ECDSA(hashes.SHA384())

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: Seconds since 1970, UTC.
Time = Annotated[float, Field(ge=0, lt=1e11, allow_inf_nan=False)]
Person = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class EnvelopeError(ValueError):
    """An envelope that is not canonical, not of the kind expected, or not signed by the key expected."""


def seal(kind: str, body: Mapping[str, Any], key: PrivateKey) -> bytes:
    """Signs `body` as a statement of `kind`; raises EnvelopeError if the body is not plain data."""
    try:
        signature = _sign(key, _signed(kind, body))
        return canonical_json({"kind": kind, "body": dict(body), "signature": base64url(signature)})
    except (ValueError, RecursionError) as error:
        raise EnvelopeError(f"the {kind} cannot be written as canonical JSON") from error


def unseal(content: bytes, kind: str, public_key: PublicKey) -> dict[str, Any]:
    """The body of an envelope, verified; raises EnvelopeError."""
    found = _parsed(content)
    if found["kind"] != kind:
        raise EnvelopeError(f"this is no {kind}")
    if not isinstance(found["body"], dict) or not isinstance(found["signature"], str):
        raise EnvelopeError(f"this {kind} has no body or no signature")
    try:
        _verify(public_key, base64url_bytes(found["signature"]), _signed(kind, found["body"]))
    except (ValueError, InvalidSignature) as error:
        raise EnvelopeError(f"the {kind} is not signed by the key expected") from error
    body: dict[str, Any] = found["body"]
    return body


def kind_of(content: bytes) -> str:
    """The kind that an envelope says it is of, unverified; raises EnvelopeError for what is no envelope."""
    kind = _parsed(content)["kind"]
    return kind if isinstance(kind, str) else ""


def _parsed(content: bytes) -> dict[str, Any]:
    if len(content) > MOST_BYTES:
        raise EnvelopeError(f"an envelope is at most {MOST_BYTES} bytes")
    try:
        found = json.loads(content, parse_int=_number)
        canonical = canonical_json(found) == content
    except (ValueError, RecursionError) as error:
        raise EnvelopeError("this is no canonical JSON") from error
    if not canonical or not isinstance(found, dict) or set(found) != _FIELDS:
        raise EnvelopeError("this is no envelope in canonical JSON")
    return found


def _number(text: str) -> int | float:
    """RFC 8785 writes a float such as 2^53 without a point; read back as an integer it could not be written again."""
    number = float(text)
    return int(text) if abs(number) < 2**53 else number


def _signed(kind: str, body: Mapping[str, Any]) -> bytes:
    return b"locum " + kind.encode() + b"\n" + canonical_json(dict(body))


def _sign(key: PrivateKey, content: bytes) -> bytes:
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(content)
    return key.sign(content, _ECDSA)


def _verify(key: PublicKey, signature: bytes, content: bytes) -> None:
    if isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, content)
        return
    if not is_p384(key):
        raise EnvelopeError("the key is neither P-384 nor Ed25519")
    key.verify(signature, content, _ECDSA)


# --- the statements -----------------------------------------------------------------------------------------------


class Proposal(BaseModel):
    """A plan put before the sites, signed with the federation's log key.

    Attributes:
        digest: of the plan.
        plan: the plan as plain data; its canonical JSON has the digest.
        proposed_at: when, seconds since 1970 by the coordinator's clock.
        by: who proposed it, in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: Digest
    plan: dict[str, Any]
    proposed_at: Time
    by: Person

    def parsed_plan(self) -> Plan:
        """The plan; raises PlanError if this version of Locum does not know it."""
        return parse_plan(canonical_json(self.plan), f"proposal {self.digest[:12]}")


class Approval(BaseModel):
    """A site's approval of a plan, or its end, signed with the site's key; of several the newest counts.

    Attributes:
        site: who approves.
        digest: of the plan.
        at: when, seconds since 1970 by the site's clock, later than every earlier one of this site and plan.
        decision: `approve` or `revoke`.
        steward: the person at the site, in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteName
    digest: Digest
    at: Time
    decision: Literal["approve", "revoke"]
    steward: Person


class Spent(BaseModel):
    """What a run has spent of the privacy of a site's patients so far, signed with the site's key.

    Attributes:
        site: whose patients.
        run: the run's name.
        plan: the plan's digest.
        round: the round after which this holds.
        purpose: what was released last: the update of a round, or the metrics of a fold.
        at: when, seconds since 1970 by the coordinator's clock.
        epsilon: of the patients of the fold that was used, all releases of this run composed, this one included.
        delta: at this delta.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteName
    run: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,80}$")
    plan: Digest
    round: int = Field(ge=0)
    purpose: Literal["train", "validation", "test"]
    at: Time
    epsilon: float = Field(ge=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)


#: What a contract is measured by: its keys. Those from `modality` to `months` say which images are used.
Clause = Literal[
    "modality",
    "dimensions",
    "spacing",
    "sop_classes",
    "body_parts",
    "orientation",
    "least_slices",
    "months",
    "least_patients",
    "classes",
    "single_class",
    "codes",
    "prevalence",
    "strata",
    "deidentified",
    "deface",
    "consent",
]
CLAUSES: tuple[Clause, ...] = get_args(Clause)
#: By what a site tells its training patients apart.
Group = Literal["sex", "age", "manufacturer"]
_Count = Annotated[int, Field(ge=1, lt=1 << 53)]
_Cell = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+][A-Za-z0-9 _.+-]{0,63}$")]


class Readiness(BaseModel):
    """Whether a site's data meet a plan's contract, measured and signed by the site.

    Every number is of training patients whose images fit, and a multiple of `step`, rounded down: of fewer patients, or
    of none, there is no number.

    Attributes:
        site: whose data.
        run: for which run it was asked; None if its steward released it before any.
        plan: the plan's digest.
        at: when it was measured, seconds since 1970 by the site's clock.
        ready: whether every clause is met.
        clauses: by key of the contract, whether it is met.
        step: the least number of patients that this site tells apart.
        patients: how many fit; None for fewer than `step`, or not told.
        strata: by sex, age band and maker of the scanner, how many; what is not there is small, or not told.
        terminology: the digest of the site's map to standard codes, if it has one.
        profile: how its DICOM was cleaned; empty if it was not, or there is none.
        consent: whether it keeps a list of withdrawn consent.
        withdrawn: how many patients on that list were left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: SiteName
    run: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9-]{0,80}$")
    plan: Digest
    at: Time
    ready: bool
    clauses: dict[Clause, bool]
    step: int = Field(ge=1, lt=1 << 53)
    patients: _Count | None = None
    strata: dict[Group, dict[_Cell, _Count]] = {}
    terminology: Digest | None = None
    profile: str = Field("", max_length=400, pattern=r"^[A-Za-z0-9 .,_+-]*$")
    consent: bool = False
    withdrawn: _Count | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if set(self.clauses) != set(CLAUSES):
            raise ValueError("it does not say of every clause whether it is met")
        if self.ready != all(self.clauses.values()):
            raise ValueError("it is ready if every clause is met, and else it is not")
        numbers = [self.patients, self.withdrawn, *(n for cells in self.strata.values() for n in cells.values())]
        if any(number is not None and number % self.step for number in numbers):
            raise ValueError("a number is no multiple of its step")
        return self

    @property
    def failing(self) -> tuple[Clause, ...]:
        """The clauses that are not met."""
        return tuple(name for name in CLAUSES if not self.clauses[name])


def seal_proposal(proposal: Proposal, key: PrivateKey) -> bytes:
    """Signs a proposal; raises EnvelopeError."""
    return seal(PROPOSAL, proposal.model_dump(), key)


def open_proposal(content: bytes, key: PublicKey) -> Proposal:
    """A proposal, verified, with a plan that has the digest; raises EnvelopeError."""
    try:
        proposal = Proposal.model_validate(unseal(content, PROPOSAL, key))
    except ValidationError as error:
        raise EnvelopeError("this proposal has other fields than a proposal") from error
    if digest(proposal.plan) != proposal.digest:
        raise EnvelopeError("the proposal's plan does not have the digest that it names")
    return proposal


def seal_approval(approval: Approval, key: PrivateKey) -> bytes:
    """Signs an approval or its end; raises EnvelopeError."""
    return seal(APPROVAL, approval.model_dump(), key)


def open_approval(content: bytes, key: PublicKey) -> Approval:
    """An approval, verified; raises EnvelopeError."""
    try:
        return Approval.model_validate(unseal(content, APPROVAL, key))
    except ValidationError as error:
        raise EnvelopeError("this approval has other fields than an approval") from error


def seal_spent(spent: Spent, key: PrivateKey) -> bytes:
    """Signs a statement of what was spent; raises EnvelopeError."""
    return seal(SPENT, spent.model_dump(), key)


def open_spent(content: bytes, key: PublicKey) -> Spent:
    """A statement of what was spent, verified; raises EnvelopeError."""
    try:
        return Spent.model_validate(unseal(content, SPENT, key))
    except ValidationError as error:
        raise EnvelopeError("this statement has other fields than one of what was spent") from error


def seal_readiness(readiness: Readiness, key: PrivateKey) -> bytes:
    """Signs a statement of readiness; raises EnvelopeError."""
    return seal(READINESS, readiness.model_dump(), key)


def open_readiness(content: bytes, key: PublicKey) -> Readiness:
    """A statement of readiness, verified; raises EnvelopeError."""
    try:
        return Readiness.model_validate(unseal(content, READINESS, key))
    except ValidationError as error:
        raise EnvelopeError("this statement has other fields than one of readiness") from error
