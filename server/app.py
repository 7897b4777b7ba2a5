"""The Flower ServerApp: reads the run's plan, drives the rounds, writes the result.

Run configuration: `run-dir`, the run's folder, which holds `plan.yaml`. Checkpoints that are there are continued.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from safetensors.numpy import save

from locum.common.durable import replace_file
from locum.common.errors import RunError
from locum.common.plan import load_plan
from locum.server.checkpoints import Checkpoints
from locum.server.records import Events, RunSummary
from locum.server.rounds import Finished, open_engine, run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the plan in the run's folder to its end."""
    folder = Path(str(context.run_config["run-dir"]))
    plan = load_plan(folder / "plan.yaml")
    events = Events(folder / "events.jsonl")
    try:
        engine = open_engine(plan, grid, Checkpoints(folder / "checkpoints", plan), events)
        write_result(folder, run(engine))
    except OSError as error:
        reason = f"{folder} cannot be written: {error.strerror}; committed rounds are kept"
        raise RunError(reason, "free space or mend the disk, then resume") from error
    finally:
        events.close()


def write_result(folder: Path, finished: Finished) -> None:
    """Writes `model.safetensors` and `run.json` (status, rounds, test metrics) durably; raises OSError."""
    replace_file(folder / "model.safetensors", save(finished.model))
    summary = RunSummary(
        status=finished.status,
        round=finished.round,
        sites=tuple(finished.roster.nodes),
        excluded=dict(finished.roster.excluded),
        lost=finished.losses,
        test=finished.test,
        history=finished.history,
    )
    replace_file(folder / "run.json", summary.model_dump_json(indent=1).encode())
