"""The report and the model card of a simulation: `report.html`, which needs no other file, and `model_card.md`.

Rules:
  * Every site is shown, the worst one first; a mean never stands alone.
  * Everything that a run did without is listed with its reason.
  * All text is escaped by the templates; only charts and pictures of our own making are markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from locum.common.durable import replace_file
from locum.common.plan import Plan
from locum.server import report_charts as charts
from locum.server import report_words as words
from locum.server.card_facts import Known, facts_of, intervals
from locum.server.model_card import MODEL_FILE, model_file, newest_checkpoint, write_card
from locum.server.records import RunSummary
from locum.server.report_charts import Chart
from locum.server.report_results import Results, label, number, results_of, scalar_metrics, undefined
from locum.server.templates import html
from locum.simulations.report_data import SiteData, asked_words, quarantined
from locum.simulations.report_pictures import Picture, pictures_each, pictures_of, shown

__all__ = ["Picture", "pictures_each", "pictures_of", "write"]


def write(
    folder: Path,
    plan: Plan,
    *,
    summary: RunSummary,
    metrics: Mapping[str, Any],
    data: list[SiteData],
    pictures: Sequence[Picture],
) -> None:
    """Writes `report.html`, `model_card.md` and its facts into a run's folder that holds `model.safetensors`.

    Args:
        folder: the run's folder; `simulation.json` is used where it is.
        plan: the run's plan.
        summary: the end of the run.
        metrics: the content of `metrics.json`.
        data: of every site, also of those that were left out of the roster.
        pictures: sample pictures, in the order in which they are shown.

    Raises:
        OSError: the model cannot be read, or a file cannot be written.
    """
    context = _context(folder, plan, summary, metrics, data)
    page = {**context, **_charts(context), "pictures": [shown(picture) for picture in pictures]}
    replace_file(folder / "report.html", html("locum.simulations/report.html.j2", page))
    write_card(folder, "locum.simulations/model_card.md.j2", context, facts_of(context["known"]))


def _context(
    folder: Path, plan: Plan, summary: RunSummary, metrics: Mapping[str, Any], data: list[SiteData]
) -> dict[str, Any]:
    """What both templates show."""
    results = results_of(plan, metrics, summary.sites)
    known = Known(
        plan=plan,
        run="",
        final=True,
        status=words.status_of(summary),
        summary=summary,
        measured=summary.test,
        results=results,
        exact=True,
        folds={site.site: site.folds or None for site in data},
        emulated=tuple(site.site for site in data if site.emulated),
        model=model_file(folder / MODEL_FILE, plan),
        privacy_check=metrics.get("privacy_check"),
        log=newest_checkpoint(folder / "log") or newest_checkpoint(folder / "coordinator" / "log"),
    )
    return {
        "known": known,
        "intervals": intervals(known),
        "plan": plan,
        "plan_words": words.plan_words(plan),
        "plan_yaml": plan.to_yaml(),
        "summary": summary,
        "status": known.status,
        "headline": words.headline(results),
        "comparison": words.comparison(results),
        "results": results,
        "released": _released(plan, summary),
        "losses": words.losses_of(summary),
        "repeated": words.repeated(summary),
        "data": data,
        "quarantined": quarantined(data),
        "asked": asked_words(folder) | {"Baselines": "trained" if results.pooled else "not trained"},
        "privacy_check": metrics.get("privacy_check"),
        "protection": words.protection_words(plan, summary.history),
        "versions": words.versions(),
        "model": known.model,
        "seconds_total": metrics["seconds_total"],
        "written": datetime.now(UTC),
        "say": words,
        "label": label,
    }


def _released(plan: Plan, summary: RunSummary) -> list[tuple[str, str]]:
    """The test metrics as a coordinator knows them: from the sums that sites release."""
    found = []
    for metric in scalar_metrics(plan):
        if metric.name in plan.released_metrics:
            value = summary.test.overall.get(metric.name)
            text = number(metric, value) if isinstance(value, float) else undefined(metric)
            found.append((label(metric), text))
    return found


# --- charts


def _charts(context: Mapping[str, Any]) -> dict[str, Any]:
    summary, results = context["summary"], context["results"]
    return {
        "models_charts": _models_charts(results),
        "sites_charts": _sites_charts(results),
        "reliability_chart": charts.reliability_chart(results.calibration.bins) if results.calibration else None,
        "curves": charts.all_curves(summary.history, summary.sites, results.metrics),
        "costs": [charts.time_chart(summary.history), charts.bytes_chart(summary.history)] if summary.history else [],
        "legend": charts.legend(summary.history, summary.sites, results.metrics),
    }


def _models_charts(results: Results) -> list[Chart]:
    if len(results.models) < 2:
        return []
    return [charts.models_chart(results.models, index) for index in range(len(results.metrics))]


def _sites_charts(results: Results) -> list[Chart]:
    overall = results.federated.scores
    return [charts.sites_chart(results.sites, index, overall[index]) for index in range(len(results.metrics))]
