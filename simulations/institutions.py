"""An emulated institution: its folder, its data, its agent. The code behind the agent is a hospital's own.

Each site has `sites/NAME/` in the run's folder: `raw/` (the DICOM that an emulated hospital wrote), `store/` (the
volume store and catalog), `run/` (local tensors) and `site.log`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from locum.common.errors import LocumError, RunError
from locum.common.plan import Plan, parse_plan
from locum.server.checkpoints import Checkpoints
from locum.simulations.hospitals import HospitalSpec, write_hospital
from locum.simulations.sites import Site
from locum.site_client.agent import Agent
from locum.site_client.gate import Policy
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker, process_context

if TYPE_CHECKING:
    from locum.site_client.imaging.catalog import Counts


@dataclass(frozen=True)
class Prepared:
    """A site that has ingested its data: its name, folder and counts."""

    name: str
    folder: Path
    counts: Counts

    @property
    def store(self) -> Path:
        """The site's volume store."""
        return self.folder / "store"


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def prepare(
    sites: Sequence[Site], folder: Path, *, seed: int, done: Callable[[Prepared], None]
) -> tuple[Prepared, ...]:
    """Makes the data of every emulated site and ingests all, on all cores; `done` is told of each.

    This needs no torch, so it is done by processes of its own while the workers' server loads torch.

    Raises:
        LocumError: the first site that cannot be prepared, with its name.
    """
    ignored = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    context = get_context("spawn")
    with ProcessPoolExecutor(
        min(cores(), len(sites)), mp_context=context, initializer=signal.signal, initargs=ignored
    ) as pool:
        jobs = {site.name: pool.submit(prepare_site, site, folder / "sites" / site.name, seed) for site in sites}
        try:
            return tuple(_finished(name, job, done) for name, job in jobs.items())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def begin(folder: Path, plan: Plan) -> None:
    """Commits round 0 unless the run has begun before, in a worker's process: this one need not load torch."""
    process = process_context().Process(target=_begin, args=(folder, plan.canonical()))
    process.start()
    process.join()
    if process.exitcode:
        raise RunError(
            f"the first model cannot be written to {folder}", "free space or mend the disk, then start again"
        )


def _begin(folder: Path, plan: bytes) -> None:
    from locum.server.rounds import commit_initial

    of = parse_plan(plan)
    checkpoints = Checkpoints(folder, of)
    if not checkpoints.rounds():
        commit_initial(of, checkpoints)


def _finished(name: str, job: Future[Prepared], done: Callable[[Prepared], None]) -> Prepared:
    try:
        prepared = job.result()
    except LocumError as error:
        raise type(error)(f"site {name}: {error.message}", error.remedy) from error
    except OSError as error:
        raise RunError(
            f"site {name}: its data cannot be written: {error.strerror}", "free space, then resume"
        ) from error
    done(prepared)
    return prepared


def prepare_site(site: Site, folder: Path, seed: int) -> Prepared:
    """Writes an emulated hospital's files if the site is one, then ingests the site's data."""
    from locum.site_client.imaging.ingest import ingest
    from locum.site_client.imaging.sources import load_site

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(site, HospitalSpec):
        write_hospital(site, folder / "raw")
        data = load_site(folder / "raw" / "site.yaml")
    else:
        data = load_site(site.configuration, base=site.base)
    counts = ingest(data, folder / "store", key=site_key(seed, site.name))
    return Prepared(site.name, folder, counts)


def site_key(seed: int, name: str) -> bytes:
    """The key of an emulated site. A real site draws its own and keeps it; here a seed must give the same folds."""
    return hashlib.sha256(f"locum simulation {seed} {name}".encode()).digest()


def open_agent(site: Prepared, policy: Policy, *, cache_bytes: int, threads: int = 1) -> Agent:
    """The agent of a prepared site, its worker started."""
    log = site_log(site.folder / "site.log", site.name)
    settings = Settings(site.name, (site.store,), site.folder / "run", threads=threads, cache_bytes=cache_bytes)
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
