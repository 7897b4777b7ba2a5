"""The agent's pulse: tells the coordinator that the site lives and what it does, and brings the news back.

One thread for the life of the agent. Every few seconds, and at once when something changes: a report. With the reports
come the coordinator's clock and whether there are new proposals; what stewards decided goes out, and a certificate that
runs out is renewed under its own key. Nothing here holds up the work: a call that fails is made again at the next beat.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import grpc

from locum.common.activity import Activity
from locum.common.errors import LocumError
from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc
from locum.site_client.fleet import AwayError, Fleet, RefusedError

_BEAT_SECONDS, _NODE_SECONDS, _RENEWAL_SECONDS = 5.0, 20.0, 3600.0
_CALL_SECONDS = 10.0
_CLOCK_WARNING = 60.0


@dataclass(frozen=True)
class Said:
    """What the agent does: activity, the run's name and round, and how far it is (bytes)."""

    activity: Activity = "idle"
    run: str = ""
    round: int = 0
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class News:
    """What the pulse does with what it hears.

    Attributes:
        receive: takes a signed proposal in. Raises LocumError.
        unsent: the stewards' signed decisions that the coordinator has not got.
        sent: notes that one has arrived.
        renew: renews the certificate over a channel if it is time; returns whether it did. Raises LocumError.
    """

    receive: Callable[[bytes], object]
    unsent: Callable[[], Iterable[bytes]]
    sent: Callable[[bytes], None]
    renew: Callable[[grpc.Channel], bool]


@dataclass
class Pulse:
    """The thread, and what the agent tells it.

    Attributes:
        news: what is done with what is heard.
        log: the site's own log.
        offset: seconds by which the coordinator's clock is ahead of this one.
    """

    news: News
    log: logging.Logger
    offset: float = 0.0
    _said: Said = Said()
    _changed: threading.Event = field(default_factory=threading.Event)
    _way: tuple[grpc.Channel, Fleet, str] | None = None
    _renewed: threading.Event = field(default_factory=threading.Event)
    _state: int = -1
    _next_node: float = 0.0
    _next_renewal: float = 0.0
    _warned: bool = False

    def start(self) -> None:
        """Starts the thread; it ends with the process."""
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    # --- what the agent tells

    def greet(self, channel: grpc.Channel, instance: str) -> None:
        """The first report over a new connection: the coordinator's clock is known after it. Raises AwayError."""
        try:
            self._report(rpc.RegistryStub(channel), instance)
        except grpc.RpcError as error:
            raise AwayError(error.details() or error.code().name) from error

    def follow(self, channel: grpc.Channel, fleet: Fleet, instance: str) -> None:
        """The node is up: reports go over this connection from now on."""
        self._renewed.clear()
        self._state, self._next_node = -1, 0.0
        self._way = (channel, fleet, instance)
        self._changed.set()

    def leave(self) -> None:
        """The connection is gone."""
        self._way = None

    def say(self, said: Said) -> None:
        """The agent does something else now."""
        if said != self._said:
            self._said = said
            self._changed.set()

    def moving(self, activity: Activity, done: int, total: int) -> None:
        """A blob is on its way; told with the next beat."""
        before, self._said = self._said, replace(self._said, activity=activity, done=done, total=total)
        if before.activity != activity:
            self._changed.set()

    def renewed(self) -> bool:
        """Whether the certificate was renewed since the connection was made."""
        return self._renewed.is_set()

    # --- the thread

    def _beat(self) -> None:
        while True:
            self._changed.wait(_BEAT_SECONDS)
            self._changed.clear()
            way = self._way
            if way is None:
                time.sleep(0.05)
                continue
            try:
                self._one(*way)
            except grpc.RpcError as error:
                self.log.debug("a report did not arrive: %s", error.details())
            except (AwayError, RefusedError, LocumError, OSError, ValueError) as error:
                self.log.warning("%s", error)

    def _one(self, channel: grpc.Channel, fleet: Fleet, instance: str) -> None:
        stub, now = rpc.RegistryStub(channel), time.monotonic()
        state = self._report(stub, instance)
        for envelope in self.news.unsent():
            stub.Approve(pb.ApproveRequest(envelope=envelope), timeout=_CALL_SECONDS)
            self.news.sent(envelope)
        if state != self._state:
            for envelope in stub.Proposals(pb.ProposalsRequest(), timeout=_CALL_SECONDS).envelopes:
                self._receive(envelope)
            self._state = state
        if now >= self._next_node:
            self._next_node = now + _NODE_SECONDS
            fleet.heartbeat()
        if now >= self._next_renewal:
            self._next_renewal = now + _RENEWAL_SECONDS
            if self.news.renew(channel):
                self._renewed.set()

    def _receive(self, envelope: bytes) -> None:
        """Takes a proposal in; one that cannot be read here costs itself and none of the others."""
        try:
            self.news.receive(envelope)
        except LocumError as error:
            self.log.warning("a proposal cannot be used: %s", error)

    def _report(self, stub: rpc.RegistryStub, instance: str) -> int:
        """Says what the agent does; learns the coordinator's clock and the state of its registry."""
        said, before = self._said, time.time()
        request = pb.ReportRequest(
            instance=instance,
            activity=said.activity,
            run=said.run,
            round=said.round,
            done=said.done,
            total=said.total,
            version=version("locum"),
            clock=before,
        )
        reply = stub.Report(request, timeout=_CALL_SECONDS)
        self.offset = reply.clock - (before + time.time()) / 2
        if abs(self.offset) > _CLOCK_WARNING and not self._warned:
            self._warned = True
            self.log.warning("this machine's clock is %.0f s off the coordinator's; set it", -self.offset)
        return int(reply.registry_state)
