"""The agent's process: connects out, takes one message at a time, answers it, for ever.

Rules:
  * It ends when it is told to, and never by itself: whatever goes wrong it tries again, from half a second up to a
    quarter of a minute.
  * A message is written down before it is confirmed, its reply before it is sent. After a cut or a crash a finished
    reply is delivered, and work that was not finished is done again; nothing is trained twice for one reply.
  * What leaves goes through `releases.py`, which writes it down first.
  * What is finished leaves only if approval and policy still allow it, asked before each attempt to send it. The hours
    are for work, not for what is done.
  * A message has a time, by the coordinator's clock. When it is over, nothing is done for it and nothing is sent.
  * What a message asks for is decided in `gate.py` and done by the worker. This file only moves messages.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from flwr.app import ConfigRecord, Message

from locum.common.activity import Activity
from locum.common.canonical import sha256_hex
from locum.common.durable import replace_file, replace_unflushed
from locum.common.errors import LocumError, SiteFailure
from locum.site_client import gate
from locum.site_client.agent import Agent
from locum.site_client.blobs import BlobClient, Stopping
from locum.site_client.carrier import SiteCarrier
from locum.site_client.fleet import AwayError, Fleet, Incoming, RefusedError, dated, deadline, travelling
from locum.site_client.identity import SiteIdentity
from locum.site_client.journal import Entry, Journal
from locum.site_client.pulse import Pulse, Said
from locum.site_client.releases import Releases, Sent
from locum.site_client.status import WORD

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0
#: A coordinator that gives a message more time than this has made a mistake; the worker's pipe takes no longer wait.
_LONGEST_WORK = 14 * 86_400.0
_RECORD = "locum"


@dataclass
class Service:
    """One agent's day.

    Attributes:
        home: the agent's folder.
        agent: answers messages.
        connect: opens a channel to the gateway with the site's certificate.
        identity: reads the site's key and certificate; renewal replaces the certificate.
        log: the site's own log.
        pulse: tells the coordinator that the site lives and what it does, and brings news back.
        releases: the way out.
        may_leave: raises SiteFailure if what was made for a bundle's plan may not leave now.
    """

    home: Path
    agent: Agent
    connect: Callable[[], grpc.Channel]
    identity: Callable[[], SiteIdentity]
    log: logging.Logger
    pulse: Pulse
    releases: Releases
    may_leave: Callable[[bytes], None]
    stop: threading.Event = field(default_factory=threading.Event)
    instance: str = field(init=False)

    def __post_init__(self) -> None:
        self.instance = instance_of(self.home)
        self.journal = Journal(self.home / "journal")
        self.agent.told, self.agent.seconds_left = self.doing, self.seconds_left
        self._run = ""
        self._models: set[str] = set()
        self._round = 0
        self._fleet: Fleet | None = None
        self._word: dict[str, Any] = {"connected": None, "problem": ""}
        self._noting = threading.Lock()

    def run(self) -> None:
        """Works until it is stopped."""
        wait = _FIRST_WAIT
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                self._connected()
            except Stopping:
                return
            except Exception:  # the edge of the process: nobody is there at night to start an agent that ended
                self.log.exception("an unexpected error ended the connection; trying again")
                self._note(connected=False, problem="an unexpected error, which site.log tells")
            wait = _FIRST_WAIT if time.monotonic() - began > _LONGEST_WAIT else min(wait * 2, _LONGEST_WAIT)
            self.stop.wait(wait * random.uniform(0.7, 1.0))  # noqa: S311 - so that sites do not come back all at once

    def _connected(self) -> None:
        """One connection, from its beginning to its end; what ends it is told once, however often it does."""
        try:
            self._session()
        except (AwayError, RefusedError, LocumError, OSError) as error:
            if self.stop.is_set():
                return  # it was broken off from here
            problem = self._problem(error)
            if problem != self._word["problem"]:
                self.log.warning("%s; trying again for as long as it takes", problem)
            self._note(connected=False, problem=problem)

    def _problem(self, error: Exception) -> str:
        """Why there is no connection, in words; a gateway says nothing to a certificate that is over."""
        if isinstance(error, OSError):
            return f"the agent's folder cannot be used: {error}"
        if isinstance(error, LocumError):
            return str(error)
        ends = self.identity().certificate.not_valid_after_utc
        if ends.timestamp() <= self.pulse.now():
            when = f"{ends:%Y-%m-%d %H:%M} UTC"
            return f"this site's certificate ended at {when}: ask for a new invitation, then enrol with --replace"
        return f"the coordinator cannot be reached: {error}"

    def end(self) -> None:
        """Ends the work at the next possible moment; safe to call from a signal handler."""
        self.stop.set()
        threading.Thread(target=self._break_off, daemon=True).start()

    def _break_off(self) -> None:
        self.agent.worker.stop()
        if self._fleet is not None:
            self._fleet.interrupt()

    # --- one connection

    def _session(self) -> None:
        """Connects, answers what was left, then messages as they come; raises AwayError or RefusedError."""
        identity = self.identity()
        with self.connect() as channel:
            fleet = Fleet(channel, identity.key, self.instance, lambda: self.pulse.offset)
            blobs = BlobClient.over(channel, self.stop, self.log)
            self._fleet = fleet
            try:
                self.pulse.greet(channel, self.instance)
                self._activate(fleet)
                self.pulse.follow(channel, fleet, self.instance)
                self._note(connected=True, problem="")
                self.log.info("connected to %s as node %d", identity.membership.address, fleet.node.node_id)
                left = self.journal.current()
                if left is not None and self._is_wanted(fleet, left):
                    self._answer(fleet, blobs, left)
                while not self.stop.is_set() and not self.pulse.renewed():
                    self._next(fleet, blobs)
            finally:
                self.pulse.leave()
                if self.stop.is_set():
                    fleet.deactivate()
                fleet.close()

    def _activate(self, fleet: Fleet) -> None:
        """Takes the node up; one that an agent before this left active is taken down first."""
        path = self.home / "node"
        try:
            node = fleet.activate()
        except RefusedError:
            before = _number_in(path)
            if before is None:
                raise
            fleet.take_over(before)
            node = fleet.activate()
        replace_file(path, str(node).encode())

    def _is_wanted(self, fleet: Fleet, left: Entry) -> bool:
        """Whether the coordinator still waits for the reply to a message from before; if not, that is forgotten."""
        try:
            fleet.confirm(Incoming(left.message, left.message.metadata.run_id))
        except RefusedError as error:
            self.log.warning("a message from before is dropped: %s", error)
            self.journal.clear()
            return False
        return True

    def _next(self, fleet: Fleet, blobs: BlobClient) -> None:
        self.doing("idle", 0)
        incoming = fleet.pull()
        if incoming is None:
            return
        entry = self.journal.begin(incoming, fleet.run_of(incoming.run))
        fleet.confirm(incoming)
        self._answer(fleet, blobs, entry)

    # --- one message

    def seconds_left(self, message: Message) -> float:
        """How long the coordinator still waits for the reply to a message; 0 when its time is over."""
        return min(max(0.0, deadline(message) - self.pulse.now()), _LONGEST_WORK)

    def _answer(self, fleet: Fleet, blobs: BlobClient, entry: Entry) -> None:
        """Makes the reply unless it is made, sends it, and forgets the message."""
        self._run, self._round = entry.run.name, 0
        folder = self.home / "work"
        carrier = SiteCarrier(blobs, entry.run.name, folder, self._moving, lambda: self._check(entry), self._models)
        try:
            self._check_time(entry)
            self._deliver(fleet, carrier, entry, self._before(entry, carrier) or self._made(entry, carrier))
        except _LateError:
            self.log.warning("a message is dropped, for its time is over: nobody waits for its reply any more")
        except FileNotFoundError:
            self.log.warning("a finished update is gone from %s; its message is dropped", folder)
        except RefusedError as error:
            self.log.warning("the coordinator does not take a reply any more: %s", error)
        self.journal.clear()
        carrier.delivered()

    def _before(self, entry: Entry, carrier: SiteCarrier) -> Message | None:
        """The reply that was made before, unless its update has not outlived a power cut."""
        return entry.reply if entry.reply is not None and carrier.holds(_fields(entry.reply)) else None

    def _made(self, entry: Entry, carrier: SiteCarrier) -> Message:
        reply = dated(self.agent.handle(entry.message, entry.run.bundle, carrier, run=entry.run.name), entry.message)
        if self.stop.is_set():
            raise Stopping
        self.journal.finish(reply)
        return reply

    def _deliver(self, fleet: Fleet, carrier: SiteCarrier, entry: Entry, reply: Message) -> None:
        """Sends a reply; in its place a failure, if it may not leave or is not wanted.

        Raises _LateError, and FileNotFoundError if its blob is gone.
        """
        try:
            self._send(fleet, carrier, entry, reply)
        except SiteFailure as failure:
            self.log.warning("an answer does not leave: %s", failure)
            instead = dated(Message(gate.release_failure(failure), reply_to=entry.message), entry.message)
            self._send(fleet, carrier, entry, instead)

    def _send(self, fleet: Fleet, carrier: SiteCarrier, entry: Entry, reply: Message) -> None:
        """Writes down a reply that may leave, then sends its blob, and then the reply itself."""
        fields = _fields(reply)
        if reply.has_content():
            self._check(entry)

        def send() -> None:
            carrier.deliver(fields)
            self.doing("delivering", self._round)
            fleet.push(reply)

        self.releases.answer(entry.run.name, entry.message, reply, _sent(reply, fields), send)

    def _check(self, entry: Entry) -> None:
        """Raises _LateError, or SiteFailure if what was made for a message may not leave any more."""
        self._check_time(entry)
        self.may_leave(entry.run.bundle)

    def _check_time(self, entry: Entry) -> None:
        if self.seconds_left(entry.message) == 0:
            raise _LateError

    # --- what it does now

    def doing(self, activity: Activity, round_number: int) -> None:
        """Says what the agent does now."""
        self._round = round_number
        run = "" if activity == "idle" else self._run
        self.pulse.say(Said(activity, run, round_number))
        self._note(activity=activity, run=run, round=round_number)

    def _moving(self, activity: Activity, done: int, total: int) -> None:
        self.pulse.moving(activity, done, total)
        self._note(activity=activity, run=self._run, round=self._round)

    def _note(self, **changes: Any) -> None:
        """Leaves a word for `locum site status`, if there is something new to say. `at`: since when it is connected."""
        with self._noting:  # gRPC tells of an upload from a thread of its own
            before, self._word = self._word, {**self._word, **changes}
            if self._word == before:
                return
            if self._word["connected"] != before["connected"]:
                self._word["at"] = time.time()
            try:
                replace_unflushed(self.home / WORD, json.dumps({**self._word, "offset": self.pulse.offset}).encode())
            except OSError as error:
                self.log.warning("`locum site status` cannot be told: %s", error)


class _LateError(Exception):
    """The time of a message is over."""


def instance_of(home: Path) -> str:
    """A number for an agent that starts: that of its folder on this machine, and a draw.

    A folder has one agent at a time, so the next one takes over at once; an agent with a copy of it is another one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = secrets.token_hex(16)
    found = home.stat()
    return f"{sha256_hex(f'{boot} {found.st_dev} {found.st_ino}'.encode())[:16]}:{secrets.token_hex(4)}"


def _number_in(path: Path) -> int | None:
    """The number that a file holds, if it does."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _sent(reply: Message, blob: dict[str, Any]) -> Sent:
    """A reply as it travels, with the blob that it names."""
    sha256, size = travelling(reply)
    return Sent(sha256, size + int(blob.get("size", 0)), blob.get("sha256"))


def _fields(reply: Message) -> dict[str, Any]:
    """The blob that a reply names, if it does."""
    if not reply.has_content() or not isinstance(record := reply.content.get(_RECORD), ConfigRecord):
        return {}
    return {name: record[name] for name in ("sha256", "size") if name in record}
