"""Checks of who there is, and of what each hospital agreed to."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from locum.common.audit.rules import Rule, Wrong
from locum.common.audit.standing import OF_RUN, Standing, writer_of
from locum.common.audit.tree import valid
from locum.common.identity import certified_key, public_key_sha256
from locum.common.log.entries import (
    ApprovalEntry,
    Entry,
    FederationEntry,
    MetricsEntry,
    ProposalEntry,
    RoundEntry,
    SiteEntry,
)

#: How far the clock of whoever writes may be set back.
CORRECTION = timedelta(minutes=10)


def time_of(entry: Entry) -> datetime:
    """An entry's time; raises Wrong for the 31st of February."""
    try:
        return datetime.fromisoformat(entry.at)
    except ValueError as error:
        raise Wrong(
            f"its time is {entry.at}, and there is no such time", "nobody can say when this happened"
        ) from error


# --- times


def _in_order(standing: Standing, entry: Entry) -> None:
    now, before = time_of(entry), standing.times.get(writer_of(entry), "")
    if entry.at >= before:
        return
    latest = datetime.fromisoformat(before)
    if latest - now > CORRECTION:
        raise Wrong(
            f"its time is {entry.at}, and an entry before it has {before}",
            f"entries are not in the order of their times: a clock was set back by more than "
            f"{CORRECTION.seconds // 60} minutes, or something was put in later",
        )


def _all_in_order(standing: Standing) -> str:
    return f"up to {max(standing.times.values(), default='nothing')}"


# --- members


def _certified(standing: Standing, entry: SiteEntry) -> None:
    if entry.event == "revoked":
        if entry.site not in standing.members:
            raise Wrong(f"{entry.site} is revoked and was never enrolled", "entries are missing")
        return
    certificate = None if entry.certificate is None else standing.anchors.sites.get(entry.certificate)
    if certificate is None:
        raise Wrong(
            f"the certificate of {entry.site} ({(entry.certificate or 'none')[:12]}) is not in the bundle",
            "what this site signed cannot be checked",
        )
    if standing.anchors.names[str(entry.certificate)] != entry.site:
        raise Wrong(f"the certificate is not that of {entry.site}", "one site would pass for another")
    if certificate.not_valid_before_utc > time_of(entry):
        raise Wrong(f"the certificate of {entry.site} is younger than its entry", "it was put there later")
    member = standing.members.get(entry.site)
    if entry.event == "renewed" and (member is None or member.revoked):
        raise Wrong(f"{entry.site} renews a certificate that it does not have", "entries are missing")
    if public_key_sha256(certified_key(certificate)) in standing.revoked_at:
        raise Wrong(f"{entry.site} is enrolled with a key that was shown out", "its word would count again")


def _members(standing: Standing) -> str:
    there = [site for site, member in standing.members.items() if not member.revoked]
    out = len(standing.members) - len(there)
    return f"{len(there)} sites, {out} revoked, {len(standing.anchors.sites)} certificates"


# --- the plan's way


def _proposed(standing: Standing, entry: ProposalEntry) -> None:
    if entry.plan == standing.digest and entry.statement != standing.proposal:
        raise Wrong(
            "the proposal in the log is another than the one in the bundle", "the sites were shown something else"
        )


def _signed(standing: Standing, entry: ApprovalEntry) -> None:
    if entry.plan != standing.digest:
        return
    site, member = entry.site, standing.members.get(entry.site)
    if standing.proposed is None:
        raise Wrong(f"{site} decides on a plan that was not proposed yet", "entries are missing, or were put in")
    if member is None or member.revoked or entry.certificate not in member.certificates:
        raise Wrong(
            f"the decision of {site} is under a certificate that it does not have, or not any more",
            "nobody can say that this hospital decided it",
        )
    said = standing.approval_of(entry)
    if said is None or (said.site, said.digest) != (site, entry.plan):
        raise Wrong(f"the decision of {site} is not signed by it, or about another plan", "the approval is forged")
    times = time_of(entry), datetime.fromtimestamp(said.at, UTC)
    certificates = [standing.anchors.sites[certificate] for certificate in member.certificates]
    if not any(valid(certificate, at) for certificate in certificates for at in times):
        raise Wrong(f"the decision of {site} is under a certificate that had expired", "it counts for nothing")


def _decided(standing: Standing) -> str:
    if standing.proposed is None and standing.last is not None:
        raise Wrong("the plan of the run was never proposed", "the sites were not shown the plan that was run")
    stands = [site for site in standing.decisions if standing.approves(site)]
    return f"{len(standing.decisions)} sites decided, {len(stands)} approve now"


# --- who took part had agreed


def _agreed(standing: Standing, entry: RoundEntry | MetricsEntry) -> None:
    for site in entry.sites:
        if not standing.approved(site):
            raise Wrong(
                f"{site} takes part, and {_why_not(standing, site)}",
                "a hospital's data was used without an approval of exactly this plan that stood at that time",
            )


def _why_not(standing: Standing, site: str) -> str:
    member, decision = standing.members.get(site), standing.decisions.get(site)
    if member is None:
        return "is no site of the federation"
    if member.revoked:
        return "was shown out before"
    if decision is None:
        return "never approved this plan"
    return "had taken its approval back" if not decision.approves else "approved it with an earlier key only"


def _all_agreed(standing: Standing) -> str:
    took_part = {site for sites in standing.counted.values() for site in sites}
    return f"{len(took_part)} sites, each with an approval that stood in every round that counts it"


_ANY = (FederationEntry, SiteEntry, ProposalEntry, ApprovalEntry, *OF_RUN)

RULES = (
    Rule(8, "times come in order", _all_in_order, dict.fromkeys(_ANY, _in_order)),
    Rule(9, "each site has its certificates", _members, {SiteEntry: _certified}),
    Rule(
        10,
        "the plan was proposed, and decisions are signed",
        _decided,
        {ProposalEntry: _proposed, ApprovalEntry: _signed},
    ),
    Rule(
        11,
        "whoever took part had approved",
        _all_agreed,
        dict.fromkeys((RoundEntry, MetricsEntry), _agreed),
    ),
)
