"""The results of a simulation: what the federated model, the pooled one and each site alone do on the test folds.

A simulation owns all the data it made, so here metrics are exact (case by case) and have intervals. A real run has only
the sums that its sites release; under secure aggregation those over all sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from locum.common import build
from locum.common.build import Model
from locum.common.errors import SiteFailure
from locum.common.metrics import Outcomes, bootstrap, join
from locum.common.plan import Fold, Plan
from locum.server.records import CellRecord
from locum.site_client.worker import Worker


@dataclass(frozen=True)
class Tested:
    """One model on the test folds: metric values over all sites' cases and per site, with 95 % intervals.

    `all` and `per_site[site]` map a metric to its value; `intervals` and `site_intervals` to (low, high) or None.
    """

    all: dict[str, Any]
    per_site: dict[str, dict[str, Any]]
    intervals: dict[str, tuple[float, float] | None]
    site_intervals: dict[str, dict[str, tuple[float, float] | None]]
    cases: dict[str, int]


def folds_of(plan: Plan, workers: Mapping[str, Worker]) -> dict[str, dict[Fold, int]]:
    """By site, its cases that fit the plan's contract, by fold; without sites whose data cannot be read."""
    found = {}
    for site, worker in workers.items():
        with suppress(SiteFailure):  # such a site was left out of the run, which tells why
            found[site] = worker.call("describe", plan)[0]["cases"]
    return found


def outcomes_of(
    plan: Plan, workers: Mapping[str, Worker], model: Model, *, round_number: int | None
) -> dict[str, Outcomes]:
    """The outcomes of a model on the test folds of sites that have cases in it.

    `round_number` says which local tensors of a site go with a federation's model; None for a model trained alone.
    """
    found = {}
    for site, worker in workers.items():
        reply, arrays = worker.call("outcomes", plan, model, round=round_number, fold="test")
        found[site] = _outcomes(reply["patients"], arrays, site)
    return found


def _outcomes(patients: list[str], arrays: Mapping[str, np.ndarray], site: str) -> Outcomes:
    named = tuple(f"{site}/{patient}" for patient in patients)
    return Outcomes(named, arrays["labels"], arrays["scores"], arrays["dice"], arrays["surface"])


def scored(plan: Plan, found: Mapping[str, Outcomes], *, draws: int = 1000) -> Tested:
    """Metrics of the outcomes, all together and per site, with bootstrap intervals over patients."""
    classes, rng = len(plan.contract.classes), np.random.default_rng(plan.seed)
    metrics = [build.metric_of(name) for name in plan.evaluation.metrics]
    everything = join(list(found.values()))

    def values(outcomes: Outcomes) -> dict[str, Any]:
        return {metric.name: metric.exact(outcomes, classes) for metric in metrics}

    def intervals(outcomes: Outcomes) -> dict[str, tuple[float, float] | None]:
        return {m.name: bootstrap(m, outcomes, classes, rng=rng, draws=draws) for m in metrics if m.scalar}

    return Tested(
        all=values(everything),
        per_site={site: values(outcomes) for site, outcomes in found.items()},
        intervals=intervals(everything),
        site_intervals={site: intervals(outcomes) for site, outcomes in found.items()},
        cases={site: len(outcomes.patients) for site, outcomes in found.items()},
    )


@dataclass(frozen=True)
class Baselines:
    """What federation is measured against: one model from all data together, and one from each site alone."""

    pooled: Tested
    local: dict[str, Tested]


def baselines(
    plan: Plan,
    sites: Mapping[str, Worker],
    pooled: Worker,
    *,
    tested: Mapping[str, Worker],
    parallel: int,
    told: Callable[[str], None],
) -> Baselines:
    """Trains the baselines with the plan's own steps: as many optimiser steps as the federation had rounds × steps.

    Args:
        plan: the plan.
        sites: the workers of the run's sites, by name.
        pooled: a worker over the stores of all sites.
        tested: those of the sites on whose test folds the models are tested.
        parallel: how many train at once.
        told: called with the name of each model when it is trained.
    """

    def trained(name: str, worker: Worker) -> Model:
        model = worker.call("fit_alone", plan, rounds=plan.rounds)[1]
        told(name)
        return dict(model)

    with ThreadPoolExecutor(parallel) as pool:
        job = pool.submit(trained, "pooled", pooled)
        jobs = {site: pool.submit(trained, site, worker) for site, worker in sites.items()}
        whole, alone = job.result(), {site: job.result() for site, job in jobs.items()}

    def measured(model: Model) -> Tested:
        return scored(plan, outcomes_of(plan, tested, model, round_number=None))

    return Baselines(measured(whole), {site: measured(model) for site, model in alone.items()})


def as_metrics(
    plan: Plan,
    federated: Tested,
    found: Baselines | None,
    *,
    seconds: float,
    round_seconds: list[float],
    cells: Sequence[CellRecord] = (),
) -> dict[str, Any]:
    """The content of `metrics.json`; `cells` are the plan's subgroups, of the sums that the sites released."""
    subgroups = [cell.model_dump(mode="json") for cell in cells]
    test: dict[str, Any] = {"federated": {**_entry(federated), "subgroups": subgroups}}
    if found is not None:
        test["pooled"] = _entry(found.pooled)
        test["local"] = _local_entry(plan, found.local)
    return {
        "plan": plan.name,
        "plan_digest": plan.digest,
        "sites": list(federated.per_site),
        "rounds": plan.rounds,
        "seconds_total": seconds,
        "seconds_per_round": float(np.mean(round_seconds)) if round_seconds else None,
        "test": test,
    }


def _local_entry(plan: Plan, found: Mapping[str, Tested]) -> dict[str, Any]:
    """Sites alone: `per_site` is each site's own model on the pooled test set, `all` the mean of those.

    `own_test` is each site's own model on that site's test cases.
    """
    scalars = [name for name in plan.evaluation.metrics if build.metric_of(name).scalar]
    by_metric = {
        name: [result.all[name] for result in found.values() if result.all[name] is not None] for name in scalars
    }
    return {
        "all": {name: float(np.mean(values)) if values else None for name, values in by_metric.items()},
        "per_site": {site: result.all for site, result in found.items()},
        "own_test": {site: result.per_site.get(site) for site, result in found.items()},
        "intervals": {"per_site": {site: result.intervals for site, result in found.items()}},
    }


def _entry(result: Tested) -> dict[str, Any]:
    return {
        "all": result.all,
        "per_site": result.per_site,
        "intervals": {"all": result.intervals, "per_site": result.site_intervals},
        "sites": list(result.per_site),
        "cases": result.cases,
        "total": sum(result.cases.values()),
    }
