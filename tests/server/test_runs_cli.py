"""The ML team's commands over a coordinator's folder: what they do, what they refuse, and what they say."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from locum.common.cli import main
from locum.common.envelope import open_proposal
from locum.common.identity import certified_key
from locum.server.authority import load_log_certificate
from locum.server.home import Home
from locum.server.proposals import propose, proposed
from locum.server.registry import Registry
from locum.server.runs import Run, all_runs, create_run, newest
from tests.peers import Failing, Peer
from tests.plans import plan
from tests.server.coordinator import approve, approved_run, enrol, go_on, new_home

SITES = ("north", "riverside", "st-anne")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A coordinator with three enrolled sites."""
    made = new_home(tmp_path_factory.mktemp("coordinator") / "home")
    enrol(made, *SITES)
    return made


def _locum(home: Home, *words: object) -> int:
    return main([*map(str, words), "--home", str(home.path)]) or 0


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("error: ") == 1
    assert " next: " in text
    assert "Traceback" not in text
    return text


def _json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# --- propose


def test_a_proposed_plan_is_signed_and_is_the_plan(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = plan(name="signed")
    (tmp_path / "plan.yaml").write_text(of.to_yaml())
    assert _locum(home, "propose", tmp_path / "plan.yaml", "--by", "A. Researcher") == 0
    said = capsys.readouterr().out
    assert of.digest in said
    assert "not yet approved by north, riverside and st-anne" in said
    assert f"locum site review {of.digest[:12]}" in said
    _, envelope = Registry(home.registry).proposal(of.digest)
    proposal = open_proposal(envelope, certified_key(load_log_certificate(home)))
    assert (proposal.digest, proposal.by) == (of.digest, "A. Researcher")
    assert proposal.parsed_plan().canonical() == of.canonical()


def test_a_plan_proposed_twice_is_one_proposal(home: Home) -> None:
    of = plan(name="twice")
    propose(home, of, "first")
    before = Registry(home.registry).state()
    assert propose(home, of, "second") == of.digest
    assert Registry(home.registry).state() == before
    assert proposed(home, of.digest[:10])[0].by == "first"


def test_a_plan_whose_parts_do_not_build_is_not_proposed(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Registry(home.registry).state()
    text = plan(name="odd").to_yaml().replace("lr: 0.05", "lr: 0.05\n  leaning_rate: 3")
    (tmp_path / "plan.yaml").write_text(text)
    assert _locum(home, "propose", tmp_path / "plan.yaml") == 2
    assert re.search(r"plan.yaml line \d+: optimiser", _error(capsys))
    assert Registry(home.registry).state() == before


def test_a_plan_that_no_site_could_open_is_not_proposed(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(plan(name="named").to_yaml())
    assert _locum(home, "propose", tmp_path / "plan.yaml", "--by", "x" * 201) == 2
    assert "1 to 200 characters" in _error(capsys)
    large = plan(name="large", network={"name": "Classifier", "channels": [4, 8]})
    (tmp_path / "plan.yaml").write_text(large.to_yaml().replace("lr: 0.05", f"lr: 0.05\n  weight_decay: {2**60}"))
    assert _locum(home, "propose", tmp_path / "plan.yaml") == 2
    assert "no canonical form" in _error(capsys)


# --- run


def test_a_plan_runs_only_once_it_is_proposed_and_a_quorum_approves(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    of = plan(name="approved")
    before = len(all_runs(home))
    assert _locum(home, "run", of.digest) == 1
    assert "was proposed" in _error(capsys)
    propose(home, of, "team")
    approve(home, of.digest, "riverside")
    assert _locum(home, "run", of.digest[:8]) == 1
    text = _error(capsys)
    assert "approved by riverside only; not by north and st-anne; its quorum is 2" in text
    assert "--anyway" in text
    assert len(all_runs(home)) == before
    approve(home, of.digest, "north")
    assert _locum(home, "run", of.digest[:8]) == 0
    run = newest(home)
    said = capsys.readouterr().out
    for words in (run.id, "approved by north and riverside", "not yet approved by st-anne", f"locum watch {run.id}"):
        assert words in said
    assert run.created.sites == ("north", "riverside")
    assert run.status().state == "waiting"
    assert _locum(home, "run", of.digest[:8]) == 0
    assert f"{run.id} of the same plan is not at its end" in capsys.readouterr().out


def test_a_run_below_quorum_starts_only_when_asked_twice_and_says_that_it_waits(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    of = plan(name="early")
    propose(home, of, "team")
    assert _locum(home, "run", of.digest, "--anyway") == 0
    assert "it waits until 2 sites have approved" in capsys.readouterr().out
    assert _locum(home, "run", of.digest, "--anyway", "--json") == 0
    told = _json(capsys)
    assert told["digest"] == of.digest
    assert told["approved"] == []
    assert sorted(told["not_approved"]) == list(SITES)
    assert Run(Path(told["folder"])).status().state == "waiting"


def test_a_site_can_be_left_out_of_a_run(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    of = plan(name="without")
    propose(home, of, "team")
    approve(home, of.digest, *SITES)
    assert _locum(home, "run", of.digest[:8], "--without", "nroth") == 1
    assert "no site is called 'nroth'" in _error(capsys)
    assert _locum(home, "run", of.digest[:8], "--without", "north", "--without", "st-anne") == 1
    assert "approved by riverside only" in _error(capsys)
    assert _locum(home, "run", of.digest[:8], "--without", "north", "--json") == 0
    told = _json(capsys)
    assert (told["approved"], told["without"]) == (["riverside", "st-anne"], ["north"])
    assert newest(home).created.without == ("north",)


@pytest.mark.parametrize("digest", ["xyz", "abc", "0" * 64, "../../etc"])
def test_a_digest_that_names_no_plan_is_told(home: Home, capsys: pytest.CaptureFixture[str], digest: str) -> None:
    assert _locum(home, "run", digest) == 1
    _error(capsys)


def test_a_run_that_is_waited_for_ends_with_its_code(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    of = plan(name="waited", rounds=1)
    propose(home, of, "team")
    approve(home, of.digest, *SITES)

    def engine() -> None:
        while not (found := [run for run in all_runs(home) if "-waited-" in run.id]):
            time.sleep(0.01)
        go_on(found[0], [Peer("north"), Peer("riverside"), Failing("st-anne", 108, "")])

    thread = threading.Thread(target=engine)
    thread.start()
    assert _locum(home, "run", of.digest, "--wait", "--json") == 3
    thread.join()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["digest"] == of.digest
    assert lines[-1]["state"] == "completed with losses"
    assert {"started", "committed", "finished"} <= {line["event"] for line in lines[1:]}


# --- stop and resume


def test_stop_and_resume_leave_every_state_that_is_no_end(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    run = create_run(home, plan(name="stopped"))
    for command, state in (
        ("stop", "stopped"), ("stop", "stopped"), ("resume", "waiting"), ("resume", "waiting"), ("stop", "stopped"),
    ):  # fmt: skip
        assert _locum(home, command, run.id[-4:], "--json") == 0
        assert _json(capsys)["state"] == state
    run.fail("the sites do not agree", "install the same versions")
    assert _locum(home, "stop", run.id) == 1
    assert "has failed already" in _error(capsys)
    assert _locum(home, "watch", run.id) == 1
    assert "the sites do not agree\n next: install the same versions\n" in capsys.readouterr().out
    assert _locum(home, "resume", run.id) == 0
    assert "goes on after round 0" in capsys.readouterr().out
    assert run.status().state == "waiting"
    assert run.wanted is not None
    assert run.wanted.by


def test_the_next_commands_that_are_told_find_the_same_coordinator(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run(home, plan(name="next"))
    for words in (("stop", run.id), ("watch", run.id), ("resume", run.id)):
        _locum(home, *words)
        said = capsys.readouterr().out
        told = re.findall(r"locum \w+ \S+(?: --home \S+)?", said)
        assert told
        assert [one for one in told if not one.endswith(f" --home {home.path}") and not one.endswith(",")] == []


def test_a_completed_run_is_neither_stopped_nor_resumed(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    run = create_run(home, plan(name="done", rounds=1))
    go_on(run, [Peer("a"), Peer("b")])
    for command in ("stop", "resume"):
        assert _locum(home, command, run.id) == 1
        assert "has completed" in _error(capsys)
    assert _locum(home, "watch", run.id) == 0
    assert "Completed: all 2 sites contributed to all of 1 round." in capsys.readouterr().out


def test_all_runs_are_listed_with_their_states(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    run = create_run(home, plan(name="listed", rounds=9))
    assert _locum(home, "watch", "--all", "--json") == 0
    told = _json(capsys)
    assert [row["run"] for row in told] == [each.id for each in all_runs(home)]
    assert (told[0]["run"], told[0]["state"], told[0]["rounds"]) == (run.id, "waiting", 9)
    assert _locum(home, "watch", "--all") == 0
    assert run.id in capsys.readouterr().out


# --- pull


def test_pull_says_plainly_that_a_run_has_not_ended(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = approved_run(home, plan(name="pulled", rounds=3), ["p-a", "p-b"])
    assert _locum(home, "pull", run.id, "--out", tmp_path / "out") == 1
    assert "has not committed a round yet" in _error(capsys)
    assert not (tmp_path / "out").exists()
    go_on(run, [Peer("p-a"), Peer("p-b")], rounds=2)
    assert _locum(home, "pull", run.id, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "has not ended, it is restarting: this is the model of round 2 of 3, not the result" in said
    go_on(run, [Peer("p-a"), Peer("p-b")])
    assert _locum(home, "pull", run.id, "--out", tmp_path / "out", "--json") == 0
    told = _json(capsys)
    assert (told["final"], told["round"], told["status"]) == (True, 3, "completed")
    assert _locum(home, "pull", run.id, "--out", tmp_path) == 1
    assert "holds something else" in _error(capsys)
    other = create_run(home, plan(name="other", rounds=1))
    go_on(other, [Peer("a"), Peer("b")])
    assert _locum(home, "pull", other.id, "--out", tmp_path / "out") == 1
    assert f"holds the results of {run.id}" in _error(capsys)


# --- where there is nothing


@pytest.mark.parametrize(
    "words", [["run", "abcdef"], ["watch"], ["watch", "--all"], ["stop", "x"], ["resume", "x"], ["pull", "x"]]
)
def test_a_folder_without_a_coordinator_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert _locum(Home(tmp_path), *words) == 1
    assert "holds no coordinator" in _error(capsys)


@pytest.mark.parametrize("words", [["watch", "x"], ["stop", "x"], ["resume", "x"], ["pull", "x"]])
def test_a_run_that_is_not_there_is_told(home: Home, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert _locum(home, *words) == 1
    assert "no run 'x'" in _error(capsys)
