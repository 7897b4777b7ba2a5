"""Checks of what lies in the bundle beside the log: certificates, the plan and its proposal, the result's files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from locum.common.audit.bundle import (
    AUTHORITY,
    CARD,
    CERTIFICATES,
    CHECKPOINTS,
    LOG_KEY,
    MODEL,
    PLAN,
    PROPOSAL,
    STATEMENT,
    SUMMARY,
    Bundle,
)
from locum.common.audit.rules import Wrong, some
from locum.common.audit.standing import Anchors, Standing
from locum.common.audit.statement import Statement, StatementError, check_log_key, counted, open_statement, pinned
from locum.common.canonical import canonical_json, sha256_hex
from locum.common.envelope import EnvelopeError, open_proposal
from locum.common.errors import PlanError
from locum.common.identity import (
    IdentityError,
    certified_key,
    check_issued,
    fingerprint_of,
    is_p384,
    parse_certificate,
    subject_of,
)
from locum.common.log.note import opened
from locum.common.plan import Plan, parse_plan

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\n.+?\n-----END CERTIFICATE-----\n", re.DOTALL)


@dataclass(frozen=True)
class Proposed:
    """The plan of a bundle, as it is read and as it was proposed; the SHA-256 of the signed proposal."""

    plan: Plan
    content: bytes
    proposal: str


# --- before the log


def anchors_of(bundle: Bundle, fingerprint: str | None) -> Anchors:
    """The certificates of a bundle, all issued by one authority; the one that is pinned, if one is. Raises Wrong."""
    try:
        authority, log = (parse_certificate(bundle.read(name)) for name in (AUTHORITY, LOG_KEY))
        if fingerprint is not None and fingerprint_of(authority) != fingerprint:
            raise Wrong(
                f"the authority in it is {fingerprint_of(authority)}, and the one that you trust is {fingerprint}",
                "this bundle is of another federation",
            )
        check_log_key(authority, log)
        federation = subject_of(authority).federation
        sites = {fingerprint_of(found): found for found in _certificates(bundle.read(CERTIFICATES))}
        names = {digest: _site_of(found, authority, federation) for digest, found in sites.items()}
    except IdentityError as error:
        raise Wrong(f"a certificate does not count: {error}", "nobody can say who signed") from error
    if federation != bundle.manifest.federation:
        raise Wrong(f"the authority is that of {federation}", "the manifest names another federation")
    return Anchors(federation, authority, log, sites, names)


def _certificates(content: bytes) -> list[x509.Certificate]:
    found = _PEM.findall(content)
    if b"".join(found) != content:
        raise IdentityError("there is something between the certificates")
    return [parse_certificate(pem) for pem in found]


def _site_of(certificate: x509.Certificate, authority: x509.Certificate, federation: str) -> str:
    """The name of the site that a certificate is of; raises IdentityError."""
    check_issued(certificate, authority)
    subject = subject_of(certificate)
    if (subject.federation, subject.role) != (federation, "site") or not is_p384(certified_key(certificate)):
        raise IdentityError(f"that of {subject.name} is no certificate of a site of this federation")
    return subject.name


def plan_of(bundle: Bundle, anchors: Anchors) -> Proposed:
    """The plan that the bundle is of, as the log key proposed it; raises Wrong."""
    content, envelope = bundle.read(PLAN), bundle.read(PROPOSAL)
    digest = bundle.manifest.plan
    if sha256_hex(content) != digest:
        raise Wrong(f"the plan has the digest {sha256_hex(content)[:12]}, not {digest[:12]}", "it was exchanged")
    try:
        proposal = open_proposal(envelope, anchors.log_key)
        plan = parse_plan(content, PLAN)
    except EnvelopeError as error:
        raise Wrong(
            f"the proposal does not count: {error}", "nobody vouches that the sites were shown this plan"
        ) from error
    except PlanError as error:
        raise Wrong(
            f"this version of Locum does not know the plan: {error}", "verify it with the version that ran"
        ) from error
    if proposal.digest != bundle.manifest.plan or canonical_json(proposal.plan) != content:
        raise Wrong("the proposal is of another plan", "the sites were shown another plan than the one in the bundle")
    return Proposed(plan, content, sha256_hex(envelope))


# --- after the log


def results(bundle: Bundle, standing: Standing) -> str:
    """The files of the result against the log; in words, what was found. Raises Wrong."""
    end, model = standing.end, bundle.manifest.model
    ended = None if end is None else end.model
    if ended != model:
        raise Wrong(
            f"the bundle is of the model {_short(model)}, and the log ends with {_short(ended)}",
            "a model is shown that the run did not release",
        )
    if end is None:
        extra = [name for name in (MODEL, STATEMENT, CARD) if bundle.has(name)]
        if extra:
            raise Wrong(f"{some(extra)} is there, of a run without an end", "a failure is shown as a success")
        return "none, for the run has no end"
    told = [
        _model(bundle, end.model),
        _statement(bundle, standing),
        _summary(bundle, standing),
        _card(bundle, end.model),
    ]
    return "; ".join(filter(None, told))


def _short(model: str | None) -> str:
    return model[:12] if model else "none"


def _model(bundle: Bundle, model: str) -> str:
    if not bundle.has(MODEL):
        return f"the model was left out, its SHA-256 is {model}"
    if (found := bundle.sha256(MODEL)) != model:
        raise Wrong(
            f"{MODEL} has the SHA-256 {found[:12]}, and the log ends with {model[:12]}",
            "the model's file was exchanged",
        )
    return f"{MODEL} is the one that the log ends with"


def _statement(bundle: Bundle, standing: Standing) -> str:
    if not bundle.has(STATEMENT):
        return ""
    try:
        statement = open_statement(bundle.read(STATEMENT), pinned(fingerprint_of(standing.anchors.authority)))
    except StatementError as error:
        raise Wrong(
            f"the statement does not count: {error}", "whoever gets the model with it would be deceived"
        ) from error
    for what, said, logged in _claims(statement, standing):
        if said != logged:
            raise Wrong(
                f"the statement says {what} {_told(said)}, and the log {_told(logged)}", "it is of something else"
            )
    start = canonical_json({"checkpoint": opened(statement.predicate.checkpoint)[0].text()}).removesuffix(b'"}')
    if not any(line.startswith(start) for line in bundle.lines(CHECKPOINTS)):
        raise Wrong(
            "the checkpoint in the statement is none of this log's",
            "two histories were signed: whoever got the model was told of another log than this one",
        )
    return "so is the statement's"


def _claims(statement: Statement, standing: Standing) -> list[tuple[str, Any, Any]]:
    """What a statement says, and what the log does."""
    said, end, roster = statement.predicate, standing.end, standing.roster
    spent = {site: (each.epsilon, each.delta) for (site, of), each in standing.spent.items() if of == "train"}
    return [
        ("model", statement.model, end and end.model),
        ("run", said.run, standing.run),
        ("plan", said.plan, standing.digest),
        ("round", said.round, end and end.round),
        ("status", said.status, end and end.status),
        ("roster", said.roster, roster and roster.sites),
        ("epsilon and delta", {site: (loss.epsilon, loss.delta) for site, loss in said.epsilon.items()}, spent),
        ("that its checkpoint counts the end", counted(said) > (standing.last or 0), True),
    ]


def _told(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _summary(bundle: Bundle, standing: Standing) -> str:
    """`run.json` is for people; what it says of the end must be what the log says."""
    if not bundle.has(SUMMARY):
        return ""
    try:
        found = json.loads(bundle.read(SUMMARY))
        said = found["status"], found["round"], sorted(found["sites"]), found["test"]["overall"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Wrong(f"{SUMMARY} cannot be read", "its numbers cannot be compared with the log") from error
    end, test, roster = standing.end, standing.test, standing.roster
    if end is None or test is None or roster is None:
        return ""
    logged = end.status, end.round, sorted(roster.sites), test.model_dump(mode="json")["overall"]
    for what, one, other in zip(("status", "round", "sites", "final test"), said, logged, strict=True):
        if one != other:
            raise Wrong(
                f"{SUMMARY} tells another {what} than the log", "numbers are shown that the sites did not release"
            )
    return f"{SUMMARY} tells the log's numbers"


def _card(bundle: Bundle, model: str) -> str:
    if not bundle.has(CARD):
        return ""
    if model.encode() not in bundle.read(CARD):
        raise Wrong(f"{CARD} is that of another model", "it describes something else")
    return f"{CARD} names the model"
