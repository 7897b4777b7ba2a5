"""Checks of what each site says it has spent of its patients' privacy."""

from __future__ import annotations

from locum.common.audit.rules import Rule, Wrong, some
from locum.common.audit.standing import Standing
from locum.common.envelope import Spent
from locum.common.log.entries import MetricsEntry, RoundEntry
from locum.common.plan import DifferentialPrivacy

#: What the last digit of an epsilon may differ by.
_SLACK = 1e-9


def _round(standing: Standing, entry: RoundEntry) -> None:
    privacy = standing.plan.private
    _check_all(standing, entry, "train", None if privacy is None else privacy.epsilon)


def _fold(standing: Standing, entry: MetricsEntry) -> None:
    plan = standing.plan
    _check_all(
        standing, entry, entry.fold, plan.private.metrics_epsilon if plan.private and plan.released_metrics else None
    )


def _check_all(standing: Standing, entry: RoundEntry | MetricsEntry, purpose: str, most: float | None) -> None:
    strangers = sorted(set(entry.spent) - set(entry.sites))
    if strangers:
        raise Wrong(f"{some(strangers)} says what it spent and is not in it", "the statement belongs elsewhere")
    privacy = standing.plan.private
    if privacy is None:
        if entry.spent:
            raise Wrong("sites say what they spent, of a plan without differential privacy", "this is of another plan")
        return
    silent = sorted(set(entry.sites) - set(entry.spent)) if most is not None else []
    if silent:
        raise Wrong(f"{some(silent)} does not say what it has spent", "what was learned of its patients is not bounded")
    for site, envelope in entry.spent.items():
        said = _opened(standing, entry, site, envelope, purpose)
        _check_grown(standing, said)
        _check_bound(said, privacy, 0.0 if most is None else most)


def _opened(standing: Standing, entry: RoundEntry | MetricsEntry, site: str, envelope: str, purpose: str) -> Spent:
    said = standing.spent_of(site, envelope)
    if said is None:
        raise Wrong(f"what {site} has spent is not signed by it", "the statement is forged")
    about = (said.site, said.run, said.plan, said.round, said.purpose)
    if about != (site, entry.run, entry.plan, entry.round, purpose):
        raise Wrong(f"what {site} has spent is said of something else", "a statement was taken from elsewhere")
    return said


def _check_grown(standing: Standing, said: Spent) -> None:
    before = standing.spent.get((said.site, said.purpose))
    if before is None:
        return
    if said.epsilon < before.epsilon - _SLACK:
        raise Wrong(
            f"{said.site} has spent epsilon {said.epsilon:g}, and had spent {before.epsilon:g} before",
            "nothing that is spent comes back",
        )
    if said == before:
        raise Wrong(
            f"what {said.site} says it has spent stands in the log already",
            "what it has spent since then is kept back; each answer has a statement of its own",
        )


def _check_bound(said: Spent, privacy: DifferentialPrivacy, most: float) -> None:
    if said.epsilon > most * (1 + _SLACK) or said.delta > privacy.delta * (1 + _SLACK):
        raise Wrong(
            f"{said.site} has spent epsilon {said.epsilon:g} at delta {said.delta:g}, and the plan allows {most:g} at "
            f"{privacy.delta:g}",
            "more was learned of its patients than its stewards approved",
        )


def _totals(standing: Standing) -> str:
    if standing.plan.private is None:
        return "the plan has no differential privacy: nothing bounds what the model tells of a patient"
    spent = [said.epsilon for (_, purpose), said in standing.spent.items() if purpose == "train"]
    return f"epsilon up to {max(spent, default=0.0):.3g} of {standing.plan.private.epsilon:g}, signed by each site"


RULES = (Rule(16, "privacy was spent within the plan", _totals, {RoundEntry: _round, MetricsEntry: _fold}),)
