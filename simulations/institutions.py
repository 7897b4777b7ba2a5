"""An emulated institution: its folder, its data, its agent. The code behind the agent is a hospital's own.

Each site has `sites/NAME/` in the run's folder: `raw/` (the DICOM that an emulated hospital wrote), `store/` (the
volume store and catalog), `run/` (local tensors) and `site.log`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from locum.common.errors import RunError
from locum.common.plan import Plan, parse_plan
from locum.server.checkpoints import Checkpoints
from locum.simulations.preparation import Prepared
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker, process_context


def begin(folder: Path, plan: Plan) -> None:
    """Commits round 0 unless the run has begun before; in a worker's process, which has loaded torch.

    Raises:
        RunError: it could not be written.
    """
    process = process_context().Process(target=_begin, args=(folder, plan.canonical()))
    process.start()
    process.join()
    if process.exitcode:
        reason = f"the first model cannot be written to {folder}"
        raise RunError(reason, "free space or mend the disk, then start again")


def _begin(folder: Path, plan: bytes) -> None:
    from locum.server.rounds import commit_initial

    of = parse_plan(plan)
    checkpoints = Checkpoints(folder, of)
    if not checkpoints.rounds():
        commit_initial(of, checkpoints)


def open_agent(site: Prepared, policy: Policy, *, cache_bytes: int) -> Agent:
    """The agent of a prepared site, its worker started."""
    log = site_log(site.folder / "site.log", site.name)
    settings = Settings(site.name, (site.store,), site.folder / "run", cache_bytes=cache_bytes)
    worker = Worker(settings, log)
    worker.start()
    return Agent(site.name, policy, worker, log)


def site_log(path: Path, name: str) -> logging.Logger:
    """The site's own log file; nothing of it goes anywhere else."""
    log = logging.getLogger(f"locum.site.{name}.{path.parent}")
    log.propagate = False
    log.handlers.clear()
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log
