from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from locum.common.errors import Code, SiteFailure
from locum.common.messages import TRAIN
from locum.common.plan import Plan
from locum.site_client import worker as module
from locum.site_client.agent import Agent
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker, process_context
from tests.plans import initial
from tests.site_client.asking import (
    batch_norm_plan,
    describe,
    equal,
    evaluate,
    failure,
    moved,
    plan,
    send,
    train,
    training,
)

_LOG = logging.getLogger("tests.worker")


@pytest.fixture
def worker(settings: Settings) -> Iterator[Worker]:
    made = Worker(settings, _LOG)
    yield made
    made.stop()


def _kill(worker: Worker) -> None:
    assert worker._process is not None
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker._process.join(timeout=60)


def test_a_worker_stays_warm_across_rounds_and_kinds_of_message(employ: Callable[..., Agent]) -> None:
    agent, of = employ(), plan()
    describe(agent, of)
    pid = agent.worker.pid
    for number in (1, 2):
        train(agent, of, initial(of), number)
        describe(agent, of)
    assert agent.worker.pid == pid != os.getpid()


def test_a_worker_killed_in_a_call_is_told_as_died_and_the_next_call_has_another(employ: Callable[..., Agent]) -> None:
    agent, of = employ(), plan(training__local_steps=1_000_000)
    describe(agent, of)
    first = agent.worker.pid
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(send, agent, of, training(of, initial(of)), TRAIN)
        time.sleep(0.3)
        assert not reply.done()
        _kill(agent.worker)
        assert failure(reply.result()) == (Code.WORKER_DIED, "WORKER_DIED")
    assert describe(agent, of).able
    assert agent.worker.pid not in {first, None}


def test_a_worker_killed_between_rounds_changes_no_bit_of_what_follows(employ: Callable[..., Agent]) -> None:
    of = batch_norm_plan(rounds=3)
    steady, shaken, model = employ(), employ(), initial(of)
    for number in (1, 2, 3):
        a, b = train(steady, of, model, number)[1], train(shaken, of, model, number)[1]
        assert equal(a, b)
        model = moved(model, a)
        _kill(shaken.worker)
        assert equal(evaluate(steady, of, model, number)[1], evaluate(shaken, of, model, number)[1])
        _kill(shaken.worker)


def test_a_worker_that_was_stopped_starts_again_and_two_stops_are_one(worker: Worker) -> None:
    of = plan()
    first, update = worker.call("train", of, initial(of), round=1)
    worker.stop()
    worker.stop()
    assert worker.pid is None
    second, again = worker.call("train", of, initial(of), round=1)
    assert (first, equal(update, again)) == (second, True)


def test_stopping_a_worker_in_a_call_ends_the_call_and_breaks_nothing_else(worker: Worker) -> None:
    of, endless = plan(), plan(training__local_steps=1_000_000)
    for _ in range(3):
        assert worker.call("describe", of)[0]["able"] is True
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(worker.call, "train", endless, initial(endless), round=1)
            time.sleep(0.2)
            worker.stop()
            assert isinstance(call.exception(), SiteFailure)
        assert worker.pid is None


def test_a_worker_that_has_not_answered_in_time_is_stopped_and_the_next_call_has_another(worker: Worker) -> None:
    of, endless = plan(), plan(training__local_steps=1_000_000)
    worker.call("describe", of)
    first, began = worker.pid, time.monotonic()
    with pytest.raises(SiteFailure) as late:
        worker.call("train", endless, initial(endless), seconds=0.5, round=1)
    assert time.monotonic() - began < 10
    assert late.value.code is Code.WORKER_DIED
    assert worker.call("describe", of, seconds=60)[0]["able"] is True
    assert worker.pid not in {first, None}


def test_an_agents_message_ends_with_its_time(employ: Callable[..., Agent]) -> None:
    agent, endless = employ(), plan(training__local_steps=1_000_000)
    describe(agent, endless)
    agent.seconds_left = lambda message: 0.5 if message.metadata.message_type == TRAIN else None
    reply = send(agent, endless, training(endless, initial(endless)), TRAIN)
    assert failure(reply) == (Code.WORKER_DIED, "WORKER_DIED")


def test_calls_at_the_same_time_each_get_their_own_answer(worker: Worker) -> None:
    of = plan()
    model = initial(of)
    alone = {number: worker.call("train", of, model, round=number)[1] for number in range(1, 9)}
    with ThreadPoolExecutor(8) as pool:
        jobs = {number: pool.submit(worker.call, "train", of, model, round=number) for number in alone}
        assert all(equal(jobs[number].result()[1], update) for number, update in alone.items())


def test_a_plan_that_failed_does_not_stand_in_for_another(worker: Worker) -> None:
    good, bad = plan(), plan(contract__modality=["MR"])
    update = worker.call("train", good, initial(good), round=1)[1]
    with pytest.raises(SiteFailure) as failed:
        worker.call("train", bad, initial(bad), round=1)
    assert failed.value.code is Code.NO_DATA
    assert equal(worker.call("train", good, initial(good), round=1)[1], update)


def test_two_plans_at_one_site_keep_their_local_tensors_apart(worker: Worker, settings: Settings) -> None:
    one, other = (batch_norm_plan(seed=seed) for seed in (1, 2))
    for of in (one, other):
        worker.call("train", of, initial(of), round=1)
    mixed = worker.call("outcomes", one, initial(one), round=1, fold="test")[1]
    apart = Worker(replace(settings, run_dir=settings.run_dir.with_name("apart")), _LOG)
    try:
        apart.call("train", one, initial(one), round=1)
        assert equal(apart.call("outcomes", one, initial(one), round=1, fold="test")[1], mixed)
    finally:
        apart.stop()


# --- the frames on the pipe


class _Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def bare(settings: Settings) -> Iterator[tuple[Connection, BaseProcess]]:
    """The serving process with its pipe in our hands."""
    ours, theirs = process_context().Pipe()
    process = process_context().Process(target=module.serve, args=(theirs, settings), daemon=True)
    process.start()
    theirs.close()
    yield ours, process
    ours.close()
    process.join(timeout=10)
    assert not process.is_alive()


def _request(of: Plan, **request: Any) -> bytes:
    return json.dumps({"plan": of.canonical().decode(), **request}).encode()


def test_a_reply_is_a_frame_of_json_and_a_frame_of_safetensors(bare: tuple[Connection, BaseProcess]) -> None:
    pipe, _ = bare
    of = plan()
    pipe.send_bytes(_request(of, operation="train", round=1))
    pipe.send_bytes(save(initial(of)))
    assert json.loads(pipe.recv_bytes())["steps"] == 2
    assert load(pipe.recv_bytes()).keys() == initial(of).keys()
    pipe.send_bytes(_request(of, operation="describe"))
    pipe.send_bytes(b"")
    assert json.loads(pipe.recv_bytes())["able"] is True
    assert pipe.recv_bytes() == b""


def test_an_operation_that_does_not_exist_is_a_failure_and_the_worker_goes_on(
    bare: tuple[Connection, BaseProcess],
) -> None:
    pipe, _ = bare
    for operation, failed in (("__class__", True), ("describe", False)):
        pipe.send_bytes(_request(plan(), operation=operation))
        pipe.send_bytes(b"")
        assert ("failure" in json.loads(pipe.recv_bytes())) is failed
        assert pipe.recv_bytes() == b""


@pytest.mark.parametrize("which", ["header", "tensors"])
def test_a_pickle_sent_to_a_worker_is_not_opened_and_ends_it(
    which: str, bare: tuple[Connection, BaseProcess], tmp_path: Path
) -> None:
    pipe, process = bare
    bomb = pickle.dumps(_Bomb(tmp_path / "planted"))
    pipe.send_bytes(bomb if which == "header" else _request(plan(), operation="describe"))
    pipe.send_bytes(bomb)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("frames", ["pickle", "text", "list", "tensors", "short"])
def test_an_answer_that_is_no_message_is_a_dead_worker_and_the_next_call_works(
    frames: str, worker: Worker, tmp_path: Path
) -> None:
    bomb = pickle.dumps(_Bomb(tmp_path / "planted"))
    sent = {
        "pickle": (bomb, bomb),
        "text": (b"hello", b""),
        "list": (b"[1]", b""),
        "tensors": (b"{}", bomb),
        "short": (b"{}", save({"w": np.zeros(9)})[:-8]),
    }[frames]
    worker.start()
    kept, (worker._connection, theirs) = worker._connection, process_context().Pipe()
    for frame in sent:
        theirs.send_bytes(frame)
    with pytest.raises(SiteFailure) as died:
        worker.call("describe", plan())
    assert kept is not None  # till here: without its pipe the process would have ended by itself
    assert died.value.code is Code.WORKER_DIED
    assert not (tmp_path / "planted").exists()
    assert worker.call("describe", plan())[0]["able"] is True


def test_a_worker_ends_when_its_agent_is_gone(bare: tuple[Connection, BaseProcess]) -> None:
    pipe, process = bare
    pipe.close()
    process.join(timeout=60)
    assert process.exitcode == 0


_AGENT = """
import logging, sys
from pathlib import Path
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker
from tests.plans import initial
from tests.site_client.asking import plan
worker = Worker(Settings("north", (Path(sys.argv[1]),), Path(sys.argv[2])), logging.getLogger("agent"))
of = plan(training__local_steps=1_000_000)
worker.call("describe", of)
print(worker.pid, flush=True)
worker.call("train", of, initial(of), round=1)
"""


def test_a_worker_in_the_middle_of_a_step_ends_when_its_agent_is_killed(settings: Settings) -> None:
    command = [sys.executable, "-c", _AGENT, str(settings.stores[0]), str(settings.run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        time.sleep(0.5)
        agent.kill()
    end = time.monotonic() + 20
    while _runs(pid):
        assert time.monotonic() < end, "it trains on"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_is_for_the_agent_and_does_not_end_a_worker(worker: Worker) -> None:
    of = plan()
    worker.call("describe", of)
    assert worker.pid is not None
    pid = worker.pid
    os.kill(pid, signal.SIGINT)
    assert worker.call("describe", of)[0]["able"] is True
    assert worker.pid == pid


def test_a_full_disk_has_its_own_code() -> None:
    assert module._code_of(OSError(errno.ENOSPC, "no space")) is Code.DISK_FULL
    assert module._code_of(OSError(errno.EIO, "broken")) is Code.INTERNAL
    assert module._code_of(ValueError("no space")) is Code.INTERNAL


def test_memory_that_ran_out_has_its_own_code_on_a_gpu_too() -> None:
    assert module._code_of(MemoryError()) is Code.OUT_OF_MEMORY
    assert module._code_of(torch.OutOfMemoryError("CUDA out of memory")) is Code.OUT_OF_MEMORY


def test_an_agent_does_not_load_torch() -> None:
    loads = "import sys, locum.site_client.agent, locum.site_client.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loads], check=False).returncode == 0
