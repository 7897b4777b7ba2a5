"""Plans put before the sites: checked, signed with the federation's log key, kept in the registry.

What stands in a proposal is the plan as data, so that a site checks and shows what it signs, and no file travels.
"""

from __future__ import annotations

import time
from contextlib import closing

from rfc8785 import CanonicalizationError

from locum.common.build import check_buildable
from locum.common.canonical import sha256_hex
from locum.common.envelope import EnvelopeError, Proposal, open_proposal, seal_proposal
from locum.common.errors import DataError, PlanError, RunError
from locum.common.identity import certified_key
from locum.common.log.entries import ProposalEntry
from locum.common.plan import Plan, plan_error
from locum.common.yaml_source import Source
from locum.server.authority import load_log_certificate, load_log_key
from locum.server.home import Home
from locum.server.log import now, open_log
from locum.server.registry import Registry

_MOST_BY = 200


def propose(home: Home, plan: Plan, by: str, *, source: Source | None = None) -> str:
    """Puts a plan before the sites; a plan that was proposed before stays proposed as it was.

    Args:
        home: the coordinator's folder.
        plan: the plan.
        by: who proposes it, in words; the sites read this.
        source: the file it was read from, so that what is wrong is told by line.

    Returns:
        The plan's digest.

    Raises:
        PlanError: a part of the plan cannot be built here, or parts do not fit together.
        DataError: the log's key cannot be read, or `by` is empty or long.
        RunError: the registry cannot be written.
        NotLoggedError: the log cannot.
    """
    found = check_buildable(plan)
    if found:
        raise plan_error(source or Source(plan.model_dump(mode="json"), name=plan.name), found)
    envelope = _sealed(home, plan, by)
    with closing(Registry(home.registry)) as registry:
        entry = ProposalEntry(at=now(), plan=plan.digest, statement=sha256_hex(envelope))
        log = open_log(home)
        registry.propose(plan.digest, envelope, noted=lambda: log.append_new(entry))
        log.seal()
    return plan.digest


def _sealed(home: Home, plan: Plan, by: str) -> bytes:
    """The signed proposal, which a site can open; raises PlanError or DataError."""
    if not 0 < len(by) <= _MOST_BY:
        raise DataError("who proposes a plan is told in 1 to 200 characters", "give another --by")
    key = load_log_key(home)
    try:
        body = Proposal(digest=plan.digest, plan=plan.model_dump(mode="json"), proposed_at=time.time(), by=by)
        envelope = seal_proposal(body, key)
        open_proposal(envelope, key.public_key())
    except (EnvelopeError, CanonicalizationError) as error:
        raise PlanError(
            f"{plan.name} cannot be signed: {error}", "use smaller numbers, and a plan below 1 MiB"
        ) from error
    return envelope


def proposed(home: Home, digest: str) -> tuple[Proposal, Plan]:
    """A proposal by its digest or the beginning of it, its signature checked, and its plan.

    Raises:
        RunError: no such proposal, several, or one that the log key did not sign.
        PlanError: this version of Locum does not know the plan.
    """
    with closing(Registry(home.registry)) as registry:
        _, envelope = registry.proposal(digest)
    try:
        proposal = open_proposal(envelope, certified_key(load_log_certificate(home)))
    except EnvelopeError as error:
        raise RunError(f"the proposal {digest} is damaged: {error}", "restore the registry from a backup") from error
    return proposal, proposal.parsed_plan()


def sites_of(home: Home, digest: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites whose approval of a plan stands, and the other sites of the federation; raises RunError."""
    with closing(Registry(home.registry)) as registry:
        approved = tuple(registry.approvals(digest))
        members = (site.name for site in registry.sites() if site.revoked_at is None)
        return approved, tuple(name for name in members if name not in approved)
