from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from locum.common.cli import main
from locum.common.errors import RunError
from locum.server.home import Home
from locum.server.runs import newest
from locum.simulations.engines import rehearse
from locum.simulations.engines.rehearse import Rehearsal, run_rehearsal
from tests.plans import plan
from tests.wire.federation import locum, until

RUNNER = [sys.executable, "-c", "import sys; from locum.common.cli import main; sys.exit(main())", "simulate"]


def _plan(folder: Path, **changes: object) -> Path:
    path = folder / "plan.yaml"
    path.write_text(plan(contract__least_patients=2, **changes).to_yaml())
    return path


def test_a_rehearsal_whose_agent_ends_is_told_at_once_and_can_be_resumed(tmp_path: Path) -> None:
    of = plan(rounds=1)
    (tmp_path / "plan.yaml").write_text(of.to_yaml())
    dying = Rehearsal(tmp_path, of, ["north"], lambda _: [sys.executable, "-c", "print('no store')"])
    with pytest.raises(RunError, match=r"has ended; see .*north/agent.log"):
        run_rehearsal(dying, lambda _: nullcontext())


_KILLED = """
import os, sys
from locum.common.cli import main
from locum.site_client import enrolment

enrolment._establish = lambda *_: os._exit(9)
main(["site", "enrol", sys.argv[1], "--home", sys.argv[2]])
"""


def test_a_rehearsal_killed_when_the_coordinator_knew_the_site_and_the_site_not_yet_goes_on(tmp_path: Path) -> None:
    one = Rehearsal(tmp_path, plan(), ["north"])
    north = one.site("north")
    north.mkdir(parents=True)
    rehearse._establish(one)
    with rehearse._coordinator(one):
        invitation = north / "invitation.json"
        locum("server", "invite", "north", "--out", invitation, "--home", one.home)
        killed = subprocess.run([sys.executable, "-c", _KILLED, str(invitation), str(north)], check=False)
        assert killed.returncode == 9
        assert not (north / "identity").exists()
        rehearse._enrol(one, "north")
    assert (north / "identity" / "site.pem").exists()


@pytest.mark.parametrize(("protection", "sites"), [("required", "3"), pytest.param("off", "2", marks=pytest.mark.slow)])
def test_a_rehearsal_even_interrupted_gives_the_results_of_the_local_engine_to_the_bit(
    tmp_path: Path, protection: str, sites: str
) -> None:
    path = _plan(tmp_path, rounds=4, protection__secure_aggregation=protection, admission={"norm_bound": 20})
    local, rehearsal = tmp_path / "local", tmp_path / "rehearsal"
    assert not main(["simulate", str(path), "--sites", sites, "--out", str(local)])
    command = [*RUNNER, str(path), "--sites", sites, "--engine", "rehearse", "--out", str(rehearsal)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = rehearsal / "coordinator" / "runs"
    until(lambda: process.poll() is not None or list(runs.glob("*/checkpoints/round-00000[1-9]")), 180)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    assert not (rehearsal / "model.safetensors").exists()
    assert not main(["simulate", "--resume", str(rehearsal)])
    assert (local / "model.safetensors").read_bytes() == (rehearsal / "model.safetensors").read_bytes()
    test = [json.loads((folder / "metrics.json").read_bytes())["test"] for folder in (local, rehearsal)]
    assert test[0] == test[1]
    assert (rehearsal / "report.html").is_file()
    assert newest(Home(rehearsal / "coordinator")).status().state == "completed"
