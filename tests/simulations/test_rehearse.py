from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from locum.common.cli import main
from locum.server.home import Home
from locum.server.runs import newest
from tests.plans import plan
from tests.wire.federation import until

RUNNER = [sys.executable, "-c", "import sys; from locum.common.cli import main; sys.exit(main())", "simulate"]


def _plan(folder: Path, **changes: object) -> Path:
    path = folder / "plan.yaml"
    path.write_text(plan(contract__least_patients=2, **changes).to_yaml())
    return path


def test_a_rehearsal_even_interrupted_gives_the_results_of_the_local_engine_to_the_bit(tmp_path: Path) -> None:
    path = _plan(tmp_path, rounds=8)
    local, rehearsal = tmp_path / "local", tmp_path / "rehearsal"
    assert not main(["simulate", str(path), "--sites", "2", "--out", str(local)])
    command = [*RUNNER, str(path), "--sites", "2", "--engine", "rehearse", "--out", str(rehearsal)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = rehearsal / "coordinator" / "runs"
    until(lambda: process.poll() is not None or list(runs.glob("*/checkpoints/round-00000[1-9]")), 180)
    process.send_signal(signal.SIGINT)
    process.wait(120)
    assert not main(["simulate", "--resume", str(rehearsal)])
    assert (local / "model.safetensors").read_bytes() == (rehearsal / "model.safetensors").read_bytes()
    test = [json.loads((folder / "metrics.json").read_bytes())["test"] for folder in (local, rehearsal)]
    assert test[0] == test[1]
    assert (rehearsal / "report.html").is_file()
    assert newest(Home(rehearsal / "coordinator")).status().state == "completed"
