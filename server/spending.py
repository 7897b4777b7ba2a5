"""What sites say they have spent of their patients' privacy: checked before it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography import x509

from locum.common.envelope import EnvelopeError, Spent, open_spent
from locum.common.identity import certified_key
from locum.common.plan import Plan
from locum.server.admission import Refused


@dataclass(frozen=True)
class Statement:
    """A site's signed statement: the envelope, and what it says."""

    envelope: str
    spent: Spent


@dataclass(frozen=True)
class Release:
    """What a statement must be about: the run, the plan's digest, the round, and `train` or a fold."""

    run: str
    plan: str
    round: int
    purpose: str


def is_due(plan: Plan, purpose: str) -> bool:
    """Whether whoever contributes must say what it has spent: what is released has noise, and a price."""
    return plan.private is not None and (purpose == "train" or bool(plan.released_metrics))


def stated(
    envelope: str | None, certificate: x509.Certificate | None, *, site: str, release: Release, due: bool
) -> Statement | Refused | None:
    """The statement that came with a site's answer, where one is due; or why the answer does not count."""
    if envelope is None:
        return Refused("it does not say what it has spent of its patients' privacy") if due else None
    if not due:
        return Refused("it says what it has spent where nothing is")
    if certificate is None:
        return Refused("its statement of what it has spent cannot be checked: its certificate is not known")
    try:
        spent = open_spent(envelope.encode(), certified_key(certificate))
    except EnvelopeError as error:
        return Refused(f"its statement of what it has spent does not count: {error}")
    if (spent.site, Release(spent.run, spent.plan, spent.round, spent.purpose)) != (site, release):
        return Refused("its statement of what it has spent is about something else")
    return Statement(envelope, spent)


def envelopes(statements: Mapping[str, Statement | None]) -> dict[str, str]:
    """The envelopes of those that made a statement, as they stand in the log."""
    return {site: statement.envelope for site, statement in sorted(statements.items()) if statement is not None}
