"""kill -9 of everything that a run needs; each run ends as it should and gives the model of one that nobody hurt."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from locum.server.runs import Run
from tests.plans import plan
from tests.wire.federation import Federation, ended, events, locum, model_of, until
from tests.wire.harm import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    Line,
    Taken,
    bits,
    expected,
    hold,
    kill,
    kill_app,
    mend,
    open_peers,
    processes,
    release,
    start,
    told,
)

_LARGE = {"network": {"name": "Classifier", "channels": [32, 64, 128, 256]}, "training__input_size": [16, 16, 16]}
_LARGE["transforms__prepare"] = [
    {"name": "ScaleIntensityRanged", "a_min": -150, "a_max": 250, "b_min": 0.0, "b_max": 1.0, "clip": True},
    {"name": "Resized", "spatial_size": [16, 16, 16]},
]
_QUICK = {"quorum": 2, "deadline": "6 s", "attempts": 1}

PLANS = {
    "app": plan(name="app"),
    "lost": plan(name="lost", rounds=1),
    "parts": plan(name="parts", rounds=3),
    "agents": plan(name="agents"),
    "blobs": plan(name="blobs", **_LARGE),
    "coordinator": plan(name="coordinator"),
    "stopped": plan(name="stopped"),
    "silent": plan(name="silent", participation=_QUICK),
    "quorum": plan(name="quorum", rounds=1, participation={**_QUICK, "quorum": 3}),
}
#: Of the site c.
LINE = Line()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with open_peers(tmp_path_factory.mktemp("federation"), list(PLANS.values()), {"c": LINE}) as federation:
        yield federation


@pytest.fixture
def federation(opened: Federation) -> Iterator[Federation]:
    mend(opened)
    yield opened
    LINE.up = LINE.down = None
    mend(opened)

def show(run, taken):
    print()
    for e in events(run): print(round(e["at"]-run.created.created_at,1), {k:v for k,v in e.items() if k not in("at","per_site","overall","cases", "excluded", "notices","digest")}) 
    for n in "abc": print(n, taken.of(n))


def test_an_agent_is_killed_while_idle_and_while_training(federation: Federation, tmp_path: Path) -> None:
    of, taken = PLANS["agents"], Taken(federation)
    federation.sites["a"].kill()
    hold(federation, TRAIN, "b")
    run = federation.run(of)
    start(federation, "a")
    taken.wait("train 1", "b")
    federation.sites["b"].kill()
    start(federation, "b")
    release(federation)
    assert ended(run) == "completed"
    show(run, taken)
    assert bits(model_of(run)) == expected(of, tmp_path)
    assert taken.of("b", "train 1") == ["train 1"] * 2
    assert taken.of("a", "train 1") == ["train 1"]


def test_a_message_on_its_way_to_an_agent_that_is_killed_reaches_the_next(federation: Federation, tmp_path: Path) -> None:
    of, taken = PLANS["lost"], Taken(federation)
    os.kill(federation.sites["a"].popen.pid, signal.SIGSTOP)
    run = federation.run(of)
    taken.wait("query.describe 0", "b", "c")
    federation.sites["a"].kill()
    start(federation, "a")
    assert ended(run) == "completed"
    show(run, taken)
    assert bits(model_of(run)) == expected(of, tmp_path)


def test_the_superlink_the_superexec_and_the_gateway_are_killed_in_mid_round(federation: Federation, tmp_path: Path) -> None:
    of, taken = PLANS["parts"], Taken(federation)
    hold(federation, TRAIN)
    run = federation.run(of)
    for number, part in enumerate(("superlink", "superexec", "gateway"), 1):
        taken.wait(f"train {number}")
        kill(federation, part)
        release(federation)
        told(run, "committed", round=number)
        hold(federation, TRAIN)
    assert ended(run) == "completed"
    show(run, taken)
    assert bits(model_of(run)) == expected(of, tmp_path)


def test_the_gateway_and_an_agent_are_killed_in_mid_blob(federation: Federation, tmp_path: Path) -> None:
    of, taken = PLANS["blobs"], Taken(federation)
    LINE.up = LINE.down = 500_000
    run = federation.run(of)
    _moving(federation.folder / "c" / "work")
    kill(federation, "gateway")
    LINE.down = None
    _moving(federation.home.spool / run.id / "up" / "c")
    federation.sites["c"].kill()
    LINE.up = None
    start(federation, "c")
    hold(federation, TRAIN, "c")
    taken.wait("train 2", "c")
    LINE.up = 500_000
    release(federation)
    _moving(federation.home.spool / run.id / "up" / "c")
    kill(federation, "gateway")
    LINE.up = None
    assert ended(run) == "completed"
    show(run, taken)
    assert bits(model_of(run)) == expected(of, tmp_path)
    assert taken.of("c", "train 1") == ["train 1"]
    assert taken.of("c", "train 2") == ["train 2"]


def test_a_coordinator_that_was_killed_leaves_nothing_behind_and_goes_on(federation: Federation, tmp_path: Path) -> None:
    of, taken = PLANS["coordinator"], Taken(federation)
    hold(federation, TRAIN)
    run = federation.run(of)
    taken.wait("train 1")
    federation.server.kill()
    until(lambda: not processes(federation.home.path) and run.alive() is None, 60, "a process of the coordinator lives on")
    assert run.status().state == "restarting"
    release(federation)
    federation.start()
    assert ended(run) == "completed"
    show(run, taken)
    assert bits(model_of(run)) == expected(of, tmp_path)


def test_a_run_that_is_stopped_while_sites_train_can_be_resumed(federation: Federation, tmp_path: Path) -> None:
    of, taken = PLANS["stopped"], Taken(federation)
    hold(federation, TRAIN)
    run = federation.run(of)
    taken.wait("train 1")
    locum("stop", run.id, "--home", federation.home.path)
    assert ended(run, 60) == "stopped"
    locum("resume", run.id, "--home", federation.home.path)
    release(federation)
    assert ended(run) == "completed"
    show(run, taken)
    assert bits(model_of(run)) == expected(of, tmp_path)


def test_a_site_that_never_answers_costs_its_contribution_and_no_more(federation: Federation, tmp_path: Path) -> None:
    of, taken = PLANS["silent"], Taken(federation)
    hold(federation, TRAIN, "c")
    run = federation.run(of)
    told(run, "committed", round=1)
    release(federation)
    assert ended(run) == "completed with losses"
    show(run, taken)
    assert bits(model_of(run)) == expected(of, tmp_path, {"c": [1]})


def test_below_quorum_a_run_pauses_until_sites_return_and_can_be_stopped(federation: Federation, tmp_path: Path) -> None:
    of, taken = PLANS["quorum"], Taken(federation)
    hold(federation, TRAIN)
    run = federation.run(of)
    taken.wait("train 1")
    federation.sites["c"].kill()
    release(federation)
    until(lambda: run.status().state == "paused", 60)
    show(run, taken)
    print(run.status())
    locum("stop", run.id, "--home", federation.home.path)
    assert ended(run, 60) == "stopped"
    locum("resume", run.id, "--home", federation.home.path)
    until(lambda: run.status().state == "paused", 60)
    print(run.status())
    start(federation, "c")
    assert ended(run) == "completed"
    show(run, taken)
    assert bits(model_of(run)) == expected(of, tmp_path)


def _moving(folder: Path) -> None:
    until(lambda: any(path.stat().st_size for path in folder.rglob("*.part")), 60, f"no blob is on its way in {folder}")
