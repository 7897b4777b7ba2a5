"""The statement that goes with a released model: an in-toto Statement v1 in a DSSE envelope, signed with the log key.

    {"payloadType": "application/vnd.in-toto+json", "payload": base64, "signatures": [{"keyid", "sig": base64}]}

Rules:
  * Subject: the SHA-256 of the model's file. What is said of it has the type :data:`PREDICATE_TYPE`.
  * The signature is over DSSE's pre-authentication encoding, so that it is none of anything else that the key signs.
  * The key's certificate and the authority's are in the predicate: who has pinned the authority needs no bundle.

in-toto Attestation Framework, Statement v1; DSSE v1.0.2.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from datetime import datetime
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from locum.common.canonical import canonical_json
from locum.common.identity import (
    IdentityError,
    SiteName,
    certified_key,
    check_issued,
    check_valid,
    fingerprint_of,
    parse_certificate,
    public_key_sha256,
    subject_of,
)
from locum.common.log.entries import Digest, Moment, RunName
from locum.common.log.note import NoteError, check_signature, opened
from locum.common.log.origins import federation_origin

PAYLOAD_TYPE: Literal["application/vnd.in-toto+json"] = "application/vnd.in-toto+json"
STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
#: A name, not an address: nothing is fetched from it.
PREDICATE_TYPE: Literal["https://locum.example/federated-model/v1"] = "https://locum.example/federated-model/v1"
MOST_BYTES = 16 << 20


class StatementError(ValueError):
    """A statement that is malformed, of something else, or not signed as it should be; the text says why."""


class Loss(BaseModel):
    """What a site has spent of its patients' privacy in this run, as it signed it last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epsilon: float = Field(ge=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)


class Release(BaseModel):
    """The predicate: what is said of the model.

    Attributes:
        federation: the federation's name.
        run: the run that made it.
        plan: the plan's digest.
        round: the round that it is of.
        status: `completed`, or `completed with losses`.
        roster: the sites that took part.
        epsilon: by site, of its training patients; empty without differential privacy.
        checkpoint: the newest checkpoint of the federation's log, signed by the log key; it counts the run's end.
        at: when this was said, UTC.
        authority: the federation's root certificate, PEM; `log` that of the log key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    federation: str = Field(min_length=1, max_length=64)
    run: RunName
    plan: Digest
    round: int = Field(ge=0, lt=1 << 53)
    status: Literal["completed", "completed with losses"]
    roster: tuple[SiteName, ...]
    epsilon: dict[SiteName, Loss]
    checkpoint: str = Field(max_length=256 << 10)
    at: Moment
    authority: str = Field(max_length=16384)
    log: str = Field(max_length=16384)


class _Digests(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Digest


class _Subject(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["model.safetensors"] = "model.safetensors"
    digest: _Digests


class Statement(BaseModel):
    """An in-toto Statement v1 about one model's file."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    type: Literal["https://in-toto.io/Statement/v1"] = Field(STATEMENT_TYPE, alias="_type")
    subject: tuple[_Subject]
    predicate_type: Literal["https://locum.example/federated-model/v1"] = Field(PREDICATE_TYPE, alias="predicateType")
    predicate: Release

    @property
    def model(self) -> str:
        """The SHA-256 of the model's file."""
        return self.subject[0].digest.sha256


class _Signature(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keyid: Digest
    sig: str = Field(max_length=128)


class _Dsse(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    payload_type: Literal["application/vnd.in-toto+json"] = Field(PAYLOAD_TYPE, alias="payloadType")
    payload: str
    signatures: tuple[_Signature]


def pre_authentication(payload: bytes) -> bytes:
    """DSSE's PAE: what is signed, of which no two (type, payload) have the same."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal_statement(model: str, release: Release, key: ed25519.Ed25519PrivateKey) -> bytes:
    """Signs what is said of the model with this SHA-256; the envelope, JSON."""
    statement = Statement(subject=(_Subject(digest=_Digests(sha256=model)),), predicate=release)
    payload = canonical_json(statement.model_dump(mode="json", by_alias=True))
    signature = base64.b64encode(key.sign(pre_authentication(payload))).decode()
    envelope = _Dsse(
        payload=base64.b64encode(payload).decode(),
        signatures=(_Signature(keyid=public_key_sha256(key.public_key()), sig=signature),),
    )
    return canonical_json(envelope.model_dump(mode="json", by_alias=True))


#: Says whether the authority of a statement is the one that is trusted; raises StatementError.
Trust = Callable[[x509.Certificate], None]


def open_statement(content: bytes, trust: Trust) -> Statement:
    """A statement, its signature, its certificates and its checkpoint verified; raises StatementError.

    Certificates are held against the time at which the statement says that it was made.
    """
    envelope, payload = _parsed(content)
    try:
        statement = Statement.model_validate(json.loads(payload))
    except (ValueError, RecursionError) as error:
        raise StatementError("this is no in-toto statement of a federated model") from error
    key = _key_of(statement.predicate, trust)
    try:
        signature = base64.b64decode(envelope.signatures[0].sig, validate=True)
        key.verify(signature, pre_authentication(payload))
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise StatementError("the statement is not signed by the log key") from error
    try:
        check_signature(statement.predicate.checkpoint, federation_origin(statement.predicate.federation), key)
    except NoteError as error:
        raise StatementError(f"the checkpoint in the statement does not count: {error}") from error
    return statement


def _parsed(content: bytes) -> tuple[_Dsse, bytes]:
    if len(content) > MOST_BYTES:
        raise StatementError(f"a statement is at most {MOST_BYTES} bytes")
    try:
        envelope = _Dsse.model_validate_json(content)
        return envelope, base64.b64decode(envelope.payload, validate=True)
    except (ValidationError, ValueError) as error:
        raise StatementError("this is no DSSE envelope with an in-toto statement and one signature") from error


def _key_of(release: Release, trust: Trust) -> ed25519.Ed25519PublicKey:
    """The log key that the statement names, if the trusted authority certified it; raises StatementError."""
    try:
        authority, log = parse_certificate(release.authority.encode()), parse_certificate(release.log.encode())
        trust(authority)
        check_log_key(authority, log)
        check_valid(log, datetime.fromisoformat(release.at))
        key, federation = certified_key(log), subject_of(log).federation
    except (IdentityError, ValueError) as error:
        raise StatementError(str(error)) from error
    if not isinstance(key, ed25519.Ed25519PublicKey) or federation != release.federation:
        raise StatementError("the log key is no Ed25519 key, or that of another federation")
    return key


def check_log_key(authority: x509.Certificate, log: x509.Certificate) -> None:
    """Raises IdentityError unless the authority is its own and issued the certificate of the log key."""
    check_issued(authority, authority)
    check_issued(log, authority)
    subject = subject_of(log)
    if (subject.federation, subject.role) != (subject_of(authority).federation, "log"):
        raise IdentityError("this is not the certificate of the federation's log key")


def counted(release: Release) -> int:
    """How many entries of the log the statement's checkpoint counts."""
    return opened(release.checkpoint)[0].size


def pinned(fingerprint: str | None) -> Trust:
    """Trusts the authority with this SHA-256 (DER); with None any, which is then to be compared by a person."""

    def trust(authority: x509.Certificate) -> None:
        if fingerprint is not None and fingerprint_of(authority) != fingerprint:
            raise StatementError(
                f"this is of another federation: its authority is {fingerprint_of(authority)}, not {fingerprint}"
            )

    return trust
