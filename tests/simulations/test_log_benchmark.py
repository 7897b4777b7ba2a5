"""The benchmark of the log: what it measures is right. Its times are not tested."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from locum.common.errors import RunError
from locum.common.log.note import sign
from locum.common.log.store import Log
from locum.simulations.benchmarks.log import a_round, measure, verify


def test_a_small_log_is_measured_and_its_proofs_hold() -> None:
    found = {row.what: row.value for row in measure(50)}
    assert 500 < found["an entry"] < 2000
    assert found["append / floor"] == pytest.approx(
        found["an append of one entry, on the disk, median"]
        / found["floor: a write of the same bytes, flushed, median"]
    )
    assert len(found) == 14


def test_a_log_that_is_not_that_of_its_checkpoint_ends_the_benchmark(tmp_path: Path) -> None:
    log, key = Log(tmp_path, "benchmark/log"), Ed25519PrivateKey.generate()
    log.append(a_round(0))
    log.checkpoint(lambda checkpoint: sign(checkpoint, "benchmark", key))
    verify(log)
    log.append(a_round(1))
    with pytest.raises(RunError, match="not that of the checkpoint"):
        verify(log)
