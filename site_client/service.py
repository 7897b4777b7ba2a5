"""The agent's process: connects out, takes one message at a time, answers it, for ever.

Rules:
  * It never ends because the coordinator is away: it tries again, from half a second up to a quarter of a minute.
  * A message is written down before it is confirmed, its reply before it is sent. After a cut or a crash a finished
    reply is delivered, and work that was not finished is done again; nothing is trained twice for one reply.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from flwr.app import ConfigRecord, Message

from locum.common.activity import Activity
from locum.common.canonical import sha256_hex
from locum.common.durable import replace_file
from locum.common.errors import SiteFailure
from locum.site_client import gate
from locum.site_client.agent import Agent
from locum.site_client.blobs import BlobClient, Stopping
from locum.site_client.carrier import SiteCarrier
from locum.site_client.fleet import AwayError, Fleet, Incoming, RefusedError, dated
from locum.site_client.identity import SiteIdentity
from locum.site_client.journal import Entry, Journal
from locum.site_client.pulse import Pulse, Said

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0
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
    """

    home: Path
    agent: Agent
    connect: Callable[[], grpc.Channel]
    identity: Callable[[], SiteIdentity]
    log: logging.Logger
    pulse: Pulse
    stop: threading.Event = field(default_factory=threading.Event)
    instance: str = field(init=False)

    def __post_init__(self) -> None:
        self.instance = instance_of(self.home)
        self.journal = Journal(self.home / "journal")
        self.agent.told = self.doing
        self._run = ""
        self._round = 0
        self._fleet: Fleet | None = None

    def run(self) -> None:
        """Works until it is stopped."""
        wait, told = _FIRST_WAIT, ""
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                self._session()
            except (AwayError, RefusedError) as error:
                problem = self._problem(error)
                if problem != told:
                    self.log.warning("%s; trying again for as long as it takes", problem)
                self._note(connected=False, problem=problem)
                told = problem
            except OSError as error:
                self.log.error("the agent's folder cannot be used: %s; trying again", error)  # noqa: TRY400
            except Stopping:
                return
            wait = _FIRST_WAIT if time.monotonic() - began > _LONGEST_WAIT else min(wait * 2, _LONGEST_WAIT)
            self.stop.wait(wait * random.uniform(0.7, 1.0))  # noqa: S311 - so that sites do not come back all at once

    def _problem(self, error: Exception) -> str:
        """Why there is no connection, in words; a gateway says nothing to a certificate that is over."""
        ends = self.identity().certificate.not_valid_after_utc
        if ends <= datetime.now(UTC):
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
                self._note(connected=True)
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
        number = self.home / "node"
        try:
            node = fleet.activate()
        except RefusedError:
            if not number.exists():
                raise
            fleet.take_over(int(number.read_text()))
            node = fleet.activate()
        number.write_text(str(node))

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

    def _answer(self, fleet: Fleet, blobs: BlobClient, entry: Entry) -> None:
        """Makes the reply unless it is made, sends it, and forgets the message."""
        self._run = entry.run.name
        carrier = SiteCarrier(blobs, entry.run.name, self.home / "work", self.pulse.moving)
        reply = entry.reply or self._made(entry, carrier)
        self._deliver(fleet, carrier, entry, reply)
        self.journal.clear()
        carrier.delivered()

    def _made(self, entry: Entry, carrier: SiteCarrier) -> Message:
        reply = dated(self.agent.handle(entry.message, entry.run.bundle, carrier), entry.message)
        if self.stop.is_set():
            raise Stopping
        self.journal.finish(reply)
        return reply

    def _deliver(self, fleet: Fleet, carrier: SiteCarrier, entry: Entry, reply: Message) -> None:
        """Sends a reply's blob, then the reply. One that nobody wants any more is dropped, with a word in the log."""
        try:
            carrier.deliver(_fields(reply))
            self.doing("delivering", self._round)
            fleet.push(reply)
        except FileNotFoundError:
            self.log.warning("a finished update is gone from %s; its message is dropped", carrier.folder)
        except SiteFailure as failure:
            self.log.warning("the coordinator does not take an update: %s", failure)
            fleet.push(dated(Message(gate.release_failure(failure), reply_to=entry.message), entry.message))
        except RefusedError as error:
            self.log.warning("the coordinator does not take a reply any more: %s", error)

    # --- what it does now

    def doing(self, activity: Activity, round_number: int) -> None:
        """Says what the agent does now."""
        self._round = round_number
        run = "" if activity == "idle" else self._run
        self.pulse.say(Said(activity, run, round_number))

    def _note(self, *, connected: bool, problem: str = "") -> None:
        """Leaves a word for `locum site status`."""
        word: dict[str, Any] = {"connected": connected, "problem": problem, "at": time.time()}
        replace_file(self.home / "agent.json", json.dumps(word).encode())


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


def _fields(reply: Message) -> dict[str, Any]:
    """The blob that a reply names, if it does."""
    if not reply.has_content() or not isinstance(record := reply.content.get(_RECORD), ConfigRecord):
        return {}
    return {name: record[name] for name in ("sha256", "size") if name in record}
