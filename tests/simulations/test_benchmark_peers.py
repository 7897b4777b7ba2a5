"""The peers of the wire benchmark: what they send, how they end, and that they run."""

from __future__ import annotations

import hashlib
import os
import runpy
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from locum.common.errors import RunError
from locum.simulations.benchmarks import nvflare_peer, stock_flower
from locum.simulations.benchmarks.stock_flower import Processes, free_ports, periods, write_app

_CHUNK = 5 << 20
_DETACHED = """
import subprocess, sys
child = "import time; kept = bytearray(60_000_000); print('ready', flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE)
process.stdout.readline()
open("child", "w").write(str(process.pid))
"""


def _trained(app: Any, site: int, number: int, weights: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    content = RecordDict({"arrays": ArrayRecord(weights), "config": ConfigRecord({"server-round": number})})
    context = Context(1, site, {"partition-id": site}, RecordDict(), {})
    answer = app(Message(content, dst_node_id=1, message_type="train"), context)
    arrays: list[np.ndarray[Any, Any]] = answer.content["arrays"].to_numpy_ndarrays()
    return arrays


def test_no_chunk_of_the_stock_application_is_like_another(tmp_path: Path) -> None:
    app = write_app(tmp_path, sites=3, megabytes=1, count=3)
    client = runpy.run_path(str(app / "idle" / "client_app.py"))["app"]
    weights = [np.random.default_rng(seed).standard_normal(1_500_000, dtype=np.float32) for seed in range(2)]
    sent = [weights, *(_trained(client, site, number, weights) for site in range(3) for number in (1, 2))]
    data = [array.tobytes() for arrays in sent for array in arrays]
    digests = [hashlib.sha256(raw[at : at + _CHUNK]).digest() for raw in data for at in range(0, len(raw), _CHUNK)]
    assert len(digests) == 7 * 2 * 2
    assert len(set(digests)) == len(digests)


def test_the_first_round_is_not_measured() -> None:
    assert periods([1.0, 9.0, 10.0, 12.0]) == (1.0, 2.0)


def test_ports_are_different() -> None:
    assert len(set(free_ports(20))) == 20


def _fail() -> None:
    raise RunError("a peer failed", "measure again")


def _be_ended() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("happen", "error"), [(_fail, RunError), (_be_ended, SystemExit)])
def test_what_left_its_session_and_lost_its_parent_is_counted_and_ended(
    tmp_path: Path, happen: Callable[[], None], error: type[BaseException]
) -> None:
    number, before = 0, signal.getsignal(signal.SIGTERM)

    def run() -> None:
        nonlocal number
        with Processes(tmp_path, lambda name, _: name) as processes:
            processes.start("part", [sys.executable, "-c", _DETACHED], os.environ).wait()
            number = int((tmp_path / "child").read_text())
            assert processes.look() == {"part"}
            assert processes.peak["part"] > 60_000_000
            happen()

    with pytest.raises(error):
        run()
    assert not _runs(number)
    assert signal.getsignal(signal.SIGTERM) == before


def _runs(number: int) -> bool:
    """Whether a process lives; one that nobody has waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def test_a_peer_without_progress_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_flower, "_PATIENCE_SECONDS", 0.5)
    with Processes(tmp_path, lambda name, _: name) as processes:
        processes.start("part", ["sleep", "600"], os.environ)
        with pytest.raises(RunError, match="did not grow"):
            deque(processes.watched(tmp_path / "stamps"), maxlen=0)


def test_without_an_environment_of_its_own_flare_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCUM_BENCH_NVFLARE", raising=False)
    assert nvflare_peer.rounds(tmp_path, sites=2, megabytes=1, count=2) is None
    assert "LOCUM_BENCH_NVFLARE" in capsys.readouterr().err


@pytest.mark.parametrize(("python", "told"), [("/no/such/python", "names no Python"), (sys.executable, "No module")])
def test_a_python_without_flare_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, told: str
) -> None:
    monkeypatch.setenv("LOCUM_BENCH_NVFLARE", python)
    with pytest.raises(RunError, match=told):
        nvflare_peer.rounds(tmp_path, sites=2, megabytes=1, count=2)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [stock_flower.rounds, nvflare_peer.rounds])
def test_a_peer_runs_all_rounds_at_all_sites(
    tmp_path: Path, rounds: Callable[..., stock_flower.Measured | None]
) -> None:
    measured = rounds(tmp_path, sites=2, megabytes=1, count=2)
    if measured is None:
        pytest.skip("no environment with nvflare: LOCUM_BENCH_NVFLARE is not set")
    assert len(measured.seconds) == 1
    assert all(size > 20_000_000 for size in measured.memory.values())
