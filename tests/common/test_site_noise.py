"""Site noise in a plan: what goes with it, what does not, and what `locum plan check` tells."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from locum.common import plan_cli
from locum.common.build import check_buildable
from locum.common.errors import PlanError
from locum.common.sums import most_noised, site_noise
from tests.plans import plan, secured

NOISE = {"epsilon": 8.0, "delta": 1e-6, "clip": 1.0}


def noisy(**changes: Any) -> Any:
    return secured(**{"participation__weighting": "equal", "protection__site_noise": NOISE, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"protection__secure_aggregation": "off"}, "site noise is added within a secure sum"),
        ({"participation__weighting": "cases"}, "set it to 'equal'"),
        ({"release": {"per_site": ["training_loss"]}}, "it is to tell of itself"),
        ({"admission": {"norm_bound": 0.5}}, "no update is larger than admission.norm_bound, 0.5"),
        ({"protection__site_noise": {**NOISE, "epsilon": 0}}, "greater than 0"),
        ({"protection__site_noise": {**NOISE, "delta": 1}}, "less than 1"),
        ({"protection__site_noise": {**NOISE, "clip": None}}, "clip"),
        ({"protection__site_noise": {**NOISE, "spare_rounds": -1}}, "greater than or equal to 0"),
    ],
)
def test_what_does_not_go_with_site_noise_is_refused_with_what_to_do(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        noisy(**changes)


def test_the_noise_is_for_all_rounds_and_one_to_spare() -> None:
    assert most_noised(noisy(rounds=7)) == 8
    assert most_noised(noisy(rounds=7, protection__site_noise={**NOISE, "spare_rounds": 3})) == 10
    assert most_noised(plan()) == 0


def test_a_ring_that_cannot_hold_the_noise_is_told_with_its_remedy() -> None:
    much = {**NOISE, "epsilon": 0.001, "delta": 1e-12}
    (problem,) = check_buildable(noisy(rounds=100_000, protection__site_noise=much))
    assert problem.location == ("protection", "site_noise")
    assert "32 bits cannot hold the noise" in problem.message
    assert problem.remedy == "set protection.ring: 64"
    assert check_buildable(noisy(rounds=100_000, protection__site_noise=much, protection__ring=64)) == []


def test_the_plan_check_tells_how_large_the_noise_is_and_what_has_none(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(noisy().model_dump(mode="json")))
    told = CliRunner().invoke(plan_cli.app, ["check", str(path)]).output
    assert "note: site noise: in the mean of 3 sites the noise has a norm of" in told
    assert "an update one of at most 1;" in told
    assert "the sums of AUC, accuracy, the training loss, the numbers of cases have none" in told


def test_the_page_tells_how_large_the_noise_is(project: Path) -> None:
    page = (project / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for sites, size, epsilon, number, norm in rows:
        noise = {"epsilon": float(epsilon), "delta": 1e-5, "clip": 1.0}
        found = site_noise(noisy(rounds=20, protection__site_noise=noise), sites=int(sites), size=int(size))
        assert found is not None
        assert found.deviation(int(sites)) == pytest.approx(float(number), rel=0.01)
        assert found.deviation(int(sites)) * math.sqrt(int(size)) == pytest.approx(float(norm), rel=0.01)
