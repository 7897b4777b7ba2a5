"""A run's folder: its state is what its files say, and whatever dies leaves a state that a command can leave."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.common.errors import RunError
from locum.server.event_file import EventReader, last_event, read_events
from locum.server.home import Home
from locum.server.records import Events
from locum.server.runs import Run, all_runs, create_run, find, newest
from tests.peers import Peer, run_peers
from tests.plans import plan

HOLDER = """
import sys, time
from pathlib import Path
from locum.server.runs import Run
with Run(Path(sys.argv[1])).hold():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def _tell(run: Run, kind: str, **fields: Any) -> None:
    events = Events(run.events)
    events.emit(kind, **fields)
    events.close()


def _hold(run: Run, project: Path) -> subprocess.Popen[bytes]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=project
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


# --- what the files say


def test_a_new_run_waits_and_keeps_the_plan_whole(home: Home) -> None:
    of = plan(name="ct-lesions", rounds=7)
    run = create_run(home, of, sites=["b", "a"], by="team")
    status = run.status()
    assert (status.state, status.round, status.rounds) == ("waiting", 0, 7)
    assert "locum server start" in status.remedy
    assert run.plan.digest == run.created.digest == of.digest
    assert run.created.sites == ("a", "b")
    assert run.id.removesuffix(run.id[-5:]).endswith("-ct-lesions")
    assert run.wanted is not None
    assert (run.wanted.want, run.wanted.by) == ("run", "team")


def test_a_run_goes_from_state_to_state_as_its_files_say(home: Home, project: Path) -> None:
    run = create_run(home, plan())
    holder = _hold(run, project)
    assert run.alive() == holder.pid
    assert run.status().state == "running"
    _tell(run, "paused", reason="round 1 stayed below its quorum of 2", missing=["north", "riverside"])
    paused = run.status()
    assert paused.state == "paused"
    assert "north, riverside" in paused.reason
    _tell(run, "resumed")
    assert run.status().state == "running"
    run.want("stop")
    assert run.status().state == "stopping"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert run.alive() is None
    assert run.status().state == "stopped"
    run.want("run")
    assert run.status().state == "restarting"
    run.fail("the sites do not agree", "install the same versions")
    failed = run.status()
    assert (failed.state, failed.reason, failed.remedy) == (
        "failed", "the sites do not agree", "install the same versions",
    )  # fmt: skip
    run.want("run")
    assert run.status().state == "restarting"


def test_a_run_that_ended_has_the_state_of_its_summary_whatever_is_wanted(home: Home) -> None:
    run = create_run(home, plan())
    for told in ("completed", "completed with losses"):
        run.summary.write_text(json.dumps({"status": told, "round": 2}))
        os.utime(run.summary, ns=(0, len(told)))
        run.want("stop")
        assert run.status().state == told
        assert run.status().ended


def test_the_committed_round_is_that_of_the_checkpoints(home: Home) -> None:
    run = create_run(home, plan())
    run_peers(plan(), [Peer("a"), Peer("b")], run.folder)
    assert run.status().round == 2


def test_a_damaged_wish_is_told_and_a_command_mends_it(home: Home) -> None:
    run = create_run(home, plan())
    for content in (b"", b"{}", b"\xff"):
        (run.folder / "wanted.json").write_bytes(content)
        status = run.status()
        assert status.state == "failed"
        assert "wanted.json" in status.reason
        assert f"locum resume {run.id}" in status.remedy
        run.want("run")
        assert run.status().state == "waiting"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["run", "stop", "fail", "event"]), max_size=8))
def test_whatever_was_done_the_state_follows_and_can_be_left(
    tmp_path_factory: pytest.TempPathFactory, done: list[str]
) -> None:
    run = create_run(Home(tmp_path_factory.mktemp("home")), plan())
    want, failed, begun = "run", False, False
    for step in done:
        if step == "fail":
            run.fail("reason", "remedy")
            failed = True
        elif step == "event":
            _tell(run, "round", round=1, attempt=1)
            begun = True
        else:
            run.want(step)  # type: ignore[arg-type]
            want, failed = step, failed and step == "stop"
    expected = "failed" if failed else "stopped" if want == "stop" else "restarting" if begun else "waiting"
    assert run.status().state == expected
    _can_be_left(run)


def _can_be_left(run: Run) -> None:
    """From every state that is no end by itself a run can be made to go on and to stop."""
    run.want("run")
    assert run.status().state in {"waiting", "restarting"}
    run.want("stop")
    assert run.status().state == "stopped"


# --- processes that die


def _killed_at(line: int, action: Callable[[], object]) -> bool:
    """Runs `action` in a child that is killed when it comes to its `line`-th line in our files; whether it was."""
    child = os.fork()
    if child == 0:
        seen = itertools.count(1)

        def trace(frame: FrameType, kind: str, _value: object) -> Any:
            ours = frame.f_code.co_filename.endswith(("common/durable.py", "server/runs.py"))
            if ours and kind == "line" and next(seen) == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace if ours or kind != "call" else None

        sys.settrace(trace)
        action()
        os._exit(0)
    _, code = os.waitpid(child, 0)
    return os.WIFSIGNALED(code)


@pytest.mark.parametrize("failed", [False, True])
@pytest.mark.parametrize("wish", ["run", "stop", "fail"])
def test_kill_9_at_every_line_of_a_change_leaves_the_state_before_or_after_it(
    tmp_path: Path, wish: str, failed: bool
) -> None:
    before: set[str] = {"failed"} if failed else {"waiting"}
    after = {"run": "waiting", "stop": "failed" if failed else "stopped", "fail": "failed"}[wish]
    of, seen = plan(), set()
    for line in itertools.count(1):
        run = create_run(Home(tmp_path / str(line)), of)
        if failed:
            run.fail("first", "remedy")

        def change(run: Run = run) -> None:
            run.fail("second", "remedy") if wish == "fail" else run.want(wish)  # type: ignore[arg-type]

        killed = _killed_at(line, change)
        state = run.status().state
        seen.add(state)
        assert state in before | {after}
        _can_be_left(run)
        if not killed:
            break
    assert line > 8
    assert after in seen


def test_kill_9_at_every_line_of_making_a_run_leaves_a_whole_run_or_none(home: Home) -> None:
    of = plan(rounds=3)
    home.runs.mkdir(parents=True)
    for line in itertools.count(1):
        before = len(all_runs(home))
        killed = _killed_at(line, lambda: create_run(home, of))
        made = all_runs(home)
        assert len(made) in {before, before + 1}
        assert all(run.status().state == "waiting" and run.plan.digest == of.digest for run in made[:1])
        if not killed:
            break
    assert len(all_runs(home)) == before + 1
    assert [path.name for path in home.runs.iterdir() if path.name.endswith(".tmp")] == []
    assert line > 20


def test_kill_9_of_who_holds_a_run_frees_it_at_once(home: Home, project: Path) -> None:
    run = create_run(home, plan())
    holder = _hold(run, project)
    with pytest.raises(RunError, match="another process holds"), run.hold():
        pass
    holder.kill()
    holder.wait()
    with run.hold():
        assert run.alive() == os.getpid()
    assert run.alive() is None


def test_looking_never_keeps_a_process_from_its_run(home: Home, project: Path) -> None:
    """Many who look at the lock, each for an instant, while a process takes it again and again."""
    run = create_run(home, plan())
    (run.folder / "lock").touch()
    code = "import sys\nfrom pathlib import Path\nfrom locum.server.runs import Run\nrun = Run(Path(sys.argv[1]))\n"
    code += "while True: run.alive()"
    lookers = [subprocess.Popen([sys.executable, "-c", code, str(run.folder)], cwd=project) for _ in range(2)]
    try:
        for _ in range(300):
            with run.hold():
                assert run.alive() == os.getpid()
            assert run.alive() is None
    finally:
        for looker in lookers:
            looker.kill()
            looker.wait()


# --- which run


def test_a_run_is_found_by_the_beginning_or_the_end_of_its_name(home: Home) -> None:
    made = [create_run(home, plan(name=name)) for name in ("alpha", "beta", "alpha")]
    assert newest(home) == made[2] == all_runs(home)[0]
    for run in made:
        assert find(home, run.id) == find(home, run.id[-4:]) == run
    assert find(home, made[1].id[:11]) == made[1]
    with pytest.raises(RunError) as several:
        find(home, made[0].id[:8])
    assert all(run.id in several.value.message for run in made)
    with pytest.raises(RunError, match="no run 'gamma'") as none:
        find(home, "gamma")
    assert made[0].id in none.value.remedy


def test_a_coordinator_without_runs_says_how_to_start_one(home: Home) -> None:
    for look in (lambda: newest(home), lambda: find(home, "x")):
        with pytest.raises(RunError) as error:
            look()
        assert "locum run DIGEST" in error.value.remedy


# --- events of a writer that died

LINES = st.lists(
    st.one_of(
        st.builds(lambda n: json.dumps({"at": n / 7, "event": "round", "round": n}).encode(), st.integers(0, 99)),
        st.sampled_from(
            [b"", b"{", b"[1]", b'{"event": "x"}', b'{"at": 1, "event": 2}', b'{"at": 1, "eve', b"\xff\x00"]
        ),
    ),
    max_size=8,
)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_what_is_written_after_a_torn_line_is_read(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    events = Events(path)
    events.emit("paused", reason='{"at": 1, "event": "odd"}' + "x" * 40, missing=[])
    events.close()
    path.write_bytes(path.read_bytes()[:-cut])
    events = Events(path)
    events.emit("resumed")
    events.close()
    assert [event["event"] for event in read_events(path)] == ["resumed"]
    assert (last_event(path) or {})["event"] == "resumed"


@settings(max_examples=60, deadline=None)
@given(LINES, st.binary(max_size=3), st.lists(st.integers(0, 400), max_size=4))
def test_events_are_read_whole_however_the_file_grows(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], rest: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    rest = rest.replace(b"\n", b"")
    content = b"".join(line + b"\n" for line in lines) + rest
    reader, told = EventReader(path), []
    for cut in [*sorted(cuts), len(content)]:
        path.write_bytes(content[:cut])
        told += reader.read()
    assert told == read_events(path)
    assert [event["event"] for event in told] == ["round"] * sum(b"round" in line for line in lines)
    assert last_event(path) == (told[-1] if told else None)
