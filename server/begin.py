"""`python -m locum.server.begin RUN-FOLDER`: commits round 0, the model that the plan's seed gives.

A process of its own, because only this step of a run needs torch, and the process that folds updates is to stay small.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from locum.common.blobs import DISK_FULL
from locum.common.errors import RunError
from locum.common.plan import load_plan
from locum.server.checkpoints import Checkpoints, DiskFullError
from locum.server.parent import PARENT, end_with_parent

_FULL = 28


def begin(folder: Path) -> None:
    """Commits round 0 in another process unless a round is committed; raises RunError, or DiskFullError."""
    if Checkpoints(folder / "checkpoints", load_plan(folder / "plan.yaml")).rounds():
        return
    command, environment = [sys.executable, "-m", __name__, str(folder)], {**os.environ, PARENT: str(os.getpid())}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)  # noqa: S603
    if done.returncode == _FULL:
        raise DiskFullError(f"there is no room in {folder} for the first model", "free space")
    if done.returncode:
        told = done.stderr.strip().splitlines()
        reason = f"the first model cannot be made: {told[-1] if told else 'its process died'}"
        raise RunError(reason, "check that the plan's network can be built here and that the disk has space")


def main() -> None:
    """Commits round 0 of the run in the folder that is given."""
    from locum.server.rounds import commit_initial

    end_with_parent()  # a process that outlived the run's would write into what another one reads
    folder = Path(sys.argv[1])
    plan = load_plan(folder / "plan.yaml")
    try:
        commit_initial(plan, Checkpoints(folder / "checkpoints", plan))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        sys.exit(_FULL)


if __name__ == "__main__":
    main()
