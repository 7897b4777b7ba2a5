"""What a run measured, as rows for tables and charts.

Rules:
  * Every value keeps its interval and, where there is one, its number of cases.
  * A value that does not exist has words that say why; it is never 0.
  * The first scalar metric of the plan is the one by which sites are ordered and the worst one is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from locum.common.build import metric_of
from locum.common.calibration import Reliability, error_of, reliability
from locum.common.metrics import Metric
from locum.common.plan import Plan

#: Why a metric can have no value.
_UNDEFINED = {
    "AUC": "not defined (a class is missing from the test cases)",
    "Dice": "not defined (no such structure in truth or prediction)",
    "surface_distance": "not defined (no surface in truth or prediction)",
}


@dataclass(frozen=True)
class Score:
    """One metric of one model on some cases.

    Attributes:
        value: None where the metric does not exist.
        interval: of 95 %, or None.
    """

    metric: Metric
    value: float | None
    interval: tuple[float, float] | None = None

    @property
    def text(self) -> str:
        """The value in words."""
        return undefined(self.metric) if self.value is None else number(self.metric, self.value)

    @property
    def interval_text(self) -> str:
        """The interval in words, empty if there is none."""
        if self.value is None or self.interval is None:
            return ""
        return " to ".join(number(self.metric, bound, unit=False) for bound in self.interval)

    @property
    def full_text(self) -> str:
        """Value and interval in one phrase."""
        return f"{self.text} (95 % interval {self.interval_text})" if self.interval_text else self.text

    @property
    def rank(self) -> float:
        """Sorts the worst first; what has no value comes last."""
        return float("inf") if self.value is None else self.metric.better * self.value


def number(metric: Metric, value: float, *, unit: bool = True) -> str:
    """A metric's value as printed: three decimals, or two and the unit."""
    if metric.unit:
        return f"{value:.2f} {metric.unit}" if unit else f"{value:.2f}"
    return f"{value:.3f}"


def undefined(metric: Metric) -> str:
    """Why a metric has no value."""
    return _UNDEFINED.get(metric.name, "not defined (no test cases)")


def label(metric: Metric) -> str:
    """A metric's name for a heading."""
    name = metric.name.replace("_", " ")
    return name[0].upper() + name[1:] + (f" ({metric.unit})" if metric.unit else "")


def scalar_metrics(plan: Plan) -> list[Metric]:
    """The plan's metrics that are single numbers, in the plan's order."""
    return [metric for metric in map(metric_of, plan.evaluation.metrics) if metric.scalar]


@dataclass(frozen=True)
class ModelRow:
    """One model on the test cases of all sites."""

    name: str
    kind: str
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class SiteRow:
    """One site's own test cases: the federated model, and what was trained without the federation.

    Attributes:
        cases: test cases; 0 if the site has none, None if it does not tell.
        scores: of the federated model, one a scalar metric.
        alone: of the site's own model on the same cases, without intervals; empty without baselines.
        worst: whether no other site's first metric is worse.
        told: whether the site's own values are known; under secure aggregation they may be a part of a sum only.
    """

    site: str
    cases: int | None
    scores: tuple[Score, ...]
    alone: tuple[Score, ...] = ()
    worst: bool = False
    told: bool = True


@dataclass(frozen=True)
class CellRow:
    """The federated model on the test cases of one value of a subgroup.

    Attributes:
        by: what tells the cases apart, for example `manufacturer`.
        value: as the plan has it, or `other`.
        cases: of all sites; what a site has too few of counts as other. None if it is not told.
        scores: one a scalar metric.
    """

    by: str
    value: str
    cases: int | None
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Calibration:
    """How the probabilities of the federated model stand to what is the case.

    `error` is the expected calibration error over the bins.
    """

    bins: tuple[Reliability, ...]
    error: float


@dataclass(frozen=True)
class Results:
    """The content of `metrics.json` as rows; `models` starts with the federated one, `sites` with the worst.

    `cases` is the number of test cases of all sites; None if it is not told.
    `same_cases` is False if the baselines were tested on other cases too: those of sites left out of the roster.
    """

    metrics: tuple[Metric, ...]
    models: tuple[ModelRow, ...]
    sites: tuple[SiteRow, ...]
    cases: int | None
    confusion: list[list[float]] | None
    site_confusions: dict[str, list[list[float]]]
    same_cases: bool
    cells: tuple[CellRow, ...] = ()
    calibration: Calibration | None = None

    @property
    def federated(self) -> ModelRow:
        """The federated model."""
        return self.models[0]

    @property
    def pooled(self) -> ModelRow | None:
        """The model trained on all data together, if it was."""
        return next((row for row in self.models if row.kind == "pooled"), None)

    @property
    def alone(self) -> list[ModelRow]:
        """The models that each site trained alone."""
        return [row for row in self.models if row.kind == "alone"]

    @property
    def told(self) -> bool:
        """Whether a site's own values are known."""
        return any(row.told for row in self.sites)

    @property
    def worst(self) -> SiteRow | None:
        """The site with the worst first metric; None if fewer than two sites can be compared."""
        return next((row for row in self.sites if row.worst), None)


def released_metrics(plan: Plan) -> list[Metric]:
    """Those of :func:`scalar_metrics` whose sums the sites release."""
    return [metric for metric in scalar_metrics(plan) if metric.name in plan.released_metrics]


def results_of(
    plan: Plan, metrics: Mapping[str, Any], sites: tuple[str, ...], *, scalars: list[Metric] | None = None
) -> Results:
    """Rows from the content of `metrics.json`; `sites` are those of the roster, `scalars` some of the plan's."""
    scalars = scalar_metrics(plan) if scalars is None else scalars
    test = metrics["test"]
    rows = [_site_row(scalars, test, site) for site in sites]
    return Results(
        metrics=tuple(scalars),
        models=tuple(_models(scalars, test)),
        sites=tuple(_worst_first(rows)),
        cases=test["federated"]["total"],
        confusion=test["federated"]["all"].get("confusion"),
        site_confusions={
            site: values["confusion"]
            for site, values in test["federated"]["per_site"].items()
            if values.get("confusion") is not None
        },
        same_cases=test.get("pooled", test["federated"])["cases"] == test["federated"]["cases"],
        cells=tuple(
            CellRow(cell["by"], cell["value"], cell["cases"], _scores(scalars, cell["overall"], cell["intervals"]))
            for cell in test["federated"].get("subgroups", ())
        ),
        calibration=_calibration(test["federated"]["all"].get("calibration"), noisy=plan.private is not None),
    )


def _calibration(table: list[list[float]] | None, *, noisy: bool) -> Calibration | None:
    """The bins of a table; without intervals where it has noise, of which they do not know."""
    error = error_of(table) if table else None
    if not table or error is None:
        return None
    bins = reliability(table)
    return Calibration(tuple(replace(row, interval=None) for row in bins) if noisy else tuple(bins), error)


def methods(metrics: Iterable[Metric]) -> str:
    """By which method each metric's interval comes from sums, in words; empty if none has one."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        if metric.method:
            found.setdefault(metric.method, []).append(metric.name.replace("_", " "))
    return "; ".join(f"{', '.join(names)}: {method}" for method, names in found.items())


def _scores(
    scalars: list[Metric], values: Mapping[str, Any] | None, intervals: Mapping[str, Any] | None
) -> tuple[Score, ...]:
    values, intervals = values or {}, intervals or {}
    return tuple(Score(metric, values.get(metric.name), _pair(intervals.get(metric.name))) for metric in scalars)


def _pair(bounds: Any) -> tuple[float, float] | None:
    return None if bounds is None else (float(bounds[0]), float(bounds[1]))


def _models(scalars: list[Metric], test: Mapping[str, Any]) -> list[ModelRow]:
    names = {"federated": "federated", "pooled": "pooled data"}
    rows = [
        ModelRow(name, kind, _scores(scalars, test[kind]["all"], test[kind]["intervals"]["all"]))
        for kind, name in names.items()
        if kind in test
    ]
    local = test.get("local", {"per_site": {}})
    alone = [
        ModelRow(f"{site} alone", "alone", _scores(scalars, values, local["intervals"]["per_site"].get(site)))
        for site, values in local["per_site"].items()
    ]
    return rows + sorted(alone, key=lambda row: -row.scores[0].rank if row.scores else 0.0)


def _site_row(scalars: list[Metric], test: Mapping[str, Any], site: str) -> SiteRow:
    federated = test["federated"]
    own = test.get("local", {}).get("own_test", {}).get(site)
    return SiteRow(
        site=site,
        cases=federated["cases"].get(site, 0),
        scores=_scores(scalars, federated["per_site"].get(site), federated["intervals"]["per_site"].get(site)),
        alone=_scores(scalars, own, None) if own is not None else (),
        told=site in federated["per_site"],
    )


def _worst_first(rows: list[SiteRow]) -> list[SiteRow]:
    """The rows from the worst first metric to the best, then those without a value; the worst is marked."""
    ordered = sorted(rows, key=lambda row: (row.scores[0].rank if row.scores else 0.0, row.site))
    known = [row for row in ordered if row.scores and row.scores[0].value is not None]
    if len(known) < 2:
        return ordered
    return [replace(known[0], worst=True), *ordered[1:]]
