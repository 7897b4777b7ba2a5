"""Checks of what each site says of its data: nobody is selected whose data do not meet the contract."""

from __future__ import annotations

import json

from locum.common.audit.rules import Rule, Wrong, some
from locum.common.audit.standing import Standing
from locum.common.log.entries import ReadinessEntry, RosterEntry

#: The key of a contract by which one is known that was written by a version in which sites say this.
_SINCE = "consent"


def _statement(standing: Standing, entry: ReadinessEntry) -> None:
    said = standing.readiness_of(entry.site, entry.statement)
    if said is None:
        raise Wrong(f"what {entry.site} says of its data is not signed by it", "the statement is forged")
    before = standing.ready.get(entry.site)
    if before is not None and said.at <= before.at:
        raise Wrong(
            f"what {entry.site} says of its data is no newer than what it said before", "a statement was played again"
        )
    if (said.site, said.run, said.plan) != (entry.site, entry.run, standing.digest):
        raise Wrong(
            f"what {entry.site} says of its data is about something else", "a statement was taken from elsewhere"
        )


def _selected(standing: Standing, entry: RosterEntry) -> None:
    failing = {site: said.failing for site in entry.sites if (said := standing.ready.get(site)) and not said.ready}
    if failing:
        words = "; ".join(f"{site} ({some(clauses)})" for site, clauses in sorted(failing.items()))
        raise Wrong(f"the data of {words} do not meet the contract", "the model learned from data that it is not for")
    silent = sorted(set(entry.sites) - standing.fresh) if _due(standing) else []
    if silent:
        raise Wrong(
            f"{some(silent)} does not say whether its data meet the contract", "a site was selected without being asked"
        )


def _due(standing: Standing) -> bool:
    """Whether the plan was written by a version in which sites say of their data what they are."""
    contract = json.loads(standing.content).get("contract", {})
    return isinstance(contract, dict) and _SINCE in contract


def _all_ready(standing: Standing) -> str:
    sites = () if standing.roster is None else standing.roster.sites
    if not standing.ready:
        return "the version that ran did not ask for it"
    out = sorted(site for site, said in standing.ready.items() if not said.ready)
    return f"{len(sites)} sites were selected, each with a signed statement" + (f"; {some(out)} was not" if out else "")


RULES = (Rule(19, "whoever was selected met the contract", _all_ready, {
    ReadinessEntry: _statement, RosterEntry: _selected,
}),)  # fmt: skip
