"""An emulated institution: its folder, its data, its agent. The code behind the agent is a hospital's own.

Each site has `sites/NAME/` in the run's folder: `raw/` (the DICOM that an emulated hospital wrote), `store/` (the
volume store and catalog), `run/` (local tensors), `log/` (what left), `ledger.sqlite` and `site.log`.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from flwr.app import Message

from locum.common.canonical import sha256_hex
from locum.common.durable import replace_file
from locum.common.errors import RunError
from locum.common.identity import (
    PublicKey,
    certificate_pem,
    certified_key,
    load_certificate,
    load_ec_key,
    new_key,
    save_key,
    utc_now,
)
from locum.common.log.note import sign
from locum.common.messages import LOCAL
from locum.common.plan import Plan, parse_plan
from locum.common.secagg.roster import Trust
from locum.server.authority import Authority, found, load_log_certificate
from locum.server.checkpoints import Checkpoints
from locum.server.home import Home
from locum.simulations.preparation import Prepared
from locum.site_client.agent import Agent
from locum.site_client.configuration import LEDGER
from locum.site_client.gate import Policy
from locum.site_client.privacy.budget import Budget, Signer, state_of
from locum.site_client.privacy.ledger import Ledger
from locum.site_client.readiness.statement import Steward
from locum.site_client.releases import FOLDER as RELEASES
from locum.site_client.releases import Releases, Sent, begin_releases, header_bytes
from locum.site_client.secure import Credentials, SecureSite, seeded
from locum.site_client.settings import Settings
from locum.site_client.worker import Worker, process_context

#: Longer than anybody resumes a run: nothing renews a certificate here.
_CERTIFICATES = timedelta(days=10 * 365)


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

    home: Home
    authority: Authority
    log: PublicKey


def found_federation(folder: Path) -> Federation:
    """The authority of a run's folder, made if there is none: who resumes the run goes on with its log."""
    home = Home(folder)
    if not (home.authority / "log.pem").exists():  # the last that is written of it
        shutil.rmtree(home.authority, ignore_errors=True)
        home.authority.mkdir(parents=True, mode=0o700)
        found(home, "simulation", _CERTIFICATES, now=utc_now())
    key, certificate = load_ec_key(home.authority / "ca.key"), load_certificate(home.authority / "ca.pem")
    authority = Authority(key, certificate, _CERTIFICATES)
    return Federation(home, authority, certified_key(load_log_certificate(home)))


def open_agent(site: Prepared, policy: Policy, federation: Federation, *, cache_bytes: int) -> Agent:
    """The agent of a prepared site, its worker started, with a certificate of the simulation's own authority."""
    log = site_log(site.folder / "site.log", site.name)
    settings = Settings(site.name, (site.store,), site.folder / "run", cache_bytes=cache_bytes)
    worker = Worker(settings, log)
    worker.start()
    credentials = credentials_of(site.name, federation)
    secure = _secure(site.folder / "secagg", credentials)
    budget = _budget(site.folder, policy, credentials)
    steward = Steward((site.store,), policy, budget.signer, budget.now)
    return Agent(site.name, policy, worker, log, secure, budget=budget, ready=steward.ready)


@dataclass(frozen=True)
class Institution:
    """An agent whose answers are written down before they are delivered, as a hospital's are.

    Nothing travels here: an answer's SHA-256 is that of its header, and its tensors count as beside it.
    """

    agent: Agent
    releases: Releases

    def handle(self, message: Message, bundle: bytes) -> Message:
        """The agent's answer; raises LogError or NotWrittenError."""
        reply = self.agent.handle(message, bundle)
        return self.releases.answer(LOCAL, message, reply, _delivered(reply), lambda: reply)


def _delivered(reply: Message) -> Sent:
    header, tensors = header_bytes(reply), b""
    if reply.has_error():
        header = (reply.error.reason or "").encode()
    else:
        (record,) = reply.content.config_records.values()
        tensors = bytes(record.get("tensors", b""))  # type: ignore[arg-type]
    return Sent(sha256_hex(header), len(header) + len(tensors), sha256_hex(tensors) if tensors else None)


def open_institution(folder: Path, agent: Agent, federation: Federation) -> Institution:
    """The agent of a site's folder with its own log; raises LogError, NotWrittenError and OSError."""
    credentials = credentials_of(agent.site, federation)
    releases = begin_releases(folder / RELEASES, federation.authority.federation, agent.site)
    releases.sign = lambda checkpoint: sign(checkpoint, checkpoint.origin, credentials.key, utc_now())
    if agent.budget is not None:
        releases.ledger = partial(state_of, agent.budget)
    releases.policy(agent.policy)
    return Institution(agent, releases)


def secure_site(folder: Path, name: str, federation: Federation) -> SecureSite:
    """A site's part in secure sums, for one that has no agent of ours."""
    return _secure(folder, credentials_of(name, federation))


def _secure(folder: Path, credentials: Credentials) -> SecureSite:
    """Rounding is by the plan's seed, so that a simulation gives the same bits again."""
    return SecureSite(folder, lambda: credentials, utc_now, seeded)


def credentials_of(name: str, federation: Federation) -> Credentials:
    """A site's key of its own, and its certificate; made if there are none. Both lie in the run's folder."""
    authority, certificate = federation.authority, federation.home.certificate_of(name)
    key = certificate.with_suffix(".key")
    if not certificate.exists():
        certificate.parent.mkdir(mode=0o700, exist_ok=True)
        key.unlink(missing_ok=True)
        save_key(key, new_key())
        issued = authority.issue_site(name, load_ec_key(key).public_key())
        replace_file(certificate, certificate_pem(issued))
    trust = Trust(authority.federation, authority.certificate, federation.log)
    return Credentials(name, load_ec_key(key), load_certificate(certificate), trust)


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
