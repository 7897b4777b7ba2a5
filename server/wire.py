"""The way between the round engine and real hospitals: blobs in the spool, hints from the gateway, sites that pause.

Rules:
  * A site is the name in its certificate. The registry says which node is whose; nobody names himself.
  * Only sites that have approved the plan are asked.
  * A model goes out as one file of the spool; an update is mapped where the gateway has put it. Neither is copied.
  * A site that was not heard from for `SILENT_SECONDS` costs its contribution; it is back when it is heard again.
  * A reply that cannot be taken apart, or was announced and never came, costs its own site and nobody else.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from flwr.app import Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from locum.common.blobs import SHA256
from locum.common.durable import replace_file
from locum.common.errors import LocumError
from locum.common.messages import BLOB_THRESHOLD, INLINE, Arrays, Carrier, Fields, MessageError, Sealer
from locum.common.plan import Plan
from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc
from locum.common.secagg.model import name_of, seal_file
from locum.common.sums import metric_lengths
from locum.common.tensor_files import Mapped, Sendable, map_tensors, write_tensors
from locum.server.gateway.hints import HEADER
from locum.server.gateway.live import read_live
from locum.server.home import Home, ServerConfig
from locum.server.log import NotLoggedError, open_log
from locum.server.records import Events
from locum.server.registry import Registry, RegistryError
from locum.server.run_log import Event, RunLog
from locum.server.runs import Run
from locum.server.signer import Signer, signer_of
from locum.server.superlink import wait_for_objects

logger = logging.getLogger("locum.server")

SILENT_SECONDS = 300.0
#: An agent that is there is heard every 5 s.
_PRESENT_SECONDS = 16.0
_LOOK_SECONDS = 0.5
_FIRST_PAUSE, _LONGEST_PAUSE = 15.0, 300.0
_HEADER_ROOM = 1 << 20
#: Completed replies that the gateway has told and nobody has asked for; a gateway remembers half as many.
_MOST_HINTS = 20_000
#: How long a reply that is said to be complete may keep the others waiting, seconds; Flower would wait for two hours.
_OBJECT_SECONDS = 2.0
#: What Flower raises for objects that are well named and make no sense.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    DecodeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)


class StoppedError(LocumError):
    """Somebody wanted the run to stop; committed rounds are kept."""


class Wire:
    """The link of a run between hospitals (see :class:`locum.server.link.Link`).

    Args:
        home: the coordinator's folder.
        config: its configuration.
        run: the run; its name is its folder in the spool, and `wanted.json` in its own folder can stop it.
        events: where pauses are told.
    """

    def __init__(self, home: Home, config: ServerConfig, *, run: Run, events: Events) -> None:
        self._home, self._run, self._events = home, run, events
        self._plan = run.plan
        wait_for_objects(_OBJECT_SECONDS)
        self._registry = Registry(home.registry)
        self._spool = home.spool / run.id
        _forget_uploads(self._spool / "up")
        self._hints = _Hints(config, (home.superlink / "hints.secret").read_text())
        self._pause, self._calm_after = _FIRST_PAUSE, 0.0
        self._since = time.time()
        self._log: RunLog | None = None

    # --- who

    def nodes(self, known: Iterable[int]) -> Mapping[int, str | None]:
        """The connected nodes of sites that take part, by the name in the certificate."""
        names, asked = self._registry.nodes(), self._asked()
        return {node: names[node] for node in known if names.get(node) in asked}

    def current(self, sites: Collection[str]) -> dict[str, int]:
        """The sites' nodes as they are now: one that has enrolled again has another. 0: none, and `away` says why."""
        nodes = {name: node for node, name in self._registry.nodes().items()}
        return {site: nodes.get(site, 0) for site in sites}

    def away(self, sites: Iterable[str]) -> dict[str, str]:
        """The sites that were not heard from for too long, and those that have no node."""
        heard, now, known = _heard(self._home.live), time.time(), set(self._registry.nodes().values())
        last = {site: max(heard.get(site, 0.0), self._since) for site in sites}
        silent = {site: _silence(heard.get(site)) for site, at in last.items() if now - at > SILENT_SECONDS}
        return silent | {site: self._outside(site) for site in set(last) - known}

    def _outside(self, site: str) -> str:
        """Why a site has no node."""
        row = self._registry.site(site)
        revoked = row is None or row.revoked_at is not None
        return "its certificate was revoked" if revoked else "it has enrolled again, and has not connected since"

    def _asked(self) -> set[str]:
        """The sites that are asked: those that have approved the plan, and were not left out of the run."""
        return set(self._registry.approvals(self._plan.digest)) - set(self._run.created.without)

    def signer(self) -> Signer:
        """The federation's log key and authority."""
        return signer_of(self._home, self._run.id)

    def log(self, plan: Plan) -> RunLog:
        """The federation's."""
        if self._log is None:
            self._log = RunLog(open_log(self._home), self._run.id, plan.digest)
        return self._log

    def certificate(self, site: str) -> x509.Certificate | None:
        """The newest one of an enrolled site; its key is that of all before it."""
        row = self._registry.site(site)
        return None if row is None else row.certificate

    # --- tensors

    def outgoing(self, model: Arrays) -> Sealer:
        """The model as a file of the spool, linked where it lies already; a small one inside the message."""
        size = sum(array.nbytes for array in model.values())
        down, limit = self._spool / "down", self._spool / "limit.json"
        down.mkdir(parents=True, exist_ok=True)
        if not limit.exists():
            most = max(size * self._plan.protection.ring // 32, 2 * _bytes_of_sums(self._plan)) + _HEADER_ROOM
            replace_file(limit, json.dumps({"upload_bytes": most, "plan": self._plan.digest}).encode())
        return INLINE if size <= BLOB_THRESHOLD else Outgoing(down)

    def incoming(self, site: str) -> Carrier:
        """What the site has uploaded."""
        return Incoming(self._spool / "up" / site)

    def taken(self, site: str) -> None:
        """Removes what the site has uploaded."""
        for path in (self._spool / "up" / site).glob("*"):
            if not path.name.endswith(".part"):
                path.unlink(missing_ok=True)

    # --- messages

    def sent(self, messages: Mapping[str, int]) -> None:
        """Tells the gateway which nodes have a message waiting."""
        self._hints.sent(list(messages.values()))

    def ready(self, waiting: Mapping[str, str]) -> list[str]:
        """The replies that the gateway says are complete; after the hints were interrupted those that may be.

        Asked for the reply of a site that is away, Flower would make up an error, and refuse the reply when it comes.
        """
        self._check()
        complete = self._hints.complete(waiting, _LOOK_SECONDS)
        if complete is not None:
            return complete
        there = {site for site, _ in self._present()}
        return [number for number, site in waiting.items() if site in there]

    def pulled(self, grid: Grid, waiting: Collection[str]) -> Iterator[tuple[str, Message | None]]:
        """Each reply by itself, so that one that was made to do harm costs its own site and nobody else."""
        for number in waiting:
            reply: Message | None = None
            try:
                found = list(grid.pull_messages([number]))
                if not found:
                    continue
                reply = found[0]
            except _UNREADABLE:
                logger.exception("a reply cannot be read")
            yield number, reply

    def wait(self, refusal: LocumError, missing: Collection[str]) -> None:
        """Pauses the run until a site comes back, or for a while; raises StoppedError."""
        if time.monotonic() > self._calm_after:
            self._pause = _FIRST_PAUSE
        before = self._present()
        self._events.emit("paused", reason=refusal.message, missing=sorted(missing or self._missing(before)))
        untold: tuple[Event, ...] = () if self._said("paused") else ("paused",)
        self._rest()
        while not self._said(*untold, "resumed"):  # what has no room for a line has none for a round
            self._rest()
        self._calm_after = time.monotonic() + self._pause
        self._events.emit("resumed")

    def _rest(self) -> None:
        """Until a site comes back, or for a while; raises StoppedError."""
        before, until = self._present(), time.monotonic() + self._pause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        while time.monotonic() < until and not (now := self._present()) - before:
            before = now  # who goes while the run is paused is back when it is heard again
            self._check()
            time.sleep(_LOOK_SECONDS)

    def _said(self, *events: Event) -> bool:
        """Logs that the run is paused or goes on; returns whether it could."""
        try:
            log = self.log(self._plan)
            log.append(*map(log.said, events))
        except NotLoggedError as error:
            logger.warning("%s", error)
            return False
        return True

    def _missing(self, present: set[tuple[str, str]]) -> set[str]:
        try:
            return self._asked() - {site for site, _ in present}
        except RegistryError:
            return set()

    def _present(self) -> set[tuple[str, str]]:
        """The agents that are there now and are asked: site, and the agent's own number. None while nobody knows."""
        try:
            asked, now = self._asked(), time.time()
        except RegistryError as error:
            logger.warning("%s", error)
            return set()
        heard = read_live(self._home.live).items()
        return {(site, said.instance) for site, said in heard if site in asked and now - said.at < _PRESENT_SECONDS}

    def _check(self) -> None:
        wanted = self._run.wanted
        if wanted is not None and wanted.want == "stop":
            raise StoppedError(f"the run {self._run.id} was stopped", f"`locum resume {self._run.id}` goes on with it")


def _bytes_of_sums(plan: Plan) -> int:
    """Of the metric sums that a site sends for one fold."""
    return 8 * sum(metric_lengths(plan, "test").values())


def _heard(live: Path) -> dict[str, float]:
    """When each site was last heard from."""
    return {site: said.at for site, said in read_live(live).items()}


def _forget_uploads(folder: Path) -> None:
    """Removes the whole updates of a process before this one.

    Nobody will fold them, and they were not flushed: after a power cut one may not be what its name says. What is there
    of an unfinished one stays; it is checked as a whole when the rest has come.
    """
    for path in folder.glob("*/*"):
        if path.suffix != ".part":
            path.unlink(missing_ok=True)


def _silence(at: float | None) -> str:
    if at is None:
        return "it has not been heard from"
    return f"it has not been heard from since {datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


# --- blobs


@dataclass(frozen=True)
class Outgoing:
    """Tensors go out as a file in the spool, named by its digest."""

    folder: Path

    def stow(self, tensors: Sendable) -> Fields:
        """Links the file that the tensors are mapped from, or writes one; raises OSError."""
        if isinstance(tensors, Mapped):
            digest, size = tensors.sha256, tensors.size
            _link(tensors.path, self.folder / digest)
        else:
            beside = self.folder / f".{os.getpid()}.tmp"
            digest, size = write_tensors(beside, tensors)
            beside.replace(self.folder / digest)
        return self._only(digest, size)

    def seal(self, model: Mapped, key: bytes) -> Fields:
        """Writes the encrypted file of a model; its name tells nothing of what is in it. Raises OSError."""
        name, beside = name_of(key), self.folder / f".{os.getpid()}.tmp"
        seal_file(model.path, beside, key)
        beside.replace(self.folder / name)
        return self._only(name, model.size)

    def _only(self, name: str, size: int) -> Fields:
        """The fields that name a file; the models before it are removed."""
        for other in self.folder.glob("*"):
            if other.name != name:
                other.unlink(missing_ok=True)
        return {"sha256": name, "size": size}

    def fetch(self, fields: Fields) -> Arrays:
        """Nothing comes in by this way."""
        raise MessageError(f"{len(fields)} fields that nobody asked for")


def _link(path: Path, target: Path) -> None:
    if not target.exists():
        beside = target.with_name(f".{target.name}.tmp")
        beside.unlink(missing_ok=True)
        os.link(path, beside)
        beside.replace(target)


@dataclass(frozen=True)
class Incoming:
    """Tensors come in as a file that the gateway has checked against its digest and put in the site's folder."""

    folder: Path

    def stow(self, tensors: Sendable) -> Fields:
        """A small thing goes inside the message."""
        return INLINE.stow(tensors)

    def fetch(self, fields: Fields) -> Arrays:
        """Maps the file that a reply names; raises MessageError."""
        if "sha256" not in fields:
            return INLINE.fetch(fields)
        digest = str(fields["sha256"])
        path = self.folder / digest
        if set(fields) != {"sha256", "size"} or not SHA256.fullmatch(digest) or not path.is_file():
            raise MessageError("it names a blob that was not uploaded")
        try:
            return map_tensors(path, digest)
        except ValueError as error:
            raise MessageError(f"its blob is not tensors: {error}") from error


# --- hints


class _Hints:
    """The engine's end of the hint stream; connects again for ever."""

    def __init__(self, config: ServerConfig, secret: str) -> None:
        self._target, self._secret = f"127.0.0.1:{config.hints_port}", secret
        self._outgoing: queue.SimpleQueue[pb.Sent | None] = queue.SimpleQueue()  # of the stream that is open now
        self._complete: queue.Queue[str | None] = queue.Queue(_MOST_HINTS)
        self._last: list[int] = []
        self._thread = threading.Thread(target=self._follow, name="hints", daemon=True)
        self._thread.start()

    def sent(self, nodes: list[int]) -> None:
        self._last = nodes
        self._outgoing.put(pb.Sent(nodes=nodes))

    def complete(self, waiting: Collection[str], seconds: float) -> list[str] | None:
        """Of `waiting`, those that are complete; waits up to `seconds` for the first. None if hints may be lost."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                number = self._complete.get(timeout=left)
            except queue.Empty:
                break
            if number is None:
                return None
            if number in waiting:
                return [number]
        return []

    def _follow(self) -> None:
        while True:
            self._outgoing.put(None)
            self._outgoing = queue.SimpleQueue()
            requests = _until_none(self._outgoing)
            self._outgoing.put(pb.Sent(nodes=self._last))
            with grpc.insecure_channel(self._target, [("grpc.enable_http_proxy", 0)]) as channel:
                stream = rpc.HintsStub(channel).Follow(requests, metadata=((HEADER, self._secret),))
                try:
                    for replied in stream:
                        self._note(replied.reply_to)
                except grpc.RpcError:
                    self._note(None)  # what was completed meanwhile is not known: pull all once
            time.sleep(_LOOK_SECONDS)

    def _note(self, number: str | None) -> None:
        """Keeps a hint; while nobody waits for them, the oldest go, and that some are lost is kept."""
        while True:
            try:
                self._complete.put_nowait(number)
            except queue.Full:
                self._complete.get_nowait()
                number = None
            else:
                return


def _until_none(hints: queue.SimpleQueue[pb.Sent | None]) -> Iterator[pb.Sent]:
    while (hint := hints.get()) is not None:
        yield hint
