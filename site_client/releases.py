"""The one way out of a site: what leaves is written into the site's own log first, and only then sent.

Rules:
  * Every answer, decision, report, cosignature and request for a certificate is sent by a method of :class:`Releases`,
    which is told how. Its entry is on the disk before that begins. If it cannot be written, nothing is sent.
  * An entry says that something was about to leave, not that it arrived. What is sent again to the byte, after a cut or
    a crash, has one entry.
  * An answer that refuses what was asked has two, in one append: why, and that this left.
  * An answer to a cohort question has one with the question beside it, and one that refuses it the reason.
  * A report is written down when its words change: what the agent does, of which run, in which round. How far a blob
    is, the clock and the version are not.
  * Of what the coordinator sent only numbers and names in the form that they have in a log stand here.

Not in the log are heartbeats, confirmations, and questions: they have nothing of the site but that it is there.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flwr.app import ConfigRecord, Message
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from locum.common.activity import Activity
from locum.common.canonical import sha256_hex
from locum.common.durable import flush
from locum.common.errors import Code, LocumError
from locum.common.identity import utc_now
from locum.common.log.entries import (
    DecisionEntry,
    Entry,
    LedgerEntry,
    OwnerEntry,
    PolicyEntry,
    QuestionEntry,
    RefusalEntry,
    ReleaseEntry,
    moment,
)
from locum.common.log.lines import locked
from locum.common.log.note import Checkpoint, opened, sign
from locum.common.log.origins import site_origin
from locum.common.log.store import Log
from locum.site_client import gate
from locum.site_client.gate import Policy
from locum.site_client.identity import SiteIdentity, load_identity
from locum.site_client.privacy.ledger import State

T = TypeVar("T")

FOLDER = "log"
DECISION, REPORT, COSIGNATURE, RENEWAL, ENROLMENT = "decision", "report", "cosignature", "renewal", "enrolment"
COHORT = "cohort"
READINESS = "readiness"
#: Codes by which the site says no; the others say that it could not.
REFUSALS = frozenset(
    {
        Code.PLAN_UNREADABLE,
        Code.PLAN_MISMATCH,
        Code.POLICY_REFUSED,
        Code.UPDATE_REFUSED,
        Code.MESSAGE_UNREADABLE,
        Code.NOT_APPROVED,
        Code.SECURE_SUM_REFUSED,
        Code.SETUP_UNKNOWN,
        Code.PRIVACY_REFUSED,
        Code.BUDGET_SPENT,
    }
)
#: A checkpoint is signed once so many entries have none.
_UNSIGNED = 32
_PURPOSE = re.compile(r"[a-z][a-z._]{0,39}")
_RUN = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")
_CLAUSE = re.compile(r"[a-z_]{1,40}")
_UNKNOWN = "unknown"


class NotWrittenError(LocumError):
    """The site's own log cannot be written, so nothing leaves."""


class Sent(NamedTuple):
    """An answer as it travels.

    Attributes:
        sha256: of the message.
        bytes: of the message and of the tensors beside it.
        tensors: the SHA-256 of their file; None if there are none beside it.
    """

    sha256: str
    bytes: int
    tensors: str | None = None


class _Known(NamedTuple):
    """What the newest entries of their kinds say, so that nothing is said twice.

    Of an answer its SHA-256, and to which message it is; empty if a process before this one wrote it.
    """

    policy: str = ""
    ledger: State | None = None
    answer: tuple[str, str] = ("", "")
    report: tuple[str, str | None, int | None] | None = None
    decisions: frozenset[str] = frozenset()
    answers: frozenset[str] = frozenset()
    readiness: frozenset[str] = frozenset()


class Statement(NamedTuple):
    """A site's answer to a cohort question.

    Attributes:
        envelope: the answer, signed.
        question: the digest of the question; `asked` as the federation signed it.
        refused: the policy's key, if it tells nothing.
    """

    envelope: bytes
    question: str
    asked: bytes
    refused: str | None = None


@dataclass
class Releases:
    """The site's own log, and the gate before everything that leaves; threads share one.

    Every method raises NotWrittenError if the log cannot be written, LogError if it is damaged, and whatever `send`
    raises. Each returns what `send` does.

    Attributes:
        log: the site's own log.
        sign: signs a checkpoint with the site's key; None where the site has no key yet, and nothing is signed.
        ledger: the state of the privacy ledger; None if there is none to be trusted.
    """

    log: Log
    sign: Callable[[Checkpoint], str] | None = None
    ledger: Callable[[], State | None] = lambda: None
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        latest = self.log.latest()
        self._unsigned = self.log.size - (opened(latest)[0].size if latest else 0)

    @cached_property
    def _known(self) -> _Known:
        return _read(self.log)

    @property
    def known_ledger(self) -> State | None:
        """How far the privacy ledger had come at the newest entry that says so."""
        return self._known.ledger

    @property
    def answers(self) -> frozenset[str]:
        """The SHA-256 of each answer to a cohort question that was about to leave."""
        return self._known.answers

    # --- what leaves

    def answer(self, run: str, message: Message, reply: Message, sent: Sent, send: Callable[[], T]) -> T:
        """An answer to a message of a run: a result, or a failure as its code."""
        with self._writing():
            number = message.metadata.message_id
            if self._known.answer not in {(sent.sha256, number), (sent.sha256, "")}:
                state = self.ledger() or self._known.ledger
                spent = [] if state is None or state == self._known.ledger else [_ledger(state)]
                self._write(*spent, *_refusal(run, message, reply), _answer(run, message, reply, sent))
                self._know(answer=(sent.sha256, number), ledger=state)
        return send()

    def decision(self, envelope: bytes, send: Callable[[], T]) -> T:
        """A steward's decision, to the coordinator."""
        statement = sha256_hex(envelope)
        with self._writing():
            if statement not in self._known.decisions:
                self._write(_plain(DECISION, envelope, statements=(statement,)))
                self._know(decisions=self._known.decisions | {statement})
        return send()

    def statement(self, said: Statement, send: Callable[[], T]) -> T:
        """An answer to a cohort question, to the coordinator."""
        digest = sha256_hex(said.envelope)
        with self._writing():
            if digest not in self._known.answers:
                self._write(*_stated(said, digest))
                self._know(answers=self._known.answers | {digest})
        return send()

    def report(self, activity: Activity, run: str, round_number: int, content: bytes, send: Callable[[], T]) -> T:
        """A report of what the agent does."""
        words = (f"{REPORT}.{activity}", _run(run), round_number if run else None)
        with self._writing():
            if words != self._known.report:
                purpose, name, number = words
                self._write(_plain(purpose, content, run=name, round=number))
                self._know(report=words)
        return send()

    def cosignature(self, line: str, send: Callable[[], T]) -> T:
        """The line by which the site witnesses a checkpoint of the federation's log."""
        return self._request(_plain(COSIGNATURE, line.encode(), statements=(sha256_hex(line.encode()),)), send)

    def readiness(self, envelope: bytes, send: Callable[[], T]) -> T:
        """A signed statement of readiness that a steward lets go before any run."""
        digest = sha256_hex(envelope)
        with self._writing():
            if digest not in self._known.readiness:
                self._write(_plain(READINESS, envelope, statements=(digest,)))
                self._know(readiness=self._known.readiness | {digest})
        return send()

    def renewal(self, request: bytes, send: Callable[[], T]) -> T:
        """A request to certify the site's key anew."""
        return self._request(_plain(RENEWAL, request), send)

    def enrolment(self, request: bytes, send: Callable[[], T]) -> T:
        """A request to certify the site's key for the first time."""
        return self._request(_plain(ENROLMENT, request), send)

    def _request(self, entry: ReleaseEntry, send: Callable[[], T]) -> T:
        with self._writing():
            self._write(entry)
        return send()

    # --- what stands in the log beside it

    def policy(self, policy: Policy) -> None:
        """The policy that holds from here on."""
        found = gate.policy_digest(policy)
        with self._writing():
            if found != self._known.policy:
                self._write(PolicyEntry(at=_now(), policy=found))
                self._know(policy=found)

    def decided(self, plan: str, envelope: bytes) -> None:
        """A steward has decided on a plan; the coordinator is told later, if it is."""
        with self._writing():
            self._write(DecisionEntry(at=_now(), plan=plan, statement=envelope.decode()))

    def seal(self) -> None:
        """Signs a checkpoint of the log as it is, unless there is one."""
        if self.sign is None:
            return
        with _written(self.log):
            self.log.checkpoint(self.sign)
        self._unsigned = 0

    # --- writing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._turn, _written(self.log):
            yield

    def _write(self, *entries: Entry) -> None:
        if self._unsigned >= _UNSIGNED:
            self.seal()
        self.log.append(*entries)
        self._unsigned += len(entries)

    def _know(self, **changes: Any) -> None:
        self._known = self._known._replace(**changes)


@contextmanager
def _written(log: Log) -> Iterator[None]:
    """Says of a disk that fails what it means here."""
    try:
        yield
    except OSError as error:
        reason = f"the site's own log of what leaves ({log.origin}) cannot be written: {error.strerror or error}"
        raise NotWrittenError(reason, "free space, or mend the folder `log`: until then nothing leaves") from error


# --- opening


def open_releases(home: Path, ledger: Callable[[], State | None] = lambda: None) -> Releases:
    """The log of an enrolled site; raises DataError if it is not enrolled, LogError, NotWrittenError and OSError."""
    identity = load_identity(home)
    releases = begin_releases(home / FOLDER, identity.membership.federation, identity.site)
    releases.sign, releases.ledger = signer(lambda: load_identity(home)), ledger
    return releases


def signer(identity: Callable[[], SiteIdentity]) -> Callable[[Checkpoint], str]:
    """Signs checkpoints with a site's key, which enrolment may replace."""

    def signed(checkpoint: Checkpoint) -> str:
        return sign(checkpoint, checkpoint.origin, identity().key, utc_now())

    return signed


def begin_releases(folder: Path, federation: str, site: str) -> Releases:
    """The log of a site in a folder, with its owner as the first entry; nothing is signed by it.

    Raises LogError if the folder holds the log of another site, or a damaged one; NotWrittenError and OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = Log(folder, site_origin(federation, site))
    with locked(folder), _written(log):
        if log.size == 0:
            log.append(OwnerEntry(at=_now(), federation=federation, site=site))
    return Releases(log)


def set_aside(home: Path, federation: str, site: str) -> None:
    """Moves away the log of another site, so that one that enrols anew can begin its own; raises OSError."""
    folder = home / FOLDER
    owner = owner_of(folder)
    if owner is not None and (owner.federation, owner.site) != (federation, site):
        folder.rename(home / f"{FOLDER}.until-{utc_now():%Y%m%dT%H%M%S.%fZ}")
        flush(home)


def owner_of(folder: Path) -> OwnerEntry | None:
    """Whose log a folder holds; None if there is none that says so."""
    try:
        with (folder / "entries.jsonl").open("rb") as file:
            return OwnerEntry.model_validate_json(file.readline())
    except (OSError, ValidationError):
        return None


def _read(log: Log) -> _Known:
    """What a log has said."""
    known = _Known()
    for leaf in log.entries():
        entry = json.loads(leaf)
        kind = entry["kind"]
        if kind == "policy":
            known = known._replace(policy=entry["policy"])
        elif kind == "ledger":
            known = known._replace(ledger=State(entry["rows"], entry["head"]))
        elif kind == "release":
            known = _after(known, entry)
    return known


def _after(known: _Known, entry: Mapping[str, Any]) -> _Known:
    """What is known after a release."""
    purpose, sha256 = entry["purpose"], entry["sha256"]
    if purpose == DECISION:
        return known._replace(decisions=known.decisions | {sha256})
    if purpose == COHORT:
        return known._replace(answers=known.answers | {sha256})
    if purpose == READINESS:
        return known._replace(readiness=known.readiness | {sha256})
    if purpose.startswith(f"{REPORT}."):
        return known._replace(report=(purpose, entry["run"], entry["round"]))
    return known if purpose in {COSIGNATURE, RENEWAL, ENROLMENT} else known._replace(answer=(sha256, ""))


# --- entries


class _Task(BaseModel):
    """What a message of the coordinator says of its round; whatever else it says is not read."""

    model_config = ConfigDict(extra="ignore", strict=True)

    round: int | None = Field(None, ge=0, lt=1 << 53)
    context: str | None = None


class _Context(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    body: _Task


def _answer(run: str, message: Message, reply: Message, sent: Sent) -> ReleaseEntry:
    header = _header(reply)
    spent = _body(header.get("spent"))
    return ReleaseEntry(
        at=_now(),
        purpose=_asked(message),
        run=_run(run),
        round=_round(message),
        bytes=sent.bytes,
        sha256=sent.sha256,
        tensors=sent.tensors,
        statements=tuple(sorted(sha256_hex(statement.encode()) for statement in _statements(header))),
        code=_code(reply).name if reply.has_error() else None,
        epsilon=spent.get("epsilon"),
        delta=spent.get("delta"),
    )


def _refusal(run: str, message: Message, reply: Message) -> Iterator[RefusalEntry]:
    """Why the site says no, if that is what it does."""
    if not reply.has_error() or (code := _code(reply)) not in REFUSALS:
        return
    clause = (reply.error.reason or "").partition(" ")[2]
    known = clause if _CLAUSE.fullmatch(clause) else None
    yield RefusalEntry(at=_now(), run=_run(run), asked=_asked(message), code=code.name, clause=known)


def _stated(said: Statement, digest: str) -> Iterator[Entry]:
    """A question, why it is refused if it is, and that the answer left."""
    code = None if said.refused is None else Code.POLICY_REFUSED.name
    yield QuestionEntry(at=_now(), question=said.question, statement=said.asked.decode())
    if code is not None:
        yield RefusalEntry(at=_now(), asked=COHORT, code=code, clause=said.refused)
    yield _plain(COHORT, said.envelope, statements=(digest,), code=code)


def _ledger(state: State) -> LedgerEntry:
    return LedgerEntry(at=_now(), rows=state.rows, head=state.head)


def _plain(purpose: str, content: bytes, **fields: Any) -> ReleaseEntry:
    return ReleaseEntry(at=_now(), purpose=purpose, bytes=len(content), sha256=sha256_hex(content), **fields)


def _now() -> str:
    return moment(utc_now())


def _code(reply: Message) -> Code:
    """The code of a failure."""
    try:
        return Code(reply.error.code)
    except ValueError:
        return Code.INTERNAL


def _run(name: str) -> str | None:
    return name if _RUN.fullmatch(name) else None


def _asked(message: Message) -> str:
    kind = message.metadata.message_type
    return kind if _PURPOSE.fullmatch(kind) else _UNKNOWN


def _round(message: Message) -> int | None:
    """The round that a message is of, as far as it says one."""
    try:
        task = _Task.model_validate_json(header_bytes(message))
        if task.round is not None or task.context is None:
            return task.round
        return _Context.model_validate_json(task.context).body.round
    except ValidationError:
        return None


def header_bytes(message: Message) -> bytes:
    """The JSON of a message's header; empty if it has none."""
    record = message.content.get("locum") if message.has_content() else None
    content = record.get("json") if isinstance(record, ConfigRecord) else None
    return content if isinstance(content, bytes) else b""


def _header(reply: Message) -> dict[str, Any]:
    """The header of an answer, which was made here."""
    found: dict[str, Any] = json.loads(header_bytes(reply) or b"{}")
    return found


def _statements(header: Mapping[str, Any]) -> Iterator[str]:
    """What the site has signed in an answer."""
    yield from (header[name] for name in ("upload", "spent", "keys", "readiness") if header.get(name))
    yield from header.get("pairs", {}).values()


def _body(envelope: str | None) -> Mapping[str, Any]:
    """What a statement of this site says."""
    return {} if envelope is None else json.loads(envelope)["body"]
