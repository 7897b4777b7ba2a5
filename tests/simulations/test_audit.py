"""The record of a simulation is a real one: signed, witnessed by its hospitals, and borne out by their own logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from locum.common.cli import main
from tests.plans import CLASSIFY, with_changes

SITES = ("north", "riverside", "st-anne")
SMALL = {"sites": 3, "patients": 12, "shape": [6, 20, 20], "spacing": [8.0, 6.0, 6.0], "follow_ups": 0.0}
SPLIT = {"train": 0.5, "validation": 0.2, "test": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulation that has ended, and its bundle."""
    made = tmp_path_factory.mktemp("simulation")
    plan = with_changes(
        CLASSIFY, contract__split=SPLIT, protection__secure_aggregation="required", participation__quorum=3
    )
    for name, content in (("plan.yaml", plan), ("sites.yaml", {"emulate": SMALL})):
        (made / name).write_text(yaml.safe_dump(content, sort_keys=False))
    run = made / "run"
    assert typed("simulate", made / "plan.yaml", "--sites-file", made / "sites.yaml", "--out", run) == 0
    assert typed("audit", "bundle", "--run-dir", run, "--out", made / "run.zip") == 0
    return made


def typed(*words: object) -> int:
    """The exit code of `locum` with these words."""
    return int(main([str(word) for word in words]) or 0)


def told(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What it prints as JSON."""
    capsys.readouterr()
    typed(*words, "--json")
    return json.loads(capsys.readouterr().out)


def test_the_record_of_a_simulation_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    authority = folder / "run" / "authority" / "ca.pem"
    found = told(capsys, "audit", "verify", folder / "run.zip", "--authority", authority, "--witnesses", 3)
    assert [check for check in found["checks"] if check["state"] != "holds"] == []
    model, statement = (folder / "run" / name for name in ("model.safetensors", "statement.json"))
    assert typed("audit", "verify-model", model, statement, "--authority", authority) == 0


def test_each_hospitals_log_agrees_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for site in SITES:
        found = told(capsys, "audit", "diff", folder / "run.zip", folder / "run" / "sites" / site / "log")
        assert (found["site"], found["differences"]) == (site, [])
        assert found["compared"] >= 2 + 3 + 1  # updates, measurements, the decision


def test_the_page_of_it_tells_every_round(folder: Path) -> None:
    assert typed("audit", "show", folder / "run.zip", "--out", folder / "record.html") == 0
    text = (folder / "record.html").read_text()
    assert text.count("secure: 3 of 3 had to answer") == 2


def test_a_bundle_without_the_model_is_smaller_and_holds(folder: Path) -> None:
    path = folder / "small.zip"
    assert typed("audit", "bundle", "--run-dir", folder / "run", "--out", path, "--without-model") == 0
    model = (folder / "run" / "model.safetensors").stat().st_size
    assert path.stat().st_size < (folder / "run.zip").stat().st_size - model
    assert typed("audit", "verify", path) == 0


def test_nothing_is_left_where_a_bundle_cannot_be_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("audit", "bundle", "--run-dir", folder / "run", "--out", tmp_path / "nowhere" / "run.zip") == 1
    assert "choose another --out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
