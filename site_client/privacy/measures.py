"""Metrics of a fold with noise, so that what leaves tells little of any patient.

Rules:
  * A patient counts once: the sums of its cases are averaged, and clipped to the metric's bound.
  * All released metrics are one vector: its L2 bound is the root of the sum of the squares of theirs, and every place
    gets Gaussian noise of standard deviation σ times that, places that no case can reach too.
  * Places that a metric merges are merged first. What is below zero with its noise is told as zero.
  * What is not released has no noise and is not made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from locum.common.build import metric_of
from locum.common.errors import Code, SiteFailure
from locum.common.messages import Tensors
from locum.common.metrics import Floats, Metric, Outcomes
from locum.common.plan import Plan
from locum.site_client.privacy.noise import NoiseSource


def noised_sums(plan: Plan, found: Outcomes, *, multiplier: float, noise: NoiseSource) -> Tensors:
    """The sums of the released metrics over patients, with noise of `multiplier` (σ) times their joint bound.

    Raises:
        SiteFailure: PRIVACY_REFUSED for a metric without bound.
    """
    classes = len(plan.contract.classes)
    metrics = [metric_of(name) for name in plan.released_metrics]
    std = multiplier * math.hypot(*(_bound(metric, classes) for metric in metrics))
    return {metric.name: _noised(metric, found, classes, std, noise) for metric in metrics}


def _bound(metric: Metric, classes: int) -> float:
    if metric.bound is None:
        raise SiteFailure(Code.PRIVACY_REFUSED, f"{metric.name} has no bound")
    return metric.bound(classes)


def _noised(metric: Metric, found: Outcomes, classes: int, std: float, noise: NoiseSource) -> Floats:
    size = metric.length(classes)
    places = np.arange(size) if metric.merge is None else metric.merge(classes)
    total, bound = np.zeros(size), _bound(metric, classes)
    for rows in _patients(found):
        own = metric.sums(found.take(rows), classes) / len(rows)
        norm = float(np.linalg.norm(own))
        total += own * min(1.0, bound / norm) if norm > 0 else 0.0
    merged = np.zeros(size)
    np.add.at(merged, places, total)
    kept = np.unique(places)
    told = np.zeros(size)
    told[kept] = np.maximum(0.0, noise.noised(merged[kept].astype(np.float32), std))
    return told


def _patients(found: Outcomes) -> Iterator[NDArray[np.intp]]:
    """The cases of each patient, by their place."""
    whose = np.unique(found.patients, return_inverse=True)[1]
    for patient in range(whose.max(initial=-1) + 1):
        yield np.flatnonzero(whose == patient)
