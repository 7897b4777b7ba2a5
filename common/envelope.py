"""Signed statements: a proposal by the coordinator; by a site an approval, and what was spent of its patients' privacy.

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
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from locum.common.canonical import canonical_json, digest
from locum.common.identity import PrivateKey, PublicKey, SiteName, base64url, base64url_bytes, is_p384
from locum.common.plan import Plan, parse_plan

PROPOSAL, APPROVAL, SPENT = "proposal", "approval", "spent"
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
