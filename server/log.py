"""The federation's log: what happened, an entry each, written where it happens.

Rules:
  * The gateway, the commands and every run append to one log, each from its own process.
  * What cannot be written down does not happen: an approval is refused, and a run waits.
  * The first entry says whose log it is. A coordinator that had no log begins one with what its registry knows.
  * A checkpoint is signed with the log key. A site that asks is given the newest, and the proof that the log which it
    has seen is the beginning of this one; what it signs is kept if its certificate's key signed it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ed25519

from locum.common.errors import LocumError
from locum.common.identity import PublicKey, fingerprint_of, load_certificate, subject_of, utc_now
from locum.common.log.entries import (
    AnswerEntry,
    ApprovalEntry,
    EndEntry,
    Entry,
    FederationEntry,
    QuestionEntry,
    RunEntry,
    moment,
    read_entry,
    written,
)
from locum.common.log.lines import locked
from locum.common.log.note import NoteError, check_cosignature, opened, sign, with_lines
from locum.common.log.origins import federation_origin, site_origin
from locum.common.log.store import Log
from locum.server.authority import load_log_certificate, load_log_key
from locum.server.home import Home

logger = logging.getLogger("locum.server")

_SEAL_SECONDS = 3.0
_ANY_TIME = "1970-01-01T00:00:00Z"


class NotLoggedError(LocumError):
    """The log cannot be written, so what should stand in it must not happen."""


@dataclass
class _Known:
    """What the log has said of members, plans and runs, as far as it was read.

    Attributes:
        size: entries that were read.
        facts: the SHA-256 of what each entry about a member, a plan or a question says.
        runs: by run, what was said last.
    """

    size: int = 0
    facts: set[bytes] = field(default_factory=set)
    runs: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def follow(self, store: Log) -> None:
        """Reads on to the end."""
        end = store.size
        for leaf in store.entries(self.size, end):
            if any(kind in leaf for kind in _FOLLOWED):
                self._note(read_entry(leaf))
        self.size = end

    def _note(self, entry: Entry) -> None:
        if isinstance(entry, RunEntry):
            self.runs[entry.run] = entry.event
        elif isinstance(entry, EndEntry):
            self.runs[entry.run] = "ended"
        else:
            self.facts.add(_fact(entry))


_KINDS = ("site", "proposal", "approval", "question", "answer", "run", "end")
_FOLLOWED = tuple(f'"kind":"{kind}"'.encode() for kind in _KINDS)


def _fact(entry: Entry) -> bytes:
    """What an entry says, whenever it was written; a statement that was signed once is one fact."""
    if isinstance(entry, ApprovalEntry | QuestionEntry | AnswerEntry):
        return hashlib.sha256(entry.statement.encode()).digest()
    return hashlib.sha256(written(entry.model_copy(update={"at": _ANY_TIME}))).digest()


@dataclass(frozen=True)
class FederationLog:
    """A coordinator's log, in one of its processes; threads may share it.

    Every method raises LogError if the log is damaged, and NotLoggedError if it cannot be written or read.

    Attributes:
        federation: whose log it is.
        store: the log itself.
        key: the log key.
    """

    federation: str
    store: Log
    folder: Path
    key: ed25519.Ed25519PrivateKey = field(repr=False)
    _known: _Known = field(default_factory=_Known, repr=False)

    def append(self, *entries: Entry) -> None:
        """Appends all of these entries or none; they are on the disk when it returns."""
        with self._usable():
            self.store.append(*entries)

    def append_once(self, *entries: Entry) -> None:
        """Appends those of these entries that are not there, to the byte; looks through the whole log."""
        wanted = {written(entry): entry for entry in entries}
        if wanted:
            with self._usable():
                for leaf in self.store.entries():
                    wanted.pop(leaf, None)
            self.append(*wanted.values())

    def append_new(self, *entries: Entry) -> None:
        """Appends those of these entries about members, plans and questions that say what the log has not said."""
        with self._usable(), self._known.lock:
            self._known.follow(self.store)
            self.store.append(*(entry for entry in entries if _fact(entry) not in self._known.facts))

    def last_of(self, run: str) -> str:
        """What was said last of a run: the event of its newest entry of that kind, `ended`, or nothing."""
        with self._usable(), self._known.lock:
            self._known.follow(self.store)
            return self._known.runs.get(run, "")

    def seal(self) -> str:
        """Signs a checkpoint of the log as it is, unless one is signed; returns the newest."""
        with self._usable():
            return self.store.checkpoint(lambda checkpoint: sign(checkpoint, checkpoint.origin, self.key))

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"the log in {self.folder} cannot be used: {os.strerror(error.errno or errno.EIO)}"
            raise NotLoggedError(reason, "free space or mend the disk; what waits for it goes on by itself") from error

    def keep(self, stop: threading.Event) -> None:
        """Signs what is new every few seconds, until `stop` is set; what fails is tried again."""
        while not stop.wait(_SEAL_SECONDS):
            try:
                self.seal()
            except LocumError as error:
                logger.warning("%s", error)

    # --- witnesses

    def sealed(self) -> int:
        """How many entries the newest checkpoint counts."""
        with self._usable():
            note = self.store.latest()
        return opened(note)[0].size if note else 0

    def show(self, seen: int) -> tuple[bytes, list[bytes]]:
        """The newest checkpoint, empty if there is none, and the proof that a log of `seen` entries is its beginning.

        A log that is shorter than what was seen has no such proof.
        """
        with self._usable():
            note = self.store.latest()
            if note is None:
                return b"", []
            size = opened(note)[0].size
            return _bare(note).encode(), self.store.consistency(seen, size) if seen <= size else []

    def cosigned(self, site: str, key: PublicKey, line: str, size: int) -> bool:
        """Keeps what a site signed of the checkpoint of `size` entries; returns whether it is new.

        Raises NoteError if there is no such checkpoint, or the site's key did not sign it.
        """
        with self._usable():
            note = self.store.checkpoint_of(size)
            if note is None:
                raise NoteError(f"there is no checkpoint of {size} entries")
            check_cosignature(with_lines(_bare(note), [line]), site_origin(self.federation, site), key)
            return self.store.add_cosignature(size, line)

    def witnesses(self) -> dict[str, int]:
        """By key's name, the size of the newest checkpoint that it cosigned."""
        found: dict[str, int] = {}
        with self._usable():
            for note in self.store.checkpoints():
                checkpoint, lines = opened(note)
                found |= {line.name: checkpoint.size for line in lines if line.name != checkpoint.origin}
        return found


def _bare(note: str) -> str:
    """A checkpoint with the first of its lines, which is the log's own."""
    checkpoint, (own, *_) = opened(note)
    return f"{checkpoint.text()}\n{own.text()}\n"


def open_log(home: Home) -> FederationLog:
    """The log of a coordinator, begun if there is none; raises LogError, NotLoggedError or DataError."""
    authority, key = load_certificate(home.authority / "ca.pem"), load_log_key(home)
    federation = subject_of(authority).federation
    try:
        home.log.mkdir(mode=0o700, exist_ok=True)
        store = Log(home.log, federation_origin(federation))
    except OSError as error:
        reason = f"the log in {home.log} cannot be used: {error.strerror}"
        raise NotLoggedError(reason, "free space or mend the disk") from error
    log = FederationLog(federation, store, home.log, key)
    if store.size == 0:
        entry = FederationEntry(
            at=now(),
            name=federation,
            authority=fingerprint_of(authority),
            log_key=fingerprint_of(load_log_certificate(home)),
        )
        with locked(home.log):
            if store.size == 0:
                log.append(entry)
    return log


def now() -> str:
    """The time, as it stands in an entry."""
    return moment(utc_now())
