"""Subgroups in a plan: what may be named, and what is summed of each."""

from __future__ import annotations

from typing import Any

import pytest

from locum.common.errors import PlanError
from locum.common.sums import cells_of, metric_lengths
from tests.plans import plan

BY_MAKER = [{"by": "manufacturer", "values": ["SIEMENS", "GE MEDICAL SYSTEMS"]}]
PRIVATE = {
    "protection__differential_privacy": {"epsilon": 4, "delta": 1e-5, "clip": 1.0, "metrics_epsilon": 1},
    "release__training_loss": False,
}


def test_every_released_metric_is_summed_over_each_cell_of_the_test_fold_only() -> None:
    of = plan(evaluation__subgroups=BY_MAKER, release__metrics=["AUC"])
    names = ["manufacturer=SIEMENS", "manufacturer=GE MEDICAL SYSTEMS", "manufacturer=other"]
    assert [cell.key for cell in cells_of(of, "test")] == names
    lengths = metric_lengths(of, "test")
    assert set(lengths) == {"AUC", *(f"{what}@{name}" for what in ("AUC", "cases") for name in names)}
    assert lengths["AUC@manufacturer=other"] == lengths["AUC"]
    assert lengths["cases@manufacturer=other"] == 1
    for fold in ("train", "validation"):
        assert set(metric_lengths(of, fold)) == {"AUC"}


def test_a_plan_that_keeps_counts_back_has_none_of_its_cells() -> None:
    of = plan(evaluation__subgroups=BY_MAKER, release__case_counts=False, participation__weighting="equal")
    assert not [name for name in metric_lengths(of, "test") if name.startswith("cases")]


def test_a_plan_without_subgroups_or_released_metrics_has_no_cell() -> None:
    assert cells_of(plan(), "test") == ()
    assert cells_of(plan(evaluation__subgroups=BY_MAKER, release__metrics=[]), "test") == ()


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"by": "sex", "values": ["F"]}], "manufacturer"),
        ([{"by": "manufacturer", "values": []}], "at least 1"),
        ([{"by": "manufacturer", "values": ["Siemens", "SIEMENS"]}], "a value stands twice"),
        ([{"by": "manufacturer", "values": ["Other"]}], "all values that are not named"),
        ([*BY_MAKER, *BY_MAKER], "manufacturer stands twice"),
    ],
)
def test_a_subgroup_that_says_two_things_or_none_is_refused(groups: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(evaluation__subgroups=groups)


def test_a_private_plan_has_no_subgroups() -> None:
    assert plan(**PRIVATE).private
    with pytest.raises(PlanError, match=r"evaluation\.subgroups"):
        plan(**PRIVATE, evaluation__subgroups=BY_MAKER)
