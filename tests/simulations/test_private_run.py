"""A private run under secure aggregation, with real agents and workers: what it tells, costs and proves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from locum.common.cli import main
from locum.common.log.entries import MetricsEntry, RoundEntry, read_entry
from locum.common.log.origins import federation_origin
from locum.common.log.store import Log
from locum.server.records import RunSummary
from locum.site_client.privacy.ledger import Ledger
from tests.site_client.privacy.private_plans import private

SITES = ("north", "riverside", "st-anne")
SMALL = {"sites": 3, "patients": 14, "shape": [6, 20, 20], "spacing": [8.0, 6.0, 6.0], "follow_ups": 0.3}
SPLIT = {"train": 0.6, "validation": 0.1, "test": 0.3}
ROUNDS = 2


def typed(*words: object) -> int:
    """The exit code of `locum` with these words."""
    return int(main([str(word) for word in words]) or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulation that has ended, and its bundle."""
    made = tmp_path_factory.mktemp("private")
    plan = private(secure=True, rounds=ROUNDS, contract__split=SPLIT, delta=0.001)
    (made / "plan.yaml").write_text(plan.to_yaml())
    (made / "sites.yaml").write_text(yaml.safe_dump({"emulate": SMALL}))
    run = made / "run"
    assert typed("simulate", made / "plan.yaml", "--sites-file", made / "sites.yaml", "--out", run) == 0
    assert typed("audit", "bundle", "--run-dir", run, "--out", made / "run.zip") == 0
    return made


def _entries(folder: Path) -> list[Any]:
    return [read_entry(line) for line in Log(folder / "run" / "log", federation_origin("simulation")).entries()]


def test_its_record_holds_privacy_included(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert typed("audit", "verify", folder / "run.zip", "--json") == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {check["state"] for check in checks} == {"holds"}


def test_every_site_says_what_each_of_its_contributions_has_cost(folder: Path) -> None:
    entries = _entries(folder)
    rounds = [entry for entry in entries if isinstance(entry, RoundEntry)]
    folds = [entry for entry in entries if isinstance(entry, MetricsEntry)]
    assert [set(entry.spent) for entry in rounds] == [set(SITES)] * ROUNDS
    assert [set(entry.spent) for entry in folds] == [set(entry.sites) for entry in folds]
    assert {entry.fold for entry in folds} == {"validation", "test"}


def test_the_ledger_has_a_reservation_for_each_and_all_of_them_are_committed(folder: Path) -> None:
    for site in SITES:
        rows = Ledger(folder / "run" / "sites" / site / "ledger.sqlite").rows()
        reserved = [(row.purpose, row.round) for row in rows if row.kind == "reserve"]
        assert [number for purpose, number in reserved if purpose == "train"] == [1, 2]
        assert len(reserved) == sum(row.kind == "commit" for row in rows)
        assert not any(row.kind == "unprotected" for row in rows)


def test_no_loss_and_nothing_of_one_site_is_told(folder: Path) -> None:
    summary = RunSummary.model_validate_json((folder / "run" / "run.json").read_bytes())
    assert [record.loss for record in summary.history] == [None] * ROUNDS
    assert (summary.test.per_site, set(summary.test.cases.values())) == ({}, {None})


def test_report_and_card_say_the_unit_and_the_numbers(folder: Path) -> None:
    card = (folder / "run" / "model_card.md").read_text()
    assert "patient" in card.lower()
    assert "epsilon" in card
    assert "No differential privacy" not in (folder / "run" / "report.html").read_text()


def test_each_hospitals_own_log_bears_it_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for site in SITES:
        capsys.readouterr()
        assert typed("audit", "diff", folder / "run.zip", folder / "run" / "sites" / site / "log", "--json") == 0
        assert json.loads(capsys.readouterr().out)["differences"] == []
