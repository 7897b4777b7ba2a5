"""`python -m tests.server.log_process FOLDER WHEN KIND ROUND`: a run over two peers, killed at an entry of its log.

WHEN is `before` the entry of that KIND and ROUND is appended, or `after` it was; `never` lets the run end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from locum.common.fab import build_bundle
from locum.common.log.entries import Entry
from locum.common.log.store import Log
from locum.common.plan import load_plan
from locum.simulations.engines.local import run_local
from locum.simulations.institutions import found_federation
from tests.peers import Peer


def main() -> None:
    folder, when, kind, number = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    append = Log.append

    def deadly(self: Log, *entries: Entry) -> int:
        meant = any((entry.kind, getattr(entry, "round", 0)) == (kind, number) for entry in entries)
        if meant and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        first = append(self, *entries)
        if meant and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return first

    Log.append = deadly  # type: ignore[method-assign]
    found_federation(folder)
    peers = {2: Peer("a", 0.1), 3: Peer("b", 0.7)}
    run_local(peers, build_bundle(load_plan(folder / "plan.yaml")), folder, 2)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
