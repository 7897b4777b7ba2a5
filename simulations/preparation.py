"""What a hospital has done before any federation asks: it has its images, and has ingested them.

This needs no torch and no Flower, so that it can go on in processes of its own while others load those.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from locum.common.errors import LocumError, RunError
from locum.simulations.hospitals import HospitalSpec, write_hospital
from locum.simulations.sites import Site
from locum.site_client.imaging.catalog import Counts
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site


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
    pool = ProcessPoolExecutor(min(cores(), len(sites)), get_context("spawn"), initializer=_step_back)
    jobs = {site.name: pool.submit(prepare_site, site, folder / "sites" / site.name, seed) for site in sites}
    try:
        return tuple(_finished(name, job, done) for name, job in jobs.items())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _step_back() -> None:
    """Leaves Ctrl-C to the parent, and the processor to the one that loads torch, for which all will wait."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)


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
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(site, HospitalSpec):
        write_hospital(site, folder / "raw")
        data = load_site(folder / "raw" / "site.yaml")
    else:
        data = load_site(site.configuration, base=site.base)
    counts = ingest(data, folder / "store", keys=site_keys(seed, site.name))
    return Prepared(site.name, folder, counts)


def site_keys(seed: int, name: str) -> Keys:
    """The keys of an emulated site. A real site draws its own and keeps them; here a seed must give the same folds."""
    return Keys.of(hashlib.sha256(f"locum simulation {seed} {name}".encode()).digest())
