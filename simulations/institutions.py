"""An emulated institution: its folder, its data, its agent. The code behind the agent is a hospital's own.

Each site has `sites/NAME/` in the run's folder: `raw/` (the DICOM that an emulated hospital wrote), `store/` (the
volume store and catalog), `run/` (local tensors), `ledger.sqlite` and `site.log`.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from locum.common.errors import RunError
from locum.common.identity import PublicKey, certified_key, new_key, utc_now
from locum.common.plan import Plan, parse_plan
from locum.common.secagg.roster import Trust
from locum.server.authority import Authority, found, load_log_certificate
from locum.server.checkpoints import Checkpoints
from locum.server.home import Home
from locum.simulations.preparation import Prepared
from locum.site_client.agent import Agent
from locum.site_client.configuration import LEDGER
from locum.site_client.gate import Policy
from locum.site_client.privacy.budget import Budget, Signer
from locum.site_client.privacy.ledger import Ledger
from locum.site_client.secure import Credentials, SecureSite, seeded
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker, process_context

_CERTIFICATES = timedelta(days=90)


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


@dataclass(frozen=True)
class Federation:
    """Who signs for a simulation: its authority, and the key that verifies what the coordinator signs."""

    authority: Authority
    log: PublicKey


def found_federation(folder: Path) -> Federation:
    """A new authority in a run's folder, for as long as this process runs: who resumes the run sets up anew."""
    home = Home(folder)
    shutil.rmtree(home.authority, ignore_errors=True)
    home.authority.mkdir(parents=True, mode=0o700)
    authority = found(home, "simulation", _CERTIFICATES, now=utc_now())
    return Federation(authority, certified_key(load_log_certificate(home)))


def open_agent(site: Prepared, policy: Policy, federation: Federation, *, cache_bytes: int) -> Agent:
    """The agent of a prepared site, its worker started, with a certificate of the simulation's own authority."""
    log = site_log(site.folder / "site.log", site.name)
    settings = Settings(site.name, (site.store,), site.folder / "run", cache_bytes=cache_bytes)
    worker = Worker(settings, log)
    worker.start()
    credentials = _credentials(site.name, federation)
    secure = _secure(site.folder / "secagg", credentials)
    return Agent(site.name, policy, worker, log, secure, budget=_budget(site.folder, policy, credentials))


def secure_site(folder: Path, name: str, federation: Federation) -> SecureSite:
    """A site's part in secure sums, for one that has no agent of ours."""
    return _secure(folder, _credentials(name, federation))


def _secure(folder: Path, credentials: Credentials) -> SecureSite:
    """Rounding is by the plan's seed, so that a simulation gives the same bits again."""
    return SecureSite(folder, lambda: credentials, utc_now, seeded)


def _credentials(name: str, federation: Federation) -> Credentials:
    """A site's key of its own, and its certificate."""
    key, authority = new_key(), federation.authority
    trust = Trust(authority.federation, authority.certificate, federation.log)
    return Credentials(name, key, authority.issue_site(name, key.public_key()), trust)


def _budget(folder: Path, policy: Policy, credentials: Credentials) -> Budget:
    """An emulated hospital's patients are its run's alone, and so is the ledger."""
    ledger = Ledger(folder / LEDGER)
    ledger.begin()
    return Budget(ledger, "patients", policy, lambda: Signer(credentials.site, credentials.key), utc_now)


def site_log(path: Path, name: str) -> logging.Logger:
    """The site's own log file; nothing of it goes anywhere else."""
    log = logging.getLogger(f"locum.site.{name}.{path.parent}")
    log.propagate = False
    log.handlers.clear()
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log
