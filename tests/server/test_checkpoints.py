from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from locum.common.errors import RunError
from locum.server.checkpoints import Checkpoints, Committed
from locum.server.records import RoundRecord
from tests.plans import plan

WRITER = """
import sys, numpy as np
from pathlib import Path
from locum.server.checkpoints import Checkpoints, Committed
from tests.plans import plan
points = Checkpoints(Path(sys.argv[1]), plan())
latest = points.latest()
number = latest.round if latest else 0
while True:
    number += 1
    points.commit(Committed(number, {"w": np.full(50_000, number, np.float32)}, {}, ("a",), ()))
    print(number, flush=True)
"""


def _committed(number: int) -> Committed:
    return Committed(number, {"w": np.full(4, number, np.float32)}, {"m": np.ones(2)}, ("a", "b"), ())


def test_what_is_committed_is_what_is_loaded(tmp_path: Path) -> None:
    points = Checkpoints(tmp_path, plan())
    assert points.latest() is None
    points.commit(_committed(1))
    latest = points.latest()
    assert latest is not None
    assert (latest.round, latest.roster) == (1, ("a", "b"))
    assert np.array_equal(latest.model["w"], np.ones(4))
    assert np.array_equal(latest.strategy["m"], np.ones(2))


def test_only_the_last_two_rounds_and_the_best_are_kept(tmp_path: Path) -> None:
    points = Checkpoints(tmp_path, plan())
    for number in range(1, 7):
        points.commit(_committed(number), keep=2)
    assert points.rounds() == [2, 5, 6]


def test_kill_9_at_any_moment_leaves_the_newest_committed_round_whole(tmp_path: Path, project: Path) -> None:
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=project, text=True
        )
        assert writer.stdout is not None
        told = int(writer.stdout.readline())
        time.sleep(float(rng.uniform(0, 0.05)))
        os.kill(writer.pid, signal.SIGKILL)
        told = max([told, *map(int, writer.stdout.read().split())])
        writer.wait()
        latest = Checkpoints(tmp_path, plan()).latest()
        assert latest is not None
        assert told <= latest.round <= told + 1
        assert np.array_equal(latest.model["w"], np.full(50_000, latest.round, np.float32))


def test_a_damaged_checkpoint_is_named_and_not_used(tmp_path: Path) -> None:
    points = Checkpoints(tmp_path, plan())
    points.commit(_committed(1))
    path = tmp_path / "round-000001" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        points.latest()
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        points.latest()


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff"])
def test_a_damaged_evaluation_is_named_and_not_used(tmp_path: Path, content: bytes) -> None:
    points = Checkpoints(tmp_path, plan())
    record = RoundRecord(round=1, attempt=1, sites=(), weight=0.0, loss=None, weights={}, losses={}, train_seconds={},
                         excluded={}, update_norm=0.0, bytes_down=0, bytes_up=0, seconds=0.0,
                         model_sha256="")  # fmt: skip
    points.commit(replace(_committed(1), history=(record,)))
    (tmp_path / "round-000001" / "evaluation.json").write_bytes(content)
    with pytest.raises(RunError, match="cannot be read"):
        points.latest()


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, plan()).commit(_committed(1))
    with pytest.raises(RunError, match="belongs to another plan"):
        Checkpoints(tmp_path, plan(seed=9)).latest()
