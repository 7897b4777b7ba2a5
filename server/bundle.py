"""A run's bundle (:mod:`locum.common.audit.bundle`), put together from a coordinator's folder or a simulation's.

Rules:
  * The log is signed as it is now, and goes into the bundle up to there. It is the log of the whole federation: a part
    of it could not be checked.
  * Nothing of a hospital is here that the coordinator does not have; a bundle holds no key.
  * The bundle is whole or is not there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from locum.common.audit import bundle as parts
from locum.common.audit.bundle import Manifest, Parts, write_bundle
from locum.common.canonical import canonical_json, sha256_hex
from locum.common.durable import flush
from locum.common.envelope import EnvelopeError, open_proposal
from locum.common.errors import RunError
from locum.common.identity import certificate_pem, certified_key, fingerprint_of, load_certificate, parse_certificate
from locum.common.log.entries import EndEntry
from locum.common.log.note import opened
from locum.common.messages import LOCAL
from locum.server.authority import load_log_certificate
from locum.server.home import Home, read_config
from locum.server.log import FederationLog, open_log
from locum.server.model_card import CARD_FILE, MODEL_FILE
from locum.server.registry import Registry
from locum.server.runs import Run, find, newest
from locum.server.statement import FILE as STATEMENT_FILE
from locum.server.statement import entries_of


@dataclass(frozen=True)
class Source:
    """Where a run's record lies.

    Attributes:
        name: of the run, in the log.
        home: what has `authority/` and `log/`.
        folder: the run's own.
        plan: its plan as it was proposed, canonical JSON: a later version of Locum may write more keys.
        proposal: that, signed.
        certificates: every one that was issued to a site.
    """

    name: str
    home: Home
    folder: Path
    plan: bytes = field(repr=False)
    proposal: bytes = field(repr=False)
    certificates: tuple[x509.Certificate, ...] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the authority's certificate."""
        return fingerprint_of(load_certificate(self.home.authority / "ca.pem"))


def source_of(run: str | None, home: Path, run_dir: Path | None) -> Source:
    """A run of the coordinator in `home`, or of the simulation in `run_dir`; the newest where none is named.

    Raises RunError, PlanError or DataError.
    """
    if run_dir is None:
        return _coordinators(Home(home), run)
    if (run_dir / "coordinator").is_dir():  # rehearsed, by a real coordinator
        return _coordinators(Home(run_dir / "coordinator"), run)
    return _simulations(Home(run_dir), run_dir)


def _coordinators(home: Home, name: str | None) -> Source:
    read_config(home)
    run = newest(home) if name is None else find(home, name)
    with closing(Registry(home.registry)) as registry:
        _, proposal = registry.proposal(run.created.digest)
        certificates = tuple(certificate for _, certificate in registry.certificates())
    return Source(run.id, home, run.folder, _plan_of(home, proposal), proposal, certificates)


def _simulations(home: Home, folder: Path) -> Source:
    try:
        proposal = (folder / "proposal.json").read_bytes()
        found = sorted(home.certificate_of("any").parent.glob("*.pem"))
        certificates = tuple(parse_certificate(path.read_bytes()) for path in found)
    except OSError as error:
        raise RunError(f"{folder} holds no simulation with a log", "give the --out of a simulation") from error
    return Source(LOCAL, home, folder, _plan_of(home, proposal), proposal, certificates)


def _plan_of(home: Home, proposal: bytes) -> bytes:
    try:
        return canonical_json(open_proposal(proposal, certified_key(load_log_certificate(home))).plan)
    except EnvelopeError as error:
        raise RunError(f"the proposal is damaged: {error}", "restore it from a backup") from error


# --- the bundle


def make_bundle(source: Source, path: Path, *, with_model: bool = True) -> Manifest:
    """Writes a run's bundle; raises RunError if it cannot be written or the log says nothing of the run."""
    log = open_log(source.home)
    model = _released(log, source.name)
    size = opened(log.seal())[0].size
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            members = _members(source, log, size)
            if model is not None:
                members |= _results(source, Path(scratch), with_model=with_model)
            made = write_bundle(beside, Parts(log.federation, source.name, sha256_hex(source.plan), model, members))
        flush(beside)
        beside.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}", "choose another --out") from error
    finally:
        beside.unlink(missing_ok=True)
    flush(path.absolute().parent)
    return made


def _released(log: FederationLog, run: str) -> str | None:
    """The SHA-256 of the model that a run released, if it did; raises RunError if the log does not know the run."""
    model, begun = None, False
    for entry in entries_of(log, run):
        begun = True
        if isinstance(entry, EndEntry):
            model = entry.model
    if not begun:
        raise RunError(f"the log says nothing of {run} yet", "make the bundle when the run has begun")
    return model


def _members(source: Source, log: FederationLog, size: int) -> dict[str, parts.Source]:
    """What every bundle has, the log up to `size` entries."""
    authority = source.home.authority
    return {
        parts.AUTHORITY: authority / "ca.pem",
        parts.LOG_KEY: authority / "log.pem",
        parts.CERTIFICATES: b"".join(map(certificate_pem, source.certificates)),
        parts.ENTRIES: (leaf + b"\n" for leaf in log.store.entries(0, size)),
        parts.CHECKPOINTS: _checkpoints(log, size),
        parts.PROPOSAL: source.proposal,
        parts.PLAN: source.plan,
    }


def _checkpoints(log: FederationLog, size: int) -> Iterator[bytes]:
    for note in log.store.checkpoints():
        if opened(note)[0].size <= size:
            yield canonical_json({"checkpoint": note}) + b"\n"


def _results(source: Source, scratch: Path, *, with_model: bool) -> dict[str, parts.Source]:
    """The files of a run that has ended, those of them that there are."""
    found: dict[str, parts.Source] = {parts.CARD: _card(source, scratch)}
    files = {parts.SUMMARY: "run.json", parts.STATEMENT: STATEMENT_FILE}
    if with_model:
        files[parts.MODEL] = MODEL_FILE
    return found | {member: path for member, name in files.items() if (path := source.folder / name).exists()}


def _card(source: Source, scratch: Path) -> Path:
    """The run's model card: a simulation's own, or one that is written as `locum pull` does."""
    there = source.folder / CARD_FILE
    if there.exists() or source.name == LOCAL:
        return there
    from locum.server import report
    from locum.server.outcome import outcome_of

    (scratch / MODEL_FILE).symlink_to((source.folder / MODEL_FILE).absolute())
    report.write(scratch, outcome_of(Run(source.folder)))
    return scratch / CARD_FILE
