"""What the shipped plans reach: the numbers that the README and docs/benchmarks.md tell, without their seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from locum.common.cli import main


def _metrics(out: Path, *arguments: object) -> dict[str, Any]:
    assert main(["simulate", *map(str, arguments), "--out", str(out)]) in (0, None)
    content: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return content


def test_the_demo_is_better_than_every_site_alone(tmp_path: Path) -> None:
    test = _metrics(tmp_path / "out", "--baselines")["test"]
    alone = [values["AUC"] for values in test["local"]["per_site"].values()]
    assert len(alone) == 4
    assert test["federated"]["all"]["AUC"] >= 0.90
    assert test["federated"]["all"]["AUC"] > max(alone)


@pytest.mark.slow
def test_hippocampus_reaches_its_dice_at_every_site(project: Path, shared_data: Path, tmp_path: Path) -> None:
    plan, sites = project / "configs/plans/hippocampus.yaml", project / "configs/sites/hippocampus.yaml"
    test = _metrics(tmp_path / "out", plan, "--sites-file", sites, "--data", shared_data)["test"]
    assert {site: values["Dice"] >= 0.85 for site, values in test["federated"]["per_site"].items()} == dict.fromkeys(
        ("A_uint8", "B_max_lt_1500", "C_1500_to_10000", "D_max_ge_10000"), True
    )


@pytest.mark.slow
def test_breastmnist_is_within_three_hundredths_of_pooled_training(
    project: Path, shared_data: Path, tmp_path: Path
) -> None:
    plan, sites = project / "configs/plans/breastmnist.yaml", project / "configs/sites/breastmnist.yaml"
    test = _metrics(tmp_path / "out", plan, "--sites-file", sites, "--data", shared_data, "--baselines")["test"]
    assert test["federated"]["all"]["AUC"] >= test["pooled"]["all"]["AUC"] - 0.03
