"""Checks of a run's course: its rounds, who was in them, which model came of which, what was measured, how it ended."""

from __future__ import annotations

from locum.common.audit.rules import Rule, Wrong, some
from locum.common.audit.standing import Standing
from locum.common.log.entries import (
    EndEntry,
    MetricsEntry,
    ReadinessEntry,
    RosterEntry,
    RoundEntry,
    RunEntry,
    SecureSumFields,
    VoidEntry,
)
from locum.common.secagg import LEAST_SITES
from locum.common.secagg.roster import threshold_of

_Mine = RunEntry | ReadinessEntry | RosterEntry | RoundEntry | VoidEntry | MetricsEntry | EndEntry
#: Why a site has no numbers of a fold without that anything was lost: it has no case of it.
_NO_CASE = "NO_DATA"


# --- order


def _of_this_plan(standing: Standing, entry: _Mine) -> None:
    if entry.plan != standing.digest:
        raise Wrong(
            f"it is of the plan {entry.plan[:12]}, and the run's is {standing.digest[:12]}",
            "the sites approved another plan than the one that was run",
        )
    if standing.said == "":
        if not (isinstance(entry, RunEntry) and entry.event == "started"):
            raise Wrong("the run has not been started before this", "the beginning of the run is missing")
    elif standing.said == "ended" and not (isinstance(entry, RunEntry) and entry.event == "resumed"):
        raise Wrong("the run has ended before this", "something was put in after the end")


def _said(standing: Standing, entry: RunEntry) -> None:
    _of_this_plan(standing, entry)
    if entry.event == "started" and standing.said:
        raise Wrong("the run is started a second time", "two runs would pass for one")
    if entry.event == "paused" and standing.said in {"failed", "stopped"}:
        raise Wrong(f"the run had {standing.said} before, and did not go on", "a failure is shown as a pause")


def _with_roster(standing: Standing, entry: RoundEntry | VoidEntry | MetricsEntry) -> None:
    _of_this_plan(standing, entry)
    if standing.roster is None:
        raise Wrong("nothing says who takes part", "the agreement of the sites on one configuration is missing")


def _next_round(standing: Standing, entry: RoundEntry) -> None:
    _with_roster(standing, entry)
    if entry.round != standing.round + 1:
        raise Wrong(
            f"round {entry.round} comes after round {standing.round}",
            "a round is missing, stands twice, or was put elsewhere",
        )
    if entry.round > standing.plan.rounds:
        raise Wrong(f"the plan has {standing.plan.rounds} rounds, and this is round {entry.round}", "it trained longer")


def _ended(standing: Standing, entry: EndEntry) -> None:
    _of_this_plan(standing, entry)
    if standing.said in {"failed", "stopped"}:
        raise Wrong(f"the run had {standing.said} before, and did not go on", "a failure is shown as a success")
    if standing.round != standing.plan.rounds:
        raise Wrong(
            f"the run ended after round {standing.round} of {standing.plan.rounds}", "it was not run to the plan's end"
        )
    if standing.end is not None and (standing.end.model, standing.end.status) != (entry.model, entry.status):
        raise Wrong("the run has ended before, with something else", "one run has two results")


def _course(standing: Standing) -> str:
    if standing.last is None:
        raise Wrong(f"the log has no entry of the run {standing.run}", "this bundle does not show that run")
    return f"{standing.round} of {standing.plan.rounds} rounds"


# --- who was in a round


def _roster(standing: Standing, entry: RosterEntry) -> None:
    least = _least(standing)
    if list(entry.sites) != sorted(set(entry.sites)) or len(entry.sites) < least:
        raise Wrong(
            f"the roster is {some(entry.sites)}, and {least} sites are needed", "fewer took part than was agreed"
        )


def _sites(standing: Standing, entry: RoundEntry) -> None:
    roster, least = () if standing.roster is None else standing.roster.sites, _least(standing)
    if list(entry.sites) != sorted(set(entry.sites)):
        raise Wrong("its sites are not in order, or stand twice", "a site would count twice")
    strangers = sorted({*entry.sites, *entry.refused} - set(roster))
    if strangers:
        raise Wrong(
            f"{some(strangers)} is not in the roster", "a site took part that had not agreed on the configuration"
        )
    if len(entry.sites) < least:
        raise Wrong(
            f"{len(entry.sites)} sites are in it, and {least} are needed", "the round is below the plan's quorum"
        )
    unsaid = sorted(set(roster) - set(entry.sites) - set(entry.refused))
    if unsaid or set(entry.sites) & set(entry.refused):
        raise Wrong(
            f"of {some(unsaid or entry.refused)} nothing says whether it is in", "a site was left out without a reason"
        )
    _secured(standing, entry, len(roster))


def _secured(standing: Standing, entry: RoundEntry, roster: int) -> None:
    if standing.plan.secured and entry.secured is None:
        raise Wrong("its sum was not a secure one", "the coordinator has seen each site's update, against the plan")
    if entry.secured is not None:
        _check_sum(entry.secured, entry, roster)


def _check_sum(of: SecureSumFields, entry: RoundEntry, roster: int) -> None:
    if set(of.uploads) != set(entry.sites):
        raise Wrong("the uploads in its sum are not those of its sites", "the sum is over others than it says")
    if not LEAST_SITES <= of.sites <= roster:
        raise Wrong(f"its keys were those of {of.sites} sites, of a roster of {roster}", "the sum is over other sites")
    if of.threshold != threshold_of(of.sites) or len(entry.sites) < of.threshold:
        raise Wrong(
            f"{len(entry.sites)} sites gave, the threshold is told as {of.threshold} and is {threshold_of(of.sites)}",
            "a sum of so few sites is one that the sites do not unmask",
        )


def _least(standing: Standing) -> int:
    return max(standing.plan.participation.quorum, LEAST_SITES if standing.plan.secured else 1)


def _all_sites(standing: Standing) -> str:
    fewest = min(map(len, standing.counted.values()), default=0)
    of = 0 if standing.roster is None else len(standing.roster.sites)
    return f"at least {fewest} of {of} sites in every round, quorum {standing.plan.participation.quorum}"


# --- which model came of which


def _stands_at(standing: Standing, entry: RosterEntry) -> None:
    if entry.round > standing.round:
        raise Wrong(f"the run goes on at round {entry.round}, and the last is {standing.round}", "rounds are missing")
    known = standing.models.get(entry.round)
    if standing.roster is not None and known != entry.model:
        raise Wrong(_other(entry.model, entry.round, known), "the model was exchanged between two rounds")


def _start(standing: Standing, entry: RoundEntry) -> None:
    before = standing.models.get(entry.round - 1)
    if entry.start == before:
        return
    if standing.plan.evaluation.rollback is None or entry.start not in standing.models.values():
        ended = before[:12] if before else "none"
        raise Wrong(
            f"it starts from the model {entry.start[:12]}, and round {entry.round - 1} ended with {ended}",
            "the model was exchanged between two rounds",
        )


def _measured(standing: Standing, entry: MetricsEntry) -> None:
    known = standing.models.get(entry.round)
    if known != entry.model:
        raise Wrong(_other(entry.model, entry.round, known), "these numbers are of a model that the run has not made")


def _released(standing: Standing, entry: EndEntry) -> None:
    known = standing.models.get(entry.round)
    if known != entry.model:
        raise Wrong(_other(entry.model, entry.round, known), "the model was swapped at the end")


def _other(model: str, number: int, known: str | None) -> str:
    return f"it names {model[:12]} as the model of round {number}, which is {known[:12] if known else 'not there'}"


def _lineage(standing: Standing) -> str:
    return f"an unbroken line from the first model to that of round {standing.round}"


# --- what was measured


def _metrics(standing: Standing, entry: MetricsEntry) -> None:
    plan, roster = standing.plan, () if standing.roster is None else standing.roster.sites
    strangers = sorted({*entry.sites, *entry.per_site} - set(roster))
    if strangers:
        raise Wrong(f"{some(strangers)} is not in the roster", "a site was measured that does not take part")
    unsaid = sorted(set(roster) - set(entry.sites) - set(entry.refused)) if plan.released_metrics else []
    if unsaid:
        raise Wrong(f"of {some(unsaid)} nothing says whether it is in", "a site was left out without a reason")
    if plan.secured and entry.overall and len(set(entry.sites)) < LEAST_SITES:
        raise Wrong(f"its sum is over {len(set(entry.sites))} sites", "it tells the numbers of single sites")
    unknown = sorted(
        {name for told in (entry.overall, *entry.per_site.values()) for name in told} - set(plan.released_metrics)
    )
    if unknown:
        raise Wrong(f"{some(unknown)} was told", "more left the sites than the plan releases")
    if entry.per_site and not plan.tells("metrics"):
        raise Wrong(
            f"the numbers of {some(list(entry.per_site))} are told by themselves", "the plan releases sums only"
        )


def _all_metrics(standing: Standing) -> str:
    end, test = standing.end, standing.test
    if end is None:
        return "no final test, for the run has no end"
    if not standing.plan.released_metrics:
        return "the plan releases no metric"
    if test is None or (test.round, test.model) != (end.round, end.model):
        raise Wrong(
            "there is no final test of the released model", "the numbers of the final test are of another model"
        )
    return f"the final test is of the released model, over {len(test.sites)} sites"


# --- how it ended


def _status(standing: Standing, entry: EndEntry) -> None:
    if entry.status == "completed" and (lost := _lost(standing)):
        raise Wrong(f"the run is called completed, and {lost}", "what was lost is not told")


def _lost(standing: Standing) -> str:
    """What the run did without, in words; empty if nothing."""
    roster, test = standing.roster, standing.test
    if roster is not None and roster.excluded:
        return f"{some(sorted(roster.excluded))} could not take part"
    for number, sites in standing.counted.items():
        if roster is not None and set(sites) != set(roster.sites):
            return f"round {number} did without {some(sorted(set(roster.sites) - set(sites)))}"
    untested = [] if test is None else [site for site, word in test.refused.items() if word != _NO_CASE]
    return f"{some(untested)} is not in the final test" if untested else ""


def _end(standing: Standing) -> str:
    if standing.end is not None:
        return f"{standing.end.status}, with the model of round {standing.end.round}"
    return f"the run has no end; the last that was said of it is '{standing.said or 'nothing'}'"


RULES = (
    Rule(12, "the run went its course", _course, {
        RunEntry: _said, ReadinessEntry: _of_this_plan, RosterEntry: _of_this_plan, RoundEntry: _next_round,
        VoidEntry: _with_roster, MetricsEntry: _with_roster, EndEntry: _ended,
    }),
    Rule(13, "each round has its sites", _all_sites, {RosterEntry: _roster, RoundEntry: _sites}),
    Rule(14, "each model came of the one before", _lineage, {
        RosterEntry: _stands_at, RoundEntry: _start, MetricsEntry: _measured, EndEntry: _released,
    }),
    Rule(15, "what was measured is what the plan releases", _all_metrics, {MetricsEntry: _metrics}),
)  # fmt: skip
LAST = (Rule(17, "the end is called what it was", _end, {EndEntry: _status}),)
