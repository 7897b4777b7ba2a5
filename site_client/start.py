"""`locum site start`: puts an agent together from its folder, and runs it until it is told to end.

home/  site.yaml  identity/  proposals/  approvals/  journal/  work/ (blobs on their way)  run/ (local tensors)
       secagg/ (keys of secure sums)  ledger.sqlite  log/ (what left)  cohort/ (what was asked)  site.log  agent.json
       readiness/ (statements that were let go)  agent.lock
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path

import grpc

from locum.common.errors import DataError, RunError
from locum.common.identity import IdentityError
from locum.common.plan import Plan
from locum.common.proto.locum_pb2_grpc import RegistryStub
from locum.common.secagg.roster import Trust
from locum.site_client import gate
from locum.site_client.agent import Agent
from locum.site_client.approvals import Approvals, open_approvals
from locum.site_client.cohort.answering import Answering
from locum.site_client.cohort.counting import Cohorts
from locum.site_client.cohort.memory import FOLDER as COHORT
from locum.site_client.cohort.memory import Memory
from locum.site_client.configuration import FILE, SiteConfiguration, read_configuration
from locum.site_client.enrolment import connection_error, needs_renewal, open_channel, renew
from locum.site_client.gate import Policy
from locum.site_client.identity import SiteIdentity, load_identity
from locum.site_client.privacy.budget import Budget, Signer, state_of
from locum.site_client.privacy.ledger import Ledger, LedgerError, State
from locum.site_client.pulse import News, Pulse
from locum.site_client.readiness.outbox import statements
from locum.site_client.readiness.statement import Steward
from locum.site_client.releases import open_releases
from locum.site_client.secure import Credentials, SecureSite, drawn, seeded
from locum.site_client.service import Service
from locum.site_client.witness import FOLDER, Witness, over
from locum.site_client.worker import Worker, process_context

_M_ARENA_MAX = -8
_LOG_BYTES, _LOG_FILES = 16 << 20, 5


def start(home: Path) -> None:
    """Runs the agent of a folder until SIGTERM or SIGINT; raises LocumError if it cannot begin."""
    _keep_small()
    identity = load_identity(home)
    configuration = read_configuration(home / FILE)
    with _alone(home):
        process_context()  # loads torch meanwhile
        log = open_log(home, identity.site, configuration)
        service = open_service(home, configuration, log)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.end())
        log.info("the agent of %s starts", identity.site)
        service.pulse.start()
        try:
            service.run()
        finally:
            service.agent.worker.stop()
            log.info("the agent of %s has ended", identity.site)


def _keep_small() -> None:
    """One arena for all threads (glibc, mallopt(3)): each of gRPC's threads would keep memory of its own."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def open_service(home: Path, configuration: SiteConfiguration, log: logging.Logger) -> Service:
    """The agent of a folder, not yet connected; raises DataError."""
    identity = load_identity(home)
    worker = Worker(configuration.settings(identity.site, home / "run"), log)

    def approvals() -> Approvals:
        """Opened at each use: a site that enrolled anew has another key, and its agent may have run on."""
        return open_approvals(home, configuration.policy)

    def admit(policy: Policy, plan: Plan) -> None:
        gate.admit_run(policy, plan, approved=approvals().standing(plan.digest), now=datetime.now().astimezone())

    def may_leave(bundle: bytes) -> None:
        plan = agent.plan_of(bundle)
        gate.admit_release(agent.policy, plan, approved=approvals().standing(plan.digest))

    def renewed(channel: grpc.Channel, now: datetime) -> bool:
        current = load_identity(home)
        if not needs_renewal(current, now):
            return False
        try:
            renew(current, home, channel, releases, now)
        except grpc.RpcError as error:
            raise connection_error(error, current.membership.address) from error
        except IdentityError as error:
            raise DataError(f"the renewed certificate cannot be used: {error}", "ask the coordinator") from error
        log.info("the certificate was renewed")
        return True

    secure = SecureSite(
        home / "secagg",
        lambda: credentials_of(load_identity(home)),
        lambda: datetime.fromtimestamp(service.pulse.now(), UTC),
        seeded if configuration.rehearsal else drawn,
    )
    budget = open_budget(home, configuration, log, lambda: datetime.fromtimestamp(service.pulse.now(), UTC))
    releases = open_releases(home, partial(state_of, budget))
    _compare(budget.ledger, releases.known_ledger, log)
    releases.policy(configuration.policy)
    steward = Steward(configuration.stores, configuration.policy, budget.signer, budget.now)
    agent = Agent(identity.site, configuration.policy, worker, log, secure, admit, budget, ready=steward.ready)
    witness = Witness(
        home / FOLDER,
        lambda: credentials_of(load_identity(home)),
        lambda: datetime.fromtimestamp(service.pulse.now(), UTC),
        log,
    )
    cohort = Answering(
        Memory(home / COHORT),
        Cohorts(configuration.stores),
        configuration.policy,
        lambda: load_identity(home),
        lambda: service.pulse.now(),  # noqa: PLW0108 - the service is made below
        lambda: releases.answers,
        log,
    )
    news = News(
        receive=lambda envelope: approvals().receive(envelope),
        decisions=lambda: approvals().decisions(),
        asked=cohort.receive,
        answers=cohort.statements,
        readiness=lambda: statements(home),
        renew=renewed,
        witness=lambda channel: witness.look(over(RegistryStub(channel), releases)),
    )
    service = Service(
        home=home,
        agent=agent,
        connect=lambda: open_channel(load_identity(home), configuration.proxy),
        identity=lambda: load_identity(home),
        log=log,
        pulse=Pulse(news, releases, log),
        releases=releases,
        may_leave=may_leave,
    )
    return service


def credentials_of(identity: SiteIdentity) -> Credentials:
    """What secure sums need of a site's identity."""
    trust = Trust(identity.membership.federation, identity.authority, identity.log_key)
    return Credentials(identity.site, identity.key, identity.certificate, trust)


def open_budget(
    home: Path, configuration: SiteConfiguration, log: logging.Logger, now: Callable[[], datetime]
) -> Budget:
    """What the site's patients may still give; of a ledger that cannot be used the log says so, and the agent runs."""
    ledger = Ledger(configuration.accounts.ledger)
    try:
        if ledger.begin():
            log.warning("a new ledger begins in %s: nothing counts as spent", ledger.path)
        ledger.rows()
    except LedgerError as error:
        log.warning("plans with differential privacy are refused: %s; %s", error, error.remedy)

    def signer() -> Signer:
        identity = load_identity(home)
        return Signer(identity.site, identity.key)

    return Budget(ledger, configuration.accounts.population, configuration.policy, signer, now)


def _compare(ledger: Ledger, known: State | None, log: logging.Logger) -> None:
    """Warns of a ledger that does not go on from what the site's log knows of it: a chain alone cannot show that."""
    try:
        if known is not None:
            ledger.check(known)
    except LedgerError as error:
        log.warning("the ledger is not the one that this site's log knows of: %s; %s", error, error.remedy)


def open_log(home: Path, site: str, configuration: SiteConfiguration) -> logging.Logger:
    """The site's own log, in its folder and on standard error; nothing of it goes anywhere else."""
    log = logging.getLogger(f"locum.site.{site}.{home}")
    log.propagate = False
    log.setLevel(configuration.log_level.upper())
    handlers = (
        RotatingFileHandler(home / "site.log", maxBytes=_LOG_BYTES, backupCount=_LOG_FILES),
        logging.StreamHandler(),
    )
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    return log


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One agent a folder."""
    with (home / "agent.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"an agent runs in {home} already", "stop that one first") from error
        yield
