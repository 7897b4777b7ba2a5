"""`python -m locum.server.begin RUN-FOLDER`: commits round 0, the model that the plan's seed gives.

A process of its own, because only this step of a run needs torch, and the process that folds updates is to stay small.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from locum.common.errors import RunError
from locum.common.plan import load_plan
from locum.server.checkpoints import Checkpoints


def begin(folder: Path) -> None:
    """Commits round 0 in another process unless a round is committed; raises RunError."""
    if Checkpoints(folder / "checkpoints", load_plan(folder / "plan.yaml")).rounds():
        return
    done = subprocess.run([sys.executable, "-m", __name__, str(folder)], check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        told = done.stderr.strip().splitlines()
        reason = f"the first model cannot be made: {told[-1] if told else 'its process died'}"
        raise RunError(reason, "check that the plan's network can be built here and that the disk has space")


def main() -> None:
    """Commits round 0 of the run in the folder that is given."""
    from locum.server.rounds import commit_initial

    folder = Path(sys.argv[1])
    plan = load_plan(folder / "plan.yaml")
    commit_initial(plan, Checkpoints(folder / "checkpoints", plan))


if __name__ == "__main__":
    main()
