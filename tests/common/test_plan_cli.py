from __future__ import annotations

import json
from pathlib import Path

import pytest

from locum.common.cli import main
from tests.plans import CLASSIFY, with_changes


def test_a_network_that_cannot_be_made_without_weights_is_checked_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = with_changes(
        CLASSIFY,
        contract={"task": "segmentation", "classes": ["background", "lesion"]},
        transforms=None,
        network={"name": "SwinUNETR", "feature_size": 12},
        loss={"name": "DiceLoss"},
        training={"input_size": [64, 64, 64], "local_steps": 1},
        evaluation={"metrics": ["Dice"]},
    )
    (tmp_path / "plan.yaml").write_text(json.dumps(content))
    assert main(["plan", "check", str(tmp_path / "plan.yaml")]) in (0, None)
    assert "is a plan" in capsys.readouterr().out
