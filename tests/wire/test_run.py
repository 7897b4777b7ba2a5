from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.peers import Peer, run_peers
from tests.plans import plan
from tests.wire.federation import ended, model_of, open_federation


def test_a_run_between_processes_gives_the_model_of_a_run_in_one_process_to_the_bit(tmp_path: Path) -> None:
    of = plan(rounds=3, name="three")
    expected = run_peers(of, [Peer("a", 0.1), Peer("b", 0.7), Peer("c", 0.9)], tmp_path / "local").model
    with open_federation(tmp_path) as federation:
        federation.propose(of)
        for name, value in (("a", 0.1), ("b", 0.7), ("c", 0.9)):
            federation.peer(name, f"value:{value}")
        for name in "abc":
            federation.approve(name, of)
        federation.ready(of, "a", "b", "c")
        run = federation.run(of)
        assert ended(run) == "completed"
        found = model_of(run)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: np.asarray(array).tobytes() for name, array in expected.items()
    }
