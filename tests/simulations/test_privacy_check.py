"""`locum simulate --privacy-check`: the check's numbers, its words, and its failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from locum.common.cli import main
from locum.common.errors import RunError
from locum.simulations import checks
from locum.simulations.cli import _check_privacy
from locum.site_client.check import Losses
from locum.site_client.privacy.accountant import Mechanism
from locum.site_client.privacy.one_run import Audit, audit
from tests.plans import CLASSIFY, plan, with_changes
from tests.simulations.test_report import CLASSIFY as CT_LESIONS
from tests.simulations.test_report import metrics_of, plan_of, write
from tests.site_client.privacy.private_plans import PRIVACY, private

_SITES = {"sites": 2, "patients": 10, "shape": [6, 20, 20], "spacing": [8.0, 6.0, 6.0], "follow_ups": 0.0}
_SPLIT = {"train": 0.5, "validation": 0.2, "test": 0.3}


def _simulated(folder: Path, *options: str, **changes: Any) -> dict[str, Any]:
    content = with_changes(CLASSIFY, contract__split=_SPLIT, rounds=1, **changes)
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    (folder / "sites.yaml").write_text(yaml.safe_dump({"emulate": _SITES}))
    words = ["simulate", str(folder / "plan.yaml"), "--sites-file", str(folder / "sites.yaml")]
    assert not main([*words, "--out", str(folder / "out"), *options])
    found: dict[str, Any] = json.loads((folder / "out" / "metrics.json").read_text())
    return found


def test_a_private_simulation_tells_what_was_tried_against_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    privacy = {"differential_privacy": PRIVACY, "secure_aggregation": "off"}
    metrics = _simulated(tmp_path, "--privacy-check", protection=privacy, release={"training_loss": False})
    found = metrics["privacy_check"]
    assert found["failed"] == {}
    assert set(found["canaries"]) == set(metrics["sites"]) == set(found["membership"]["per_site"])
    for seen in found["canaries"].values():
        assert 0 <= seen["bound"] <= seen["claimed"]
    whole, parts = found["membership"]["all"], found["membership"]["per_site"].values()
    assert whole["members"] == sum(part["members"] for part in parts)
    assert 0 <= whole["auc"]["low"] <= whole["auc"]["value"] <= whole["auc"]["high"] <= 1
    told = capsys.readouterr().out
    page, card = (tmp_path / "out" / name for name in ("report.html", "model_card.md"))
    for text in (told, page.read_text(), card.read_text()):
        assert "no fault was found" in text
    assert all(limit in card.read_text() for limit in found["limits"])
    facts = json.loads((tmp_path / "out" / "model_card.json").read_text())
    assert facts["privacy_check"] == found
    assert 'id="privacy-check"' in page.read_text()


def test_without_differential_privacy_canaries_do_not_apply_and_a_resumed_run_can_be_checked(tmp_path: Path) -> None:
    assert "privacy_check" not in _simulated(tmp_path)
    assert "What was tried against" not in (tmp_path / "out" / "report.html").read_text()
    assert not main(["simulate", "--resume", str(tmp_path / "out"), "--privacy-check"])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["privacy_check"]
    assert found["canaries"] is None
    assert "do not apply" in found["words"]["Canaries"]
    assert found["membership"]["all"] is not None
    assert "Canaries do not apply" in (tmp_path / "out" / "report.html").read_text()


def _audit(*, noise: float) -> Audit:
    """Of a thousand canaries in a step with everybody, under noise that is claimed to be 4."""
    rng = np.random.default_rng(1)
    included = rng.random(1000) < 0.5
    return audit(included + rng.normal(0, noise, 1000), included, Mechanism(4.0, 1.0, 1), 1e-5)


_LOSSES = {"north": Losses(np.arange(5.0), np.arange(7.0)), "south": Losses(np.zeros(0), np.arange(3.0))}


def test_a_fault_at_one_site_ends_the_command_with_an_error_that_names_it() -> None:
    found = checks.as_metrics(private(), _LOSSES, {"north": _audit(noise=4.0), "south": _audit(noise=1.0)})
    assert list(found["failed"]) == ["south"]
    assert found["words"]["Canaries at south"].startswith("FAILED: ")
    with pytest.raises(RunError, match=r"FAILED\n  south: epsilon is at least"):
        _check_privacy({"privacy_check": found})
    _check_privacy({})


def test_a_site_with_nobody_on_one_side_is_part_of_the_whole_and_has_no_number_of_its_own() -> None:
    found = checks.as_metrics(plan(), _LOSSES, {"north": None, "south": None})["membership"]
    assert found["per_site"]["south"] is None
    assert (found["all"]["members"], found["all"]["others"]) == (5, 10)


def test_a_fault_stands_in_the_report_and_the_card(tmp_path: Path) -> None:
    of = plan_of(CT_LESIONS)
    found = checks.as_metrics(private(), _LOSSES, {"north": _audit(noise=1.0), "south": None})
    page, card = write(tmp_path, of, metrics={**metrics_of(of), "privacy_check": found})
    assert "The privacy check FAILED." in page
    assert "FAILED: epsilon is at least" in card
    assert "nobody to compare" in page
    assert "were not tried" in page
