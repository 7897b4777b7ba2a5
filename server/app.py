"""The Flower ServerApp: reads the run's plan, drives the rounds, writes the result.

Run configuration: `run-dir`, the folder of a run on one machine, or `run`, the name of a run of the coordinator whose
folder the environment variable `LOCUM_SERVER_HOME` names. Checkpoints that are there are continued.

A run ends in three steps, and whoever finds some of them done does the rest: the folder `ending/` is there whole, with
what the log is told; the log is told it, once, and the statement on the model is signed; `run.json` is moved to its
place, and the run is at its end.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from locum.common.blobs import DISK_FULL, Blob
from locum.common.durable import create_folder, flush, replace_file
from locum.common.errors import LocumError, RunError
from locum.common.log.entries import written
from locum.common.plan import Plan, load_plan
from locum.common.tensor_files import write_tensors
from locum.server.admission import reasons
from locum.server.checkpoints import Checkpoints, DiskFullError
from locum.server.home import Home
from locum.server.link import Direct, Link
from locum.server.log import NotLoggedError
from locum.server.records import Events, RunSummary
from locum.server.rounds import Finished, open_engine, run
from locum.server.run_log import Event, RunLog
from locum.server.statement import write_statement

logger = logging.getLogger("locum.server")

_ENDING = "ending"

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs a plan to its end."""
    if "run-dir" in context.run_config:
        folder = Path(str(context.run_config["run-dir"]))
        plan, link, events = load_plan(folder / "plan.yaml"), Direct(Home(folder)), Events(folder / "events.jsonl")
        try:
            _run(folder, plan, grid, link, events)
        except LocumError:
            _log_end(link, plan, "failed")
            raise
        finally:
            events.close()
    else:
        _between_hospitals(str(context.run_config["run"]), grid)


def _between_hospitals(name: str, grid: Grid) -> None:
    """Runs a run of the coordinator. Whatever ends it is told in the run's folder; a process that dies says nothing."""
    from locum.server.home import default_home, read_config
    from locum.server.runs import find
    from locum.server.wire import StoppedError, Wire

    home = Home(default_home())
    found = find(home, name)
    with found.hold():
        if not found.goes_on:
            return  # Flower starts late what a coordinator before this one has asked for
        events = Events(found.events)
        try:
            wire = Wire(home, read_config(home), run=found, events=events)
            while not _went_on(found.folder, found.plan, grid, wire, events):
                pass
        except StoppedError:
            _log_end(wire, found.plan, "stopped")
            events.emit("stopped")
        except LocumError as error:
            _log_end(wire, found.plan, "failed")
            found.fail(error.message, error.remedy)
            events.emit("failed", reason=error.message, remedy=error.remedy)
        finally:
            events.close()


def _log_end(link: Link, plan: Plan, event: Event) -> None:
    """Logs that a run has ended without a result; what cannot be logged now, the supervisor logs later."""
    try:
        log = link.log(plan)
        log.append(log.said(event))
        log.seal()
    except LocumError as error:
        logger.warning("%s", error)


def _went_on(folder: Path, plan: Plan, grid: Grid, link: Link, events: Events) -> bool:
    """Whether the run has reached its end; False if disk, log or registry failed, and trying again is worth it."""
    from locum.server.begin import begin
    from locum.server.registry import RegistryError

    try:
        begin(folder)
        _run(folder, plan, grid, link, events)
    except (DiskFullError, NotLoggedError, RegistryError) as error:
        link.wait(error, ())
        return False
    return True


def _run(folder: Path, plan: Plan, grid: Grid, link: Link, events: Events) -> None:
    try:
        log = link.log(plan)
        if not (folder / _ENDING).exists():
            engine = open_engine(plan, grid, Checkpoints(folder / "checkpoints", plan), events, link)
            write_result(folder, run(engine), log)
        log.begin(())  # of a process that finds the end as another one left it
        end(folder, log)
    except OSError as error:
        reason = f"{folder} cannot be written: {error.strerror}; committed rounds are kept"
        kind = DiskFullError if error.errno in DISK_FULL else RunError
        raise kind(reason, "free space or mend the disk, then resume") from error


def write_result(folder: Path, finished: Finished, log: RunLog) -> None:
    """Writes `model.safetensors`, and in `ending/` the status, rounds and test metrics; raises OSError."""
    blobs: list[Blob] = []
    replace_file(
        folder / "model.safetensors", lambda path: blobs.append(write_tensors(path, finished.model, flush=True))
    )
    summary = RunSummary(
        status=finished.status,
        round=finished.round,
        sites=tuple(finished.roster.nodes),
        excluded=reasons(finished.roster.excluded),
        lost=finished.losses,
        test=finished.test,
        history=finished.history,
    )
    entries = (finished.tested, log.end(finished.status, finished.round, blobs[0].sha256))
    files = {
        "run.json": summary.model_dump_json(indent=1).encode(),
        "entries": b"\n".join(written(each) for each in entries),
    }
    create_folder(folder / _ENDING, files)


def end(folder: Path, log: RunLog) -> None:
    """Tells the log of the end that lies in `ending/`, and then the run's folder; raises OSError or NotLoggedError."""
    ending = folder / _ENDING
    if (ending / "run.json").exists():
        log.append_once((ending / "entries").read_bytes().split(b"\n"))
        log.seal()
        write_statement(folder, log.log, log.run)
        (ending / "run.json").replace(folder / "run.json")
        flush(folder)
    shutil.rmtree(ending)
