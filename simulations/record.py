"""What a simulation's log says beside its run: its hospitals, that they approve the plan, and that they witness it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from locum.common.canonical import sha256_hex
from locum.common.durable import replace_file
from locum.common.envelope import Approval, Proposal, seal_approval, seal_proposal
from locum.common.identity import fingerprint_of, utc_now
from locum.common.log.entries import ApprovalEntry, Entry, ProposalEntry, SiteEntry
from locum.common.log.note import NoteError
from locum.common.plan import Plan
from locum.server.authority import load_log_key
from locum.server.home import Home
from locum.server.log import FederationLog, now, open_log
from locum.simulations.institutions import Federation, Institution, credentials_of
from locum.site_client.fleet import RefusedError
from locum.site_client.releases import Releases
from locum.site_client.secure import Credentials
from locum.site_client.witness import FOLDER as WITNESS
from locum.site_client.witness import Ask, ForkedError, Witness

PROPOSAL = "proposal.json"
_BY = "simulation"


def begin_log(folder: Path, federation: Federation, plan: Plan, sites: Iterable[Institution]) -> FederationLog:
    """The log in a run's folder; one that is new says first who is in it, and that all of them approve the plan.

    The signed proposal is beside it. Raises LogError or NotLoggedError, and OSError.
    """
    log = open_log(Home(folder))
    if log.store.size == 1:  # whose log it is, and nothing else
        members = [(credentials_of(site.agent.site, federation), site.releases) for site in sites]
        body = Proposal(digest=plan.digest, plan=plan.model_dump(mode="json"), proposed_at=time.time(), by=_BY)
        proposal = seal_proposal(body, load_log_key(federation.home))
        replace_file(folder / PROPOSAL, proposal)
        log.append(
            *(_enrolled(member) for member, _ in members),
            ProposalEntry(at=now(), plan=plan.digest, statement=sha256_hex(proposal)),
            *(_approved(member, plan.digest, releases) for member, releases in members),
        )
    return log


def _enrolled(member: Credentials) -> Entry:
    return SiteEntry(at=now(), site=member.site, event="enrolled", certificate=fingerprint_of(member.certificate))


def _approved(member: Credentials, digest: str, releases: Releases) -> Entry:
    """The site's approval, which stands in its own log too."""
    approval = Approval(site=member.site, digest=digest, at=time.time(), decision="approve", steward=_BY)
    statement = seal_approval(approval, member.key)
    entry = ApprovalEntry(
        at=now(),
        site=member.site,
        plan=digest,
        statement=statement.decode(),
        certificate=fingerprint_of(member.certificate),
    )
    releases.decided(digest, statement)
    return releases.decision(statement, lambda: entry)


def witness_log(folder: Path, log: FederationLog, federation: Federation, sites: Iterable[Institution]) -> None:
    """Each site looks at the log as a hospital's agent does, and signs it. Raises NotLoggedError, and OSError."""
    log.seal()
    for site in sites:
        own = credentials_of(site.agent.site, federation)
        witness = Witness(folder / "sites" / own.site / WITNESS, partial(_same, own), utc_now, site.agent.log)
        with suppress(ForkedError):  # which the site's log and the log's missing line tell
            witness.look(_within(log, own, site.releases))


def _same(own: Credentials) -> Credentials:
    return own


def _within(log: FederationLog, own: Credentials, releases: Releases) -> Ask:
    """Asks the coordinator in this process."""

    def hand_in(size: int, line: str) -> None:
        try:
            log.cosigned(own.site, own.key.public_key(), line, size)
        except NoteError as error:
            raise RefusedError(str(error)) from error

    def ask(size: int, line: str) -> tuple[bytes, Sequence[bytes]]:
        if line:
            releases.cosignature(line, lambda: hand_in(size, line))
        return log.show(size)

    return ask
