"""The supervisor's back-off, and its patience with runs whose processes die."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from locum.server.home import Home, read_config
from locum.server.runs import create_run
from locum.server.supervisor import Child, Conductor, _Attempt
from tests.plans import plan
from tests.server.coordinator import new_home
from tests.wire.federation import until
from tests.wire.harm import open_superlink


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path)
    made.logs.mkdir()
    (tmp_path / "superlink").mkdir()
    return made


def _child(*command: str) -> Child:
    return Child("child", lambda: list(command))


def _ended(child: Child, home: Home) -> None:
    """Starts a child, however long it should wait, and looks once after its end."""
    child.next_start = 0.0
    assert child.keep(home)
    assert child.process is not None
    child.process.wait()
    assert not child.keep(home)


def test_a_process_that_ends_again_and_again_is_started_ever_later_up_to_half_a_minute(home: Home) -> None:
    child, delays = _child(shutil.which("false") or "false"), []
    for _ in range(10):
        _ended(child, home)
        delays.append(child.delay)
    assert delays == [0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30, 30]


def test_a_process_that_has_lived_for_a_minute_is_started_at_once(home: Home) -> None:
    child = _child(shutil.which("false") or "false")
    _ended(child, home)
    _ended(child, home)
    child.next_start = 0.0
    assert child.keep(home)
    assert child.process is not None
    child.process.wait()
    child.began -= 61
    assert not child.keep(home)
    assert child.delay == 0.2


def test_a_process_that_ended_is_there_again_after_its_delay(home: Home) -> None:
    child = _child(sys.executable, "-c", "import time; time.sleep(600)")
    try:
        assert child.keep(home)
        assert not child.keep(home)
        assert child.process is not None
        before = child.process
        before.kill()
        before.wait()
        until(lambda: child.keep(home), 60)
        assert child.process is not None
        assert child.process.pid != before.pid
        assert child.process.poll() is None
    finally:
        child.stop()
    assert child.process.poll() is not None


def test_a_program_that_cannot_be_started_is_tried_again(home: Home) -> None:
    child = _child(str(home.path / "not-there"))
    assert not child.keep(home)
    assert child.delay == 0.4
    child.command = lambda: [shutil.which("true") or "true"]
    until(lambda: child.keep(home), 60)
    child.stop()


@pytest.mark.slow
def test_a_process_that_does_not_go_is_ended(home: Home) -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    child = _child(sys.executable, "-c", script)
    assert child.keep(home)
    until((home.logs / "child.log").read_bytes, 60)
    child.stop()
    assert child.process is not None
    assert child.process.poll() == -9


def test_a_run_that_failed_too_often_has_all_its_attempts_again_at_once(tmp_path: Path) -> None:
    home = new_home(tmp_path / "coordinator")
    conductor, run = Conductor(home, read_config(home)), create_run(home, plan())
    conductor._attempts[run.id] = attempt = _Attempt(failures=8)
    conductor.look()
    assert run.status().state == "failed"
    run.want("run")
    conductor.look()  # no SuperLink is there to start it
    assert (run.status().state, attempt.failures) == ("waiting", 0)


def test_a_superlink_that_is_away_costs_a_run_no_attempt(tmp_path: Path) -> None:
    with open_superlink(tmp_path) as running:
        conductor, run = Conductor(running.home, running.config), create_run(running.home, plan())
        conductor.look()
        with run.hold():
            pass  # a process has taken the run, and is gone
        running.process.kill()
        for _ in range(30):
            conductor.look()
        assert run.status().state == "waiting"
        run.want("stop")
        conductor.look()
        assert run.status().state == "stopped"
