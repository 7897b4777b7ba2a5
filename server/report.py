"""The report and the model card of a real run: `report.html`, which needs no other file, and `model_card.md`.

Rules:
  * Numbers are those that sites released, and sums of those; there is nothing else at a coordinator. What is a part of
    a sum only is not shown by site, and the page says so.
  * Every site is shown, the worst one first; a mean never stands alone.
  * A run that has not ended is called so on top, and nothing of it is called a result.
  * All text is escaped by the templates; only charts of our own making are markup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from locum.common.canonical import sha256_hex
from locum.common.durable import replace_file
from locum.server import report_charts as charts
from locum.server import report_words as words
from locum.server.card_facts import Known, facts_of, intervals
from locum.server.event_file import Event
from locum.server.model_card import MODEL_FILE, model_file, newest_checkpoint, write_card
from locum.server.outcome import Outcome, entry_of, seconds_total
from locum.server.records import Evaluated, RoundRecord, RunSummary
from locum.server.report_charts import Chart
from locum.server.report_results import Results, label, released_metrics, results_of
from locum.server.runs import Status
from locum.server.statement import FILE as STATEMENT_FILE
from locum.server.templates import html

_PAGE, _CARD = "locum.server/report.html.j2", "locum.server/model_card.md.j2"


def write(folder: Path, outcome: Outcome) -> None:
    """Writes `report.html`, `model_card.md` and its facts into a folder that holds the model; raises OSError."""
    context = _context(folder, outcome)
    replace_file(folder / "report.html", html(_PAGE, {**context, **_charts(context)}))
    write_card(folder, _CARD, context, facts_of(context["known"]))


def _context(folder: Path, outcome: Outcome) -> dict[str, Any]:
    """What both templates show."""
    plan, summary, measured = outcome.plan, outcome.summary, outcome.measured
    results, cases = _results(outcome), _cases(outcome.events)
    status = words.status_of(summary) if outcome.final else unfinished(outcome.status, summary)
    known = Known(
        plan=plan,
        run=outcome.run.id,
        final=outcome.final,
        status=status,
        summary=summary,
        measured=measured,
        results=results,
        exact=False,
        folds=cases,
        emulated=(),
        model=model_file(folder / MODEL_FILE, plan),
        log=newest_checkpoint(outcome.run.folder.parents[1] / "log"),
        statement=_digest_of(outcome.run.folder / STATEMENT_FILE) if outcome.final else "",
    )
    return {
        "known": known,
        "intervals": intervals(known),
        "plan": plan,
        "plan_words": words.plan_words(plan),
        "plan_yaml": plan.to_yaml(),
        "run": outcome.run.id,
        "summary": summary,
        "final": outcome.final,
        "status": status,
        "repeated": words.repeated(summary),
        "results": results,
        "measured": measured,
        "measured_words": _measured_words(measured),
        "headline": words.headline(results, measured.fold) if measured and results.metrics else "",
        "contributions": contributions(summary),
        "cases": cases,
        "losses": words.losses_of(summary),
        "timeline": timeline(outcome.run.created.created_at, outcome.events),
        "notices": _notices(outcome.events),
        "protection": words.protection_words(plan, summary.history),
        "versions": words.versions(),
        "model": known.model,
        "seconds_total": seconds_total(outcome),
        "written": datetime.now(UTC),
        "say": words,
        "label": label,
    }


def _digest_of(path: Path) -> str:
    return sha256_hex(path.read_bytes()) if path.exists() else ""


def unfinished(status: Status, summary: RunSummary) -> str:
    """That a run has not ended, why it does not go on if it does not, and what the page is of."""
    why = f": {status.reason.splitlines()[0]}" if status.reason else ""
    return (
        f"This run has not ended: it is {status.state}{why}. What follows is of round {summary.round} of "
        f"{status.rounds}, the last that was committed. There is no final test yet."
    )


def _measured_words(measured: Evaluated | None) -> str:
    if measured is None:
        return ""
    return "the test cases" if measured.fold == "test" else f"the validation cases, after round {measured.round}"


def _results(outcome: Outcome) -> Results:
    plan, measured = outcome.plan, outcome.measured
    nothing = Evaluated(round=0, fold="test", overall={}, per_site={}, cases={})
    scalars = released_metrics(plan) if measured is not None else []
    metrics = {"test": {"federated": entry_of(measured or nothing)}}
    return results_of(plan, metrics, outcome.summary.sites, scalars=scalars)


# --- sites


@dataclass(frozen=True)
class Contribution:
    """What one site gave to the rounds.

    Attributes:
        counted: rounds that count it, of `rounds`.
        missed: the others in words, empty if there are none.
        weight: the least and the most in the mean, in words; empty if it is not told.
        share: its part of all weight, 0 to 1; None if it is not told.
        seconds: mean time of its training; None if it is not told.
        loss: of its last update; None if it is not told.
    """

    site: str
    counted: int
    rounds: int
    missed: str
    weight: str
    share: float | None
    seconds: float | None
    loss: float | None


def contributions(summary: RunSummary) -> list[Contribution]:
    """What every site of the roster gave, those that missed the most first."""
    total = sum(record.weight for record in summary.history)
    found = [_contribution(site, summary, total) for site in summary.sites]
    return sorted(found, key=lambda each: (each.counted, each.site))


def _contribution(site: str, summary: RunSummary, total: float) -> Contribution:
    counted = [record for record in summary.history if site in record.sites]
    weights = [record.weights[site] for record in counted if site in record.weights]
    seconds = [record.train_seconds[site] for record in counted if site in record.train_seconds]
    told = len(weights) == len(counted)
    return Contribution(
        site=site,
        counted=len(counted),
        rounds=len(summary.history),
        missed=words.ranges(summary.lost.get(site, ())),
        weight=_range(weights) if told else "",
        share=sum(weights) / total if told and total else None,
        seconds=fmean(seconds) if seconds else None,
        loss=counted[-1].losses.get(site) if counted else None,
    )


def _range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low}–{high}"


def _cases(events: Sequence[Event]) -> dict[str, Mapping[str, int] | None]:
    """Cases by site and fold, as the sites told them when the run last began; None for a site that does not tell."""
    rosters = [event for event in events if event["event"] == "roster"]
    return dict(sorted(rosters[-1]["cases"].items())) if rosters else {}


def _notices(events: Sequence[Event]) -> dict[str, str]:
    rosters = [event for event in events if event["event"] == "roster"]
    return dict(sorted(rosters[-1]["notices"].items())) if rosters else {}


# --- what happened


def timeline(created_at: float, events: Sequence[Event]) -> list[tuple[str, str]]:
    """When the run began, paused, went on and ended: the time in UTC, and what happened."""
    told = [(created_at, "asked for")]
    for event in events:
        sentence = _happened(event)
        if sentence:
            told.append((event["at"], sentence))
    return [(f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}", sentence) for at, sentence in told]


def _happened(event: Event) -> str:
    """One event in words; empty for what the rounds tell."""
    tell = _SENTENCES.get(event["event"])
    return tell(event) if tell is not None else ""


def _paused(event: Event) -> str:
    missing = words.listed(event.get("missing") or ())
    return f"paused: {event.get('reason', '')}" + (f"; missing: {missing}" if missing else "")


def _keys(event: Event) -> str:
    return f"secure sums were set up: {words.set_up(event)}"


def _void(event: Event) -> str:
    return words.void_of(event, "was")


_SENTENCES: Mapping[str, Callable[[Event], str]] = {
    "started": lambda event: f"went on after round {event['round']}" if event["round"] else "began",
    "paused": _paused,
    "resumed": lambda _: "went on",
    "stopped": lambda _: "was stopped",
    "keys": _keys,
    "void": _void,
    "rolled back": words.rolled_back,
    "failed": lambda event: f"failed: {event.get('reason', '')}",
    "finished": lambda _: "ended",
}


# --- charts


def _charts(context: Mapping[str, Any]) -> dict[str, Any]:
    summary, results = context["summary"], context["results"]
    history: Sequence[RoundRecord] = summary.history
    metrics = released_metrics(context["plan"])
    return {
        "sites_charts": _sites_charts(results) if context["measured"] and results.told else [],
        "reliability_chart": charts.reliability_chart(results.calibration.bins) if results.calibration else None,
        "contributions_chart": charts.contributions_chart(history, summary.sites),
        "curves": charts.all_curves(history, summary.sites, metrics),
        "costs": [charts.time_chart(history), charts.bytes_chart(history)],
        "legend": charts.legend(history, summary.sites, metrics),
    }


def _sites_charts(results: Results) -> list[Chart]:
    overall = results.federated.scores
    return [charts.sites_chart(results.sites, index, overall[index]) for index in range(len(results.metrics))]
