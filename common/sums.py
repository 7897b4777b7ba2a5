"""What the sites of a plan give to a sum, secure or not: the layout of an upload, equal at both ends.

Weights and losses are relative: w' = min(w, W_max) / W_max with the plan's weight cap W_max, or 1 where all sites count
alike. So an update that keeps to the plan's norm bound C is within the ring's bound after it is multiplied by w'. Under
site noise C is the clip of the noise, and the ring has room for the noise besides.

On the test fold every released metric is also summed over the cases of each cell: of each value that a subgroup of the
plan names, and of all others. What a site has too few of is with the others, so that the cells add up to the whole: a
site that gave nothing of them would be known by what is missing. A cell's sums are named `METRIC@BY=VALUE`, its number
of cases `cases@BY=VALUE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from locum.common import build
from locum.common.plan import Fold, Plan
from locum.common.plan_checks import OTHER
from locum.common.secagg.calibration import Calibration, Promise, calibrated
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
    """Of a round's updates, which have `size` coordinates; raises RingError if the ring cannot hold their noise."""
    lane = [Scalar(WEIGHT, 1, 1.0)]
    if plan.release.training_loss:
        lane.append(Scalar(LOSS, 1, MOST_LOSS))
    noise = site_noise(plan, sites=len(roster.members), size=size)
    if noise is not None:
        return Layout(roster, noise.ring, size, tuple(lane), noise.variance)
    return Layout(roster, _ring(plan, roster), size, tuple(lane))


def most_noised(plan: Plan) -> int:
    """Updates that a site may give to one run under site noise; 0 where the plan has none."""
    noise = plan.protection.site_noise
    return 0 if noise is None else plan.rounds + noise.spare_rounds


def site_noise(plan: Plan, *, sites: int, size: int) -> Calibration | None:
    """What keeps the plan's promise to each of so many sites, if it makes one; raises RingError if the ring cannot."""
    noise = plan.protection.site_noise
    if noise is None:
        return None
    promise = Promise(noise.epsilon, noise.delta, most_noised(plan))
    return calibrated(promise, clip=noise.clip, bits=plan.protection.ring, sites=sites, size=size)


def metrics_layout(plan: Plan, roster: Roster, fold: Fold) -> Layout:
    """Of the metrics of a fold."""
    lane = [Scalar(name, length, MOST_SUM) for name, length in metric_lengths(plan, fold).items()]
    if plan.release.case_counts:
        lane.append(Scalar(CASES, 1, MOST_SUM))
    return Layout(roster, _ring(plan, roster), 0, tuple(lane))


def _ring(plan: Plan, roster: Roster) -> Ring:
    return Ring(plan.protection.ring, len(roster.members), plan.admission.norm_bound)


def metric_lengths(plan: Plan, fold: Fold) -> Mapping[str, int]:
    """How many numbers the sums of each released metric have, over all cases of a fold and over each cell."""
    classes = len(plan.contract.classes)
    whole = {name: build.metric_of(name).length(classes) for name in plan.released_metrics}
    counted = {CASES: 1} if plan.release.case_counts else {}
    of_cells = {cell.of(name): n for cell in cells_of(plan, fold) for name, n in {**whole, **counted}.items()}
    return {**whole, **of_cells}


@dataclass(frozen=True)
class Cell:
    """The cases of one value of a subgroup; the value `other` stands for all that the plan does not name."""

    by: str
    value: str

    @property
    def key(self) -> str:
        """`BY=VALUE`."""
        return f"{self.by}={self.value}"

    def of(self, name: str) -> str:
        """The name of the cell's sums of a metric."""
        return f"{name}@{self.key}"


def cells_of(plan: Plan, fold: Fold) -> tuple[Cell, ...]:
    """The cells that are measured on a fold; none but on the test fold, and none where no metric is released."""
    if fold != "test" or not plan.released_metrics:
        return ()
    return tuple(Cell(group.by, value) for group in plan.evaluation.subgroups for value in (*group.values, OTHER))
