"""The facts of a model card, as plain data: what the card says in words, and `model_card.json` for a program.

Rules:
  * A fact is of the plan or of the run. What neither knows is not here: :data:`locum.server.guidelines.NOT_STATED`
    lists what a person must add.
  * The card is written from these facts, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from locum.common.plan import Plan
from locum.common.sums import cells_of
from locum.server import report_words as words
from locum.server.guidelines import NOT_STATED, PARTS
from locum.server.model_card import ModelFile
from locum.server.records import Evaluated, RunSummary
from locum.server.report_results import CellRow, Results, Score, SiteRow, methods

FORMAT = "locum/model-card/1"
GUIDELINES = (
    "CLAIM 2024 Update: Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300",
    "TRIPOD+AI: Collins et al., BMJ 2024;385:e078378",
)
Facts = dict[str, str]


@dataclass(frozen=True)
class Known:
    """What a report knows of a run when it writes the card.

    Attributes:
        run: the run's name; empty in a simulation.
        final: whether the run has ended.
        status: in words.
        summary: the end of the run, or its last committed round.
        measured: the test, or the last validation before it; None if nothing was measured.
        results: what was measured, as rows.
        exact: whether the results are from the cases themselves, with bootstrap intervals over patients.
        folds: by site, its cases of each fold; None of a site that does not tell.
        emulated: the sites whose data a program made.
        model: what the model's file holds.
        privacy_check: what was tried against the model, as in `metrics.json` of a simulation; None if nothing was.
        log: the newest checkpoint of the log when the card was written; None if there is none.
        statement: the SHA-256 of the signed statement on the model; empty if there is none.
    """

    plan: Plan
    run: str
    final: bool
    status: str
    summary: RunSummary
    measured: Evaluated | None
    results: Results
    exact: bool
    folds: Mapping[str, Mapping[Any, int] | None]
    emulated: Sequence[str]
    model: ModelFile
    privacy_check: Mapping[str, Any] | None = None
    log: Mapping[str, Any] | None = None
    statement: str = ""


def facts_of(known: Known) -> dict[str, Any]:
    """The content of `model_card.json`."""
    plan, summary = known.plan, known.summary
    return {
        "format": FORMAT,
        "guidelines": list(GUIDELINES),
        "run": known.run,
        "plan": {"name": plan.name, "digest": plan.digest, "purpose": plan.purpose},
        "status": known.status,
        "final": known.final,
        "parts": {name: {"items": asdict(PARTS[name]), "facts": facts} for name, facts in _parts(known).items()},
        "model": {**asdict(known.model), "absent": list(known.model.absent), "round": summary.round},
        "data": {"cases": {site: dict(told) if told else None for site, told in known.folds.items()},
                 "emulated": list(known.emulated)},
        "sites": {
            "took part": list(summary.sites),
            "left out": dict(summary.excluded),
            "lost": [asdict(loss) for loss in words.losses_of(summary)],
        },
        "results": _results(known),
        "protection": {
            **_protection(plan, summary),
            "words": [{"name": name, "text": text} for name, text in words.protection_words(plan, summary.history)],
        },
        "privacy_check": dict(known.privacy_check) if known.privacy_check else None,
        "versions": dict(words.versions()),
        "log": dict(known.log) if known.log else None,
        "statement": known.statement or None,
        "not_stated": [{"text": item.text, "items": asdict(item.items)} for item in NOT_STATED],
    }  # fmt: skip


# --- the parts in words


def _parts(known: Known) -> dict[str, Facts]:
    plan, told = known.plan, words.plan_words(known.plan)
    return {
        "study": _study(known, told),
        "use": {"Purpose": plan.purpose},
        "model": _model(known, told),
        "data": {"Source": _source(known)},
        "eligibility": _eligibility(plan, told),
        "partitions": _partitions(told),
        "preparation": {"Preparation": told["Preparation"]},
        "training": {topic: told[topic] for topic in _TRAINING} | _made_of(plan),
        "results": _measures(known),
        "subgroups": _subgroups(known),
        "calibration": {"Calibration": _calibration_words(plan)} if known.results.calibration else {},
        "taking part": {},
        "protection": {},
        "limits": {"Patients like these only": _LIKE_THESE, "The model is held fixed": _FIXED},
        "software": dict(words.versions()),
    }


_TRAINING = ("Augmentation", "Loss", "Optimiser", "In one round", "Strategy", "Rounds", "Chosen model", "Seed")
_LIKE_THESE = "all test cases come from the sites that took part in training, split by patient."
_FIXED = "another training of the same plan with another seed gives other numbers."


def _study(known: Known, told: Mapping[str, str]) -> Facts:
    sites = words.many(len(known.summary.sites), "site")
    return {
        "Kind": f"development and internal test of a deep learning model, trained by {known.plan.strategy.name} over "
        f"{sites} whose images stay there",
        "Task": told["Task"],
        "Outcome": told["Classes"],
    }


def _model(known: Known, told: Mapping[str, str]) -> Facts:
    plan = known.plan
    per = "class" if plan.contract.task == "classification" else "class and voxel"
    return {
        "Network": told["Network"],
        "Input": _input(plan),
        "Output": f"one probability per {per}: {', '.join(plan.contract.classes)}",
        "First weights": f"drawn at random from the seed {plan.seed}, or as the network's own code sets them",
        "Of round": f"{known.summary.round} of {plan.rounds}",
    }


def _input(plan: Plan) -> str:
    contract, size = plan.contract, " × ".join(map(str, plan.training.input_size))
    kind = " or ".join(contract.modality) or "any modality"
    return f"{contract.dimensions}D images, {words.many(contract.channels, 'channel')}, {kind}; prepared, {size} voxels"


def _source(known: Known) -> str:
    sites = words.many(len(known.summary.sites), "site")
    own = "cases that fit the plan's contract, as the sites tell them; the images stayed there"
    made = f"; made by a program: {words.listed(known.emulated)}" if known.emulated else ""
    return f"{sites}; {own}{made}"


def _eligibility(plan: Plan, told: Mapping[str, str]) -> Facts:
    lacks = "label of the plan" if plan.contract.task == "classification" else "mask"
    return {
        "Images": told["Task"],
        "Needed of a site": told["Needed of a site"],
        "Not used": f"images outside this; a site takes no part while one of its fitting cases has no {lacks}",
        "Identity": "patients are known by a keyed pseudonym at their site, and by nothing elsewhere",
    }


def _partitions(told: Mapping[str, str]) -> Facts:
    return {
        "Folds": told["Folds"],
        "Apart": "no patient of a site is in two folds; whether one was at two sites is not known",
        "Test": "internal: held-out patients of the sites that took part",
    }


def _made_of(plan: Plan) -> Facts:
    balanced = "in training every class is drawn with equal chance; tests are of the cases as they are"
    plain = "no measure taken: cases are drawn as they are"
    return {
        "Classes of unequal size": balanced if plan.training.sampling == "balanced" else plain,
        "Ensemble": "none: one model",
    }


def _measures(known: Known) -> Facts:
    if known.measured is None or not known.results.metrics:
        return {}
    measured = known.measured
    on = "the test cases" if measured.fold == "test" else f"the validation cases, after round {measured.round}"
    return {"Measured on": on, "Measures": ", ".join(known.plan.evaluation.metrics), "Intervals": intervals(known)}


def intervals(known: Known) -> str:
    """How the 95 % intervals were made, or why there are none."""
    if known.exact:
        return "95 %, percentile bootstrap over patients"
    if known.plan.private is not None:
        return "none: the sums have noise, which the intervals of sums do not know of"
    found = methods(known.results.metrics)
    if not found:
        return "none: the sums of these metrics tell none"
    classes = len(known.plan.contract.classes) > 2
    mean = "; of a mean over classes, the mean of their standard errors, which is never too small" if classes else ""
    return (
        f"95 %, from the sums alone ({found}{mean}). Cases count as independent: where patients have several, the "
        "intervals are too narrow"
    )


def _subgroups(known: Known) -> Facts:
    plan = known.plan
    if not cells_of(plan, "test"):
        return {"Subgroups": "none are named by the plan; sex, age and the like are not known to it"}
    named = [f"{group.by} ({', '.join(group.values)}, other)" for group in plan.evaluation.subgroups]
    return {
        "Subgroups": words.listed(named),
        "Small cells": "a site tells a value apart only if it has patients enough of it (10, unless its policy says "
        "otherwise), and of the others too; what it has too few of counts as other",
        "From": "sums that the sites release, with intervals as those of sums",
    }  # fmt: skip


def _calibration_words(plan: Plan) -> str:
    classes = plan.contract.classes
    of = f"of the probability of '{classes[1]}'" if len(classes) == 2 else "of the probability of the likeliest class"
    shares = "" if plan.private is not None else "; shares with Wilson's intervals"
    return (
        f"{of}, in bins of equal width; the expected calibration error is the mean distance of share and mean "
        f"probability over the bins, by cases (Naeini 2015, Guo 2017){shares}"
    )


# --- numbers


def _results(known: Known) -> dict[str, Any]:
    results = known.results
    found = results.calibration
    return {
        "metrics": [
            {"name": m.name, "unit": m.unit, "more_is_better": m.better > 0, "method": m.method}
            for m in results.metrics
        ],
        "fold": known.measured.fold if known.measured and results.metrics else None,
        "models": [{"name": row.name, "kind": row.kind, "scores": _scores(row.scores)} for row in results.models],
        "cases": results.cases,
        "sites": [_site(row, known.measured) for row in results.sites] if results.metrics else [],
        "worst": results.worst.site if results.worst else None,
        "subgroups": [_cell(row) for row in results.cells],
        "calibration": {"error": found.error, "bins": [asdict(row) for row in found.bins]} if found else None,
        "confusion": results.confusion,
    }  # fmt: skip


def _scores(scores: Sequence[Score]) -> dict[str, Any]:
    return {
        score.metric.name: {
            "value": score.value, "interval": score.interval, "text": score.text, "interval_text": score.interval_text
        }
        for score in scores
    }  # fmt: skip


def _site(row: SiteRow, measured: Evaluated | None) -> dict[str, Any]:
    why = measured.excluded.get(row.site, "") if measured is not None and not row.told else ""
    return {
        "site": row.site,
        "cases": row.cases,
        "told": row.told,
        "scores": _scores(row.scores) if row.told else {},
        "not measured": why,
    }


def _cell(row: CellRow) -> dict[str, Any]:
    return {"by": row.by, "value": row.value, "cases": row.cases, "scores": _scores(row.scores)}


def _protection(plan: Plan, summary: RunSummary) -> dict[str, Any]:
    private, noise = plan.private, plan.protection.site_noise
    sums = [record.secured for record in summary.history if record.secured is not None]
    return {
        "secure_aggregation": plan.secured,
        "rosters": [{"sites": n, "threshold": t} for n, t in sorted({(s.sites, s.threshold) for s in sums})],
        "differential_privacy": None if private is None else {
            "unit": "PATIENT", **private.model_dump(mode="json"), "noise": words.NOISE,
            "spent": words.spent_of(summary.history),
        },
        "site_noise": None if noise is None else noise.model_dump(mode="json"),
        "gradient_clip": plan.training.gradient_clip,
        "norm_bound": plan.admission.norm_bound,
    }  # fmt: skip
