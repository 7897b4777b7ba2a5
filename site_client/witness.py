"""The site as a witness of the federation's log: who has shown it one history cannot show it another.

witness/AUTHORITY.json    the last checkpoint that the site signed, of the federation with this root certificate
witness/refused-*.json    what was refused, as it was shown: a checkpoint that the log key signed is evidence

Rules:
  * A checkpoint is signed only if it is of this federation's log, the log key signed it, and a proof shows that the log
    which the site saw last is its beginning. The first one is believed.
  * What will be signed is on the disk before it is. So of one size the site never signs two roots, whatever dies.
  * A log that has another history, or has become shorter, is not signed any more. Site's log and status say so.
"""

from __future__ import annotations

import json
import logging
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from pydantic import BaseModel, ConfigDict, ValidationError

from locum.common.canonical import sha256_hex
from locum.common.durable import replace_file
from locum.common.errors import LocumError, RunError
from locum.common.identity import fingerprint_of
from locum.common.log.entries import moment
from locum.common.log.lines import locked
from locum.common.log.merkle import EMPTY_ROOT, ProofError, check_consistency
from locum.common.log.note import Checkpoint, NoteError, check_signature, cosign, opened
from locum.common.log.origins import federation_origin, site_origin
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub
from locum.site_client.fleet import RefusedError, guarded
from locum.site_client.releases import Releases
from locum.site_client.secure import Credentials

FOLDER = "witness"
_CALL_SECONDS = 10.0
_MOST_EVIDENCE = 20

#: Says up to what size the site has seen the log, and hands in its line under that checkpoint unless it is empty;
#: returns the newest checkpoint, empty if there is none, and the proof from there.
Ask = Callable[[int, str], tuple[bytes, Sequence[bytes]]]


class ForkedError(LocumError):
    """The log that the coordinator shows is not one that the site can vouch for."""


class Seen(BaseModel):
    """What a witness keeps.

    Attributes:
        note: the last checkpoint that it signed, with the log's own signature; empty before the first.
        at: when it was signed, UTC; empty before the first.
        problem: why what the coordinator showed last was not signed; empty if it was.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    note: str = ""
    at: str = ""
    problem: str = ""

    @property
    def size(self) -> int:
        """How many entries the site vouches for."""
        return opened(self.note)[0].size if self.note else 0

    @property
    def root(self) -> bytes:
        """The root over them."""
        return opened(self.note)[0].root if self.note else EMPTY_ROOT


@dataclass
class Witness:
    """A site's memory of the log.

    Attributes:
        folder: where it lies.
        credentials: the site's key, and whom it believes.
        now: the time by the coordinator's clock.
        log: what people read.
    """

    folder: Path
    credentials: Callable[[], Credentials]
    now: Callable[[], datetime]
    log: logging.Logger
    _handed_in: int = -1

    def look(self, ask: Ask) -> int:
        """Looks at the newest checkpoint and signs it if it may; how many entries the site vouches for.

        Raises ForkedError if it may not, RunError for a memory that cannot be read, and whatever `ask` raises.
        """
        with self._alone():
            own = self.credentials()
            path = self.folder / f"{fingerprint_of(own.trust.authority)[:16]}.json"
            seen = read_seen(path)
            note, proof = self._asked(ask, seen, own)
            try:
                newest = _checked(own, seen, note.decode(errors="replace"), proof, self.now())
            except ForkedError as error:
                self._refuse(path, seen, error, note, proof)
                raise
            if newest != seen:
                replace_file(path, newest.model_dump_json(indent=1).encode())
            if newest.note != seen.note:
                self._asked(ask, newest, own)
            return newest.size

    def _asked(self, ask: Ask, seen: Seen, own: Credentials) -> tuple[bytes, Sequence[bytes]]:
        """Asks, and hands in the line of what is on the disk unless the coordinator has it since this process began."""
        if not seen.note or seen.size == self._handed_in:
            return ask(seen.size, "")
        line = cosign(seen.note, site_origin(own.trust.federation, own.site), own.key, self.now())
        try:
            reply = ask(seen.size, line)
        except RefusedError as error:
            self.log.warning("the coordinator does not take a cosignature of its log: %s", error)
            reply = ask(seen.size, "")
        else:
            self._handed_in = seen.size
        return reply

    def _refuse(self, path: Path, seen: Seen, error: ForkedError, note: bytes, proof: Sequence[bytes]) -> None:
        """Keeps what was shown, and says so; once for each thing that is wrong."""
        if seen.problem == error.message:
            return
        self.log.error("%s; %s", error.message, error.remedy)
        evidence = {"seen": seen.note, "shown": note.decode(errors="replace"), "proof": [*map(_text, proof)]}
        content = json.dumps(evidence, indent=1).encode()
        if len(list(self.folder.glob("refused-*.json"))) < _MOST_EVIDENCE:
            replace_file(self.folder / f"refused-{sha256_hex(content)[:16]}.json", content)
        replace_file(path, seen.model_copy(update={"problem": error.message}).model_dump_json(indent=1).encode())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time: between two of them a size could have two roots."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.folder):
            yield


def read_seen(path: Path) -> Seen:
    """What a witness has seen; raises RunError if its memory cannot be read, for then it must not sign."""
    try:
        found = Seen.model_validate_json(path.read_bytes())
        found.size  # noqa: B018 - a note that is none is found here
    except FileNotFoundError:
        return Seen()
    except (OSError, ValidationError, NoteError) as error:
        reason = f"{path} cannot be read: the site does not know what it has seen of the log, and signs nothing"
        raise RunError(reason, "restore it from a backup, or remove it to believe the log as it is now") from error
    return found


def seen_by(home: Path, authority: x509.Certificate) -> Seen:
    """What the agent of a folder has seen of its federation's log; raises RunError."""
    return read_seen(home / FOLDER / f"{fingerprint_of(authority)[:16]}.json")


def over(stub: RegistryStub, releases: Releases) -> Ask:
    """Asks the gateway; a line that is handed in is written down before."""

    def ask(size: int, line: str) -> tuple[bytes, Sequence[bytes]]:
        request = pb.WitnessRequest(size=size, cosignature=line.encode())

        def call() -> pb.WitnessReply:
            reply: pb.WitnessReply = guarded(lambda: stub.Witness(request, timeout=_CALL_SECONDS))
            return reply

        reply = releases.cosignature(line, call) if line else call()
        return reply.checkpoint, list(reply.proof)

    return ask


def _checked(own: Credentials, seen: Seen, note: str, proof: Sequence[bytes], now: datetime) -> Seen:
    """What is seen now: the checkpoint that is shown, if the site can vouch for it; raises ForkedError."""
    shown = _signed(own, note) if note else Checkpoint(federation_origin(own.trust.federation), 0, EMPTY_ROOT)
    if shown.size < seen.size:
        raise _forked(f"it had {seen.size} entries, and is shown with {shown.size}")
    try:
        check_consistency(seen.size, shown.size, proof, seen.root, shown.root)
    except ProofError as error:
        raise _forked(f"what is shown is another history than the {seen.size} entries seen before: {error}") from error
    if shown.size == seen.size:
        return seen.model_copy(update={"problem": ""})
    return Seen(note=note, at=moment(now))


def _signed(own: Credentials, note: str) -> Checkpoint:
    origin = federation_origin(own.trust.federation)
    try:
        shown = check_signature(note, origin, own.trust.log)
    except NoteError as error:
        raise _forked(f"a checkpoint of it does not count: {error}") from error
    if shown.origin != origin:
        raise _forked(f"a checkpoint is of another log, {shown.origin}")
    return shown


def _forked(what: str) -> ForkedError:
    return ForkedError(
        f"THE FEDERATION'S LOG IS NOT WHAT IT WAS: {what}",
        "this site does not vouch for it any more; ask the coordinator, and the other sites what they have seen",
    )


def _text(content: bytes) -> str:
    return b64encode(content).decode()
