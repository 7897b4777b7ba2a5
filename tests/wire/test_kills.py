"""kill -9 of everything that a run needs, and sites that are gone: each run ends as it should, and with the same model.

What a run gives is compared, to the bit, with what a run in one process gives without the contributions that were lost.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from locum.common.messages import DESCRIBE, EVALUATE, TRAIN
from locum.server.runs import Run
from locum.simulations.federations import FederationSpec
from locum.simulations.federations import federation as hospitals
from locum.simulations.preparation import prepare_site
from locum.site_client.journal import Journal
from tests.peers import Peer, run_peers
from tests.plans import plan
from tests.wire.federation import Federation, ended, events, locum, model_of, until
from tests.wire.harm import (
    PEERS,
    Line,
    Taken,
    bits,
    computed,
    expected,
    hold,
    kill,
    kill_app,
    listening,
    mend,
    moving,
    open_peers,
    processes,
    release,
    start,
    told,
    writer,
)

#: A network whose model does not fit into a message.
_LARGE: dict[str, Any] = {
    "network__channels": [32, 64, 128, 256],
    "training__input_size": [16, 16, 16],
    "transforms__prepare": [
        {"name": "ScaleIntensityRanged", "a_min": -150, "a_max": 250, "b_min": 0.0, "b_max": 1.0, "clip": True},
        {"name": "Resized", "spatial_size": [16, 16, 16]},
    ],
}
_SHORT = {"quorum": 2, "deadline": "8 s", "attempts": 1}
_LONG = {"quorum": 2, "deadline": "3 min"}

_PHASES = plan(name="phases", rounds=1)
_BLOBS = plan(name="blobs", participation=_LONG, **_LARGE)
_COORDINATOR = plan(name="coordinator")
_LOSSES = plan(name="losses", participation=_SHORT)

_AGENTS = plan(name="agents", rounds=1)
_PARTS = plan(name="parts", rounds=3)
_BETWEEN = plan(name="between", rounds=1)
_RETURN = plan(name="return", rounds=1, participation={**_SHORT, "quorum": 3})
_NEVER = plan(name="never", rounds=3, participation=_SHORT)
_WORKER = plan(name="worker", training__local_steps=2000)
_STORM = plan(name="storm", rounds=8, participation=_LONG)
_PLANS = (_PHASES, _BLOBS, _COORDINATOR, _LOSSES)
_SLOW = (_AGENTS, _PARTS, _BETWEEN, _RETURN, _NEVER, _WORKER, _STORM)

#: The way of the site c.
_LINE = Line()
#: Bytes a second at which a blob takes long enough to be hurt.
_SLOWLY = 500_000


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Federation]:
    plans = (*_PLANS, *_SLOW) if request.config.getoption("--slow") else _PLANS
    with open_peers(tmp_path_factory.mktemp("federation"), plans, {"c": _LINE}) as federation:
        yield federation


@pytest.fixture
def federation(opened: Federation) -> Iterator[Federation]:
    yield opened
    _LINE.up = _LINE.down = None
    mend(opened)


def test_blobs_arrive_whoever_dies_on_the_way_and_nothing_is_trained_twice(
    federation: Federation, tmp_path: Path
) -> None:
    taken = Taken(federation)
    _LINE.up = _LINE.down = _SLOWLY
    run = federation.run(_BLOBS)
    uploads = federation.home.spool / run.id / "up" / "c"

    moving(federation.folder / "c" / "work")
    kill(federation, "gateway")  # while a model goes out
    _LINE.down = None
    moving(uploads)
    federation.sites["c"].kill()  # while its finished update goes up
    kill(federation, "superlink")
    _LINE.up = None
    start(federation, "c")
    hold(federation, TRAIN)
    taken.wait("train 2")
    _LINE.up = _SLOWLY
    release(federation)
    moving(uploads)
    kill(federation, "gateway")  # while an update comes in
    _LINE.up = None

    assert ended(run) == "completed"
    assert bits(model_of(run)) == expected(_BLOBS, tmp_path)
    assert [taken.of(name, f"train {number}") for number in (1, 2) for name in PEERS] == [1] * 6
    until(lambda: not uploads.exists(), 60, "the blobs of a run that has ended lie there still")


def test_the_runs_process_is_killed_in_each_phase_of_a_round(federation: Federation, tmp_path: Path) -> None:
    taken = Taken(federation)
    hold(federation, DESCRIBE)
    run = federation.run(_PHASES)
    taken.wait("query.describe 0")
    kill_app(run)  # before the roster
    hold(federation, TRAIN)
    release(federation, DESCRIBE)
    taken.wait("train 1")
    kill_app(run)  # while sites train
    hold(federation, EVALUATE)
    release(federation, TRAIN)
    taken.wait("evaluate 1")
    kill(federation, "superexec")  # committed, not evaluated; the process ends with the one that started it
    release(federation)
    told(run, "evaluated", round=1)
    kill_app(run)  # evaluated, no result
    assert ended(run) == "completed"
    assert bits(model_of(run)) == expected(_PHASES, tmp_path)
    assert len(events(run, "committed")) == 1


def test_a_coordinator_that_is_killed_leaves_nothing_behind_and_goes_on_by_itself(
    federation: Federation, tmp_path: Path
) -> None:
    taken = Taken(federation)
    hold(federation, TRAIN)
    run = federation.run(_COORDINATOR)
    taken.wait("train 1")
    open_ports = {name: listening(federation.pid_of(name)) for name in ("superlink", "superexec", "gateway")}
    assert {address.rpartition(":")[0] for address in set.union(*open_ports.values())} == {"127.0.0.1"}

    federation.server.kill()
    until(lambda: not processes(federation.home.path) and run.alive() is None, 60, "a process lives on")
    assert run.status().state == "restarting"
    federation.start()
    release(federation)
    told(run, "committed", round=1)

    hold(federation, TRAIN)
    taken.wait("train 2")
    locum("stop", run.id, "--home", federation.home.path)
    assert ended(run, 60) == "stopped"  # and no site has answered
    assert taken.of("a", "evaluate 2") == 0
    locum("resume", run.id, "--home", federation.home.path)
    release(federation)
    assert ended(run) == "completed"
    assert bits(model_of(run)) == expected(_COORDINATOR, tmp_path)


def test_a_site_that_does_not_answer_is_lost_for_the_round_and_below_quorum_the_run_pauses(
    federation: Federation, tmp_path: Path
) -> None:
    taken = Taken(federation)
    hold(federation, TRAIN, "c")
    hold(federation, EVALUATE, "a")
    run = federation.run(_LOSSES)
    told(run, "committed", round=1)
    release(federation, TRAIN)
    taken.wait("evaluate 1", "c")

    hold(federation, TRAIN, "b", "c")
    release(federation, EVALUATE)
    until(lambda: run.status().state == "paused", 120)
    assert events(run, "paused")[0]["missing"] == ["b", "c"]
    locum("stop", run.id, "--home", federation.home.path)
    assert ended(run, 60) == "stopped"
    locum("resume", run.id, "--home", federation.home.path)
    release(federation)
    assert ended(run) == "completed with losses"
    assert _lost(run) == {"c": [1]}
    assert bits(model_of(run)) == expected(_LOSSES, tmp_path, _lost(run))


def _lost(run: Run) -> dict[str, list[int]]:
    """The rounds that sites missed, as the run tells them."""
    found: dict[str, list[int]] = json.loads(run.summary.read_bytes())["lost"]
    return found


# --- long forms


@pytest.mark.slow
def test_agents_are_killed_while_a_message_is_on_its_way_and_while_they_train(
    federation: Federation, tmp_path: Path
) -> None:
    taken = Taken(federation)
    _freeze(federation, "a")
    hold(federation, TRAIN, "b")
    run = federation.run(_AGENTS)
    taken.wait("query.describe 0", "b", "c")
    federation.sites["a"].kill()  # the SuperLink has given its message away
    start(federation, "a")
    taken.wait("train 1", "b")
    federation.sites["b"].kill()
    start(federation, "b")
    release(federation)
    assert ended(run) == "completed"
    assert bits(model_of(run)) == expected(_AGENTS, tmp_path)
    assert [taken.of(name, "train 1") for name in PEERS] == [1, 2, 1]


def _freeze(federation: Federation, name: str) -> None:
    """Stops an agent where it is: its connection stays, and it reads nothing."""
    process = federation.sites[name].popen
    assert process is not None
    process.send_signal(signal.SIGSTOP)


@pytest.mark.slow
def test_each_part_of_the_coordinator_is_killed_in_mid_round(federation: Federation, tmp_path: Path) -> None:
    taken = Taken(federation)
    hold(federation, TRAIN)
    run = federation.run(_PARTS)
    for number, part in enumerate(("superlink", "superexec", "gateway"), 1):
        taken.wait(f"train {number}")
        kill(federation, part)
        release(federation)
        told(run, "committed", round=number)
        hold(federation, TRAIN)
    assert ended(run) == "completed"
    assert bits(model_of(run)) == expected(_PARTS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("event", ["started", "roster", "round", "update", "committed", "evaluated", "finished"])
def test_the_runs_process_is_killed_right_after(event: str, federation: Federation, tmp_path: Path) -> None:
    while True:  # until the process was not faster than we are
        run = federation.run(_BETWEEN)
        process = int(until(run.alive, 120))
        while not events(run, event) and run.alive():
            time.sleep(0.0005)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        killed = not run.summary.exists()
        assert ended(run) == "completed"
        if killed:
            break
    assert len(events(run, "started")) == 2
    assert bits(model_of(run)) == expected(_BETWEEN, tmp_path)


@pytest.mark.slow
def test_a_run_that_pauses_goes_on_when_its_site_is_back(federation: Federation, tmp_path: Path) -> None:
    taken = Taken(federation)
    hold(federation, TRAIN, "c")
    run = federation.run(_RETURN)
    taken.wait("train 1")
    federation.sites["c"].kill()
    until(lambda: run.status().state == "paused", 120)
    assert "c" in run.status().reason
    release(federation)
    start(federation, "c")
    assert ended(run) == "completed"
    assert bits(model_of(run)) == expected(_RETURN, tmp_path)


@pytest.mark.slow
def test_a_run_whose_site_never_answers_goes_on_to_its_end(federation: Federation, tmp_path: Path) -> None:
    hold(federation, TRAIN, "c")
    run = federation.run(_NEVER)
    assert ended(run) == "completed with losses"
    assert _lost(run) == {"c": [1, 2, 3]}
    assert bits(model_of(run)) == expected(_NEVER, tmp_path, _lost(run))


@pytest.mark.slow
def test_a_run_whose_process_always_dies_has_failed_and_can_be_resumed(federation: Federation, tmp_path: Path) -> None:
    hold(federation, DESCRIBE)
    run = federation.run(_BETWEEN)
    until(lambda: _killed(run) and run.status().state == "failed", 400)
    assert "times in a row" in run.status().reason
    release(federation)
    locum("resume", run.id, "--home", federation.home.path)
    assert ended(run) == "completed"
    assert bits(model_of(run)) == expected(_BETWEEN, tmp_path)


def _killed(run: Run) -> bool:
    """Kills the run's process if it has one."""
    process = run.alive()
    if process is not None:
        os.kill(process, signal.SIGKILL)
    return True


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_the_round_of_its_site(federation: Federation, tmp_path: Path) -> None:
    spec = FederationSpec(sites=1, seed=3, patients=12, shape=(8, 16, 16), spacing=(10.0, 8.0, 8.0))
    prepared = prepare_site(hospitals(spec)[0], tmp_path / "north", seed=5)
    federation.agent("north", prepared.store)
    federation.approve("north", _WORKER)
    federation.ready(_WORKER, "north")
    home = federation.folder / "north"
    run = federation.run(_WORKER)
    told(run, "round", round=1)
    until(lambda: (left := Journal(home / "journal").current()) and left.message.metadata.message_type == TRAIN, 120)
    worker = int(until(lambda: writer(home / "run" / "worker.log"), 120))
    before = computed(worker)
    until(lambda: computed(worker) > before + 0.3, 120, "the worker does not train")
    os.kill(worker, signal.SIGKILL)
    try:
        assert ended(run, 300) == "completed with losses"
    finally:
        federation.sites.pop("north").stop()
    assert _lost(run) == {"north": [1]}
    history = json.loads(run.summary.read_bytes())["history"]
    assert history[0]["excluded"] == {"north": "the worker process died"}
    assert set(history[1]["weights"]) == {*PEERS, "north"}
    one = plan(name="worker", training__local_steps=2000, rounds=1)
    first = run_peers(one, [Peer(name, value) for name, value in PEERS.items()], tmp_path / "one").history[0]
    assert history[0]["model_sha256"] == first.model_sha256


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_run_in_a_storm_of_kills_gives_the_model_of_what_arrived(
    seed: int, federation: Federation, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    run = federation.run(_STORM)
    for _ in range(30):
        victim = draw.choice(("app", "app", "a", "b", "c", "gateway", "gateway", "superlink", "superexec", "server"))
        if run.status().ended:
            break
        _strike(federation, run, victim)
        time.sleep(draw.uniform(0.2, 6))
    assert ended(run, 600) in {"completed", "completed with losses"}
    assert bits(model_of(run)) == expected(_STORM, tmp_path, _lost(run))


def _strike(federation: Federation, run: Run, victim: str) -> None:
    if victim == "app":
        _killed(run)
    elif victim == "server":
        federation.server.kill()
        federation.start()
    elif victim in PEERS:
        federation.sites[victim].kill()
        start(federation, victim)
    else:
        os.kill(federation.pid_of(victim), signal.SIGKILL)
