"""What the sites of a plan give to a secure sum: the layout of an upload, equal at both ends.

Weights and losses are relative: w' = min(w, W_max) / W_max with the plan's weight cap W_max, or 1 where all sites count
alike. So an update that keeps to the plan's norm bound C is within the ring's bound after it is multiplied by w'.
"""

from __future__ import annotations

from collections.abc import Mapping

from locum.common import build
from locum.common.plan import Plan
from locum.common.secagg.ring import Ring, Scalar
from locum.common.secagg.roster import Roster
from locum.common.secagg.upload import Layout

WEIGHT, LOSS, CASES = "weight", "loss", "cases"
#: The largest loss, and the largest sum of a metric or number of cases, of one site.
MOST_LOSS, MOST_SUM = 1e6, 2.0**32


def weight_cap(plan: Plan) -> float:
    """W_max: the weight that counts as 1."""
    return 1.0 if plan.participation.weighting == "equal" else plan.admission.weight_cap


def training_layout(plan: Plan, roster: Roster, size: int) -> Layout:
    """Of a round's updates, which have `size` coordinates."""
    lane = [Scalar(WEIGHT, 1, 1.0)]
    if plan.release.training_loss:
        lane.append(Scalar(LOSS, 1, MOST_LOSS))
    return Layout(roster, _ring(plan, roster), size, tuple(lane))


def metrics_layout(plan: Plan, roster: Roster) -> Layout:
    """Of the metrics of a fold."""
    lane = [Scalar(name, length, MOST_SUM) for name, length in metric_lengths(plan).items()]
    if plan.release.case_counts:
        lane.append(Scalar(CASES, 1, MOST_SUM))
    return Layout(roster, _ring(plan, roster), 0, tuple(lane))


def _ring(plan: Plan, roster: Roster) -> Ring:
    return Ring(plan.protection.ring, len(roster.members), plan.admission.norm_bound)


def metric_lengths(plan: Plan) -> Mapping[str, int]:
    """How many numbers the sums of each released metric have."""
    classes = len(plan.contract.classes)
    return {name: build.metric_of(name).length(classes) for name in plan.released_metrics}
