"""The agent's pulse: tells the coordinator that the site lives and what it does, and brings the news back.

One thread for the life of the agent. Every few seconds, and at once when something changes, it makes the steps that are
due: Flower's heartbeat, the renewal of a certificate that runs out, a report, the stewards' decisions, the proposals,
the questions and the site's answers, a look at the federation's log.
Rules:
  * Nothing here holds up the work.
  * A step that fails costs itself, and is made again after a pause. A decision or answer that the coordinator refuses
    costs no other, nor does a proposal or question that cannot be used here.
  * What leaves goes through `releases.py`, which writes it down first.
  * The coordinator hears decisions and answers anew over each connection, and when its registry has changed: one that
    was restored from a backup must not go on without them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version

import grpc

from locum.common.activity import Activity
from locum.common.errors import LocumError
from locum.common.proto import locum_pb2 as pb
from locum.common.proto import locum_pb2_grpc as rpc
from locum.site_client.fleet import AwayError, Fleet, RefusedError, guarded
from locum.site_client.releases import Releases, Statement
from locum.site_client.status import CLOCK_WARNING
from locum.site_client.witness import ForkedError

_BEAT_SECONDS, _NODE_SECONDS, _RENEWAL_SECONDS = 5.0, 20.0, 3600.0
#: Approvals are looked for so often at most: their signatures are checked each time.
_DECISION_SECONDS = 2.0
#: What changes within so short a time is told together.
_TOGETHER_SECONDS = 0.1
#: A step that failed is made again after so long, if it is not made more seldom anyway.
_PAUSE_SECONDS = 10.0
#: The log is looked at so often although the coordinator says that it has not grown.
_LOOK_SECONDS = 60.0
_CALL_SECONDS = 10.0


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
        receive: takes a signed proposal in. Raises LocumError or OSError.
        decisions: the stewards' signed decisions that count, one a plan.
        asked: takes a signed cohort question in, and answers it later. Raises LocumError or OSError.
        answers: the site's signed answers to questions that are open.
        readiness: signed statements of readiness that a steward has let go.
        renew: renews the certificate over a channel if it is due at a time; returns whether it did. Raises LocumError.
        witness: looks at the federation's log over a channel; returns up to which entry the site vouches for it. Raises
            ForkedError, which it has told, and LocumError.
    """

    receive: Callable[[bytes], object]
    decisions: Callable[[], Iterable[bytes]]
    asked: Callable[[bytes], object]
    answers: Callable[[], Iterable[Statement]]
    readiness: Callable[[], Iterable[bytes]]
    renew: Callable[[grpc.Channel, datetime], bool]
    witness: Callable[[grpc.Channel], int]


@dataclass
class _Way:
    """An open connection, and how far the pulse is on it.

    Attributes:
        channel: to the gateway.
        fleet: the site's node.
        instance: the agent's, drawn when it starts.
        state: of the coordinator's registry at the last report.
        fetched: the state whose proposals are here; `heard` that whose questions are.
        told: the decisions and answers that the coordinator has heard in this state.
        sealed: how many entries of its log the coordinator has signed, as it says.
        vouched: for how many of them the site vouches.
        look: when the log is looked at in any case, by the monotonic clock.
        due: when a step is made again, by its name and the monotonic clock.
    """

    channel: grpc.Channel
    fleet: Fleet
    instance: str
    state: int = -1
    fetched: int = -1
    heard: int = -1
    told: set[bytes] = field(default_factory=set)
    sealed: int = 0
    vouched: int = -1
    look: float = 0.0
    due: dict[str, float] = field(default_factory=dict)

    @property
    def registry(self) -> rpc.RegistryStub:
        return rpc.RegistryStub(self.channel)


@dataclass
class Pulse:
    """The thread, and what the agent tells it.

    Attributes:
        news: what is done with what is heard.
        releases: the way out.
        log: the site's own log.
        offset: seconds by which the coordinator's clock is ahead of this one.
    """

    news: News
    releases: Releases
    log: logging.Logger
    offset: float = 0.0
    _said: Said = Said()
    _changed: threading.Event = field(default_factory=threading.Event)
    _way: _Way | None = None
    _renewed: threading.Event = field(default_factory=threading.Event)
    _warned: bool = False

    def start(self) -> None:
        """Starts the thread; it ends with the process."""
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def now(self) -> float:
        """Seconds since 1970 by the coordinator's clock, as far as it is known."""
        return time.time() + self.offset

    # --- what the agent tells

    def greet(self, channel: grpc.Channel, instance: str) -> None:
        """The first report over a new connection: the coordinator's clock is known after it.

        Raises AwayError or RefusedError.
        """
        self._told(rpc.RegistryStub(channel), instance)

    def follow(self, channel: grpc.Channel, fleet: Fleet, instance: str) -> None:
        """The node is up: reports go over this connection from now on."""
        self._renewed.clear()
        self._way = _Way(channel, fleet, instance)
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
        steps = (
            (self._heartbeat, _NODE_SECONDS),
            (self._renew, _RENEWAL_SECONDS),
            (self._report, 0.0),
            (self._decide, _DECISION_SECONDS),
            (self._fetch, 0.0),
            (self._hear, 0.0),
            (self._answer, _DECISION_SECONDS),
            (self._ready, _DECISION_SECONDS),
            (self._witness, 0.0),
        )
        while True:
            if self._changed.wait(_BEAT_SECONDS):
                time.sleep(_TOGETHER_SECONDS)
            self._changed.clear()
            way = self._way
            if way is None:
                time.sleep(0.05)
                continue
            for step, seconds in steps:
                name, now = step.__name__, time.monotonic()
                if now >= way.due.get(name, 0.0):
                    way.due[name] = now + (seconds if self._done(step, way) else max(seconds, _PAUSE_SECONDS))

    def _done(self, step: Callable[[_Way], None], way: _Way) -> bool:
        """Makes a step; returns whether it went well."""
        try:
            step(way)
        except AwayError as error:
            self.log.debug("the coordinator was not reached: %s", error)
        except (RefusedError, LocumError, OSError) as error:
            self.log.warning("%s", error)
        except Exception:  # the edge of the thread: the site's node lives by the steps after this one
            self.log.exception("a step of the pulse failed; it is made again")
        else:
            return True
        return False

    def _heartbeat(self, way: _Way) -> None:
        way.fleet.heartbeat()

    def _renew(self, way: _Way) -> None:
        if self.news.renew(way.channel, datetime.fromtimestamp(self.now(), UTC)):
            self._renewed.set()

    def _report(self, way: _Way) -> None:
        state, way.sealed = self._told(way.registry, way.instance)
        if state != way.state:
            way.state = state
            way.told.clear()

    def _decide(self, way: _Way) -> None:
        for envelope in self.news.decisions():
            if envelope not in way.told:
                self._tell(way.registry, envelope)
                way.told.add(envelope)

    def _tell(self, stub: rpc.RegistryStub, envelope: bytes) -> None:
        """Hands a decision over; raises AwayError. One that is refused is told here, and offered again later."""
        try:
            request = pb.ApproveRequest(envelope=envelope)
            self.releases.decision(envelope, lambda: guarded(lambda: stub.Approve(request, timeout=_CALL_SECONDS)))
        except RefusedError as error:
            self.log.warning("the coordinator does not take a steward's decision: %s", error)

    def _fetch(self, way: _Way) -> None:
        """Takes the proposals in, if there can be new ones; those that cannot be used here are told together."""
        state = way.state
        if state == way.fetched:
            return
        reply = guarded(lambda: way.registry.Proposals(pb.ProposalsRequest(), timeout=_CALL_SECONDS))
        self._take_in(reply.envelopes, self.news.receive, "proposals")
        way.fetched = state

    def _hear(self, way: _Way) -> None:
        """Takes the questions in, if there can be new ones."""
        state = way.state
        if state == way.heard:
            return
        reply = guarded(lambda: way.registry.Questions(pb.QuestionsRequest(), timeout=_CALL_SECONDS))
        self._take_in(reply.envelopes, self.news.asked, "questions")
        way.heard = state

    def _take_in(self, envelopes: Iterable[bytes], receive: Callable[[bytes], object], what: str) -> None:
        """Those that cannot be used are told together. Raises OSError."""
        problems = [problem for envelope in envelopes if (problem := _problem(receive, envelope))]
        if problems:
            self.log.warning("%d %s cannot be used; the first of them: %s", len(problems), what, problems[0])

    def _answer(self, way: _Way) -> None:
        for said in self.news.answers():
            if said.envelope not in way.told:
                self._state(way.registry, said)
                way.told.add(said.envelope)

    def _state(self, stub: rpc.RegistryStub, said: Statement) -> None:
        """Hands an answer over; raises AwayError. One that is refused is told here, and offered again later."""
        try:
            request = pb.StateRequest(envelope=said.envelope)
            self.releases.statement(said, lambda: guarded(lambda: stub.State(request, timeout=_CALL_SECONDS)))
        except RefusedError as error:
            self.log.warning("the coordinator does not take an answer to a cohort question: %s", error)

    def _ready(self, way: _Way) -> None:
        for envelope in self.news.readiness():
            if envelope not in way.told:
                self._let_go(way.registry, envelope)
                way.told.add(envelope)

    def _let_go(self, stub: rpc.RegistryStub, envelope: bytes) -> None:
        """Hands a statement of readiness over; raises AwayError. One that is refused is told here."""
        try:
            request = pb.StateRequest(envelope=envelope)
            self.releases.readiness(envelope, lambda: guarded(lambda: stub.State(request, timeout=_CALL_SECONDS)))
        except RefusedError as error:
            self.log.warning("the coordinator does not take a statement of readiness: %s", error)

    def _witness(self, way: _Way) -> None:
        """Looks at the log when it has grown, and once a minute: a coordinator that says nothing of it is asked too."""
        if way.sealed == way.vouched and time.monotonic() < way.look:
            return
        way.look = time.monotonic() + _LOOK_SECONDS
        try:
            way.vouched = self.news.witness(way.channel)
        except ForkedError:  # told where it was found
            way.vouched = way.sealed
        except RefusedError:
            way.vouched = way.sealed
            raise

    def _told(self, stub: rpc.RegistryStub, instance: str) -> tuple[int, int]:
        """Says what the agent does; learns the coordinator's clock, the state of its registry, the size of its log."""
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
        reply = self.releases.report(
            said.activity,
            said.run,
            said.round,
            request.SerializeToString(),
            lambda: guarded(lambda: stub.Report(request, timeout=_CALL_SECONDS)),
        )
        self.offset = reply.clock - (before + time.time()) / 2
        if abs(self.offset) > CLOCK_WARNING and not self._warned:
            self._warned = True
            self.log.warning("this machine's clock is %.0f s off the coordinator's; set it", -self.offset)
        return int(reply.registry_state), int(reply.log_size)


def _problem(receive: Callable[[bytes], object], envelope: bytes) -> str:
    """Takes something in; why it cannot be used, empty if it can. Raises OSError."""
    try:
        receive(envelope)
    except LocumError as error:
        return str(error)
    return ""
