"""The agent's pulse: the node lives and the certificate is renewed, whatever else goes wrong."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from locum.common.canonical import sha256_hex
from locum.common.errors import RunError
from locum.common.identity import new_key
from locum.common.proto import locum_pb2 as pb
from locum.site_client import pulse as module
from locum.site_client.fleet import Fleet
from locum.site_client.pulse import News, Pulse
from locum.site_client.releases import Statement, begin_releases
from locum.site_client.witness import ForkedError
from tests.site_client.coordinator import Coordinator, open_coordinator, until

_LOG = logging.getLogger("tests.pulse")


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    """A coordinator, and a pulse that beats fast."""
    for name, seconds in (("_BEAT", 0.02), ("_NODE", 0.05), ("_RENEWAL", 0.05), ("_PAUSE", 0.05)):
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)
    with open_coordinator() as opened:
        yield opened


class _Site:
    """What a pulse is given: each step can be told to fail."""

    def __init__(self) -> None:
        self.words: list[bytes] = []
        self.received: list[bytes] = []
        self.questions: list[bytes] = []
        self.answers: list[Statement] = []
        self.readiness: list[bytes] = []
        self.renewals: list[datetime] = []
        self.fails: dict[str, Exception] = {}
        self.looks = 0
        self.vouched = 0

    def news(self) -> News:
        return News(
            receive=self._receive,
            decisions=self._decisions,
            asked=self._asked,
            answers=self._answers,
            readiness=lambda: tuple(self.readiness),
            renew=self._renew,
            witness=self._witness,
        )

    def _asked(self, envelope: bytes) -> None:
        if envelope == b"bad":
            raise RunError("a question does not count", "nothing")
        self._may_fail("asked")
        self.questions.append(envelope)

    def _answers(self) -> Iterable[Statement]:
        self._may_fail("answers")
        return tuple(self.answers)

    def _receive(self, envelope: bytes) -> None:
        if envelope == b"bad":
            raise RunError("it is not signed", "nothing")
        self._may_fail("receive")
        self.received.append(envelope)

    def _decisions(self) -> Iterable[bytes]:
        self._may_fail("decisions")
        return tuple(self.words)

    def _renew(self, _: grpc.Channel, now: datetime) -> bool:
        self.renewals.append(now)
        self._may_fail("renew")
        return False

    def _witness(self, _: grpc.Channel) -> int:
        self.looks += 1
        self._may_fail("witness")
        return self.vouched

    def _may_fail(self, step: str) -> None:
        if step in self.fails:
            raise self.fails[step]


Start = Callable[[_Site], Pulse]


@pytest.fixture
def start(coordinator: Coordinator, tmp_path: Path) -> Iterator[Start]:
    """Starts pulses over connections of their own."""
    opened: list[tuple[Pulse, Fleet, grpc.Channel]] = []

    def begin(site: _Site) -> Pulse:
        releases = begin_releases(tmp_path / f"log-{len(opened)}", "test", "north")
        pulse, channel = Pulse(site.news(), releases, _LOG), coordinator.channel()
        fleet = Fleet(channel, new_key(), "here", lambda: pulse.offset)
        fleet.activate()
        pulse.start()
        pulse.follow(channel, fleet, "here")
        opened.append((pulse, fleet, channel))
        return pulse

    yield begin
    for pulse, fleet, channel in opened:
        pulse.leave()
        fleet.close()
        channel.close()


def _beats_on(coordinator: Coordinator, site: _Site) -> None:
    """Heartbeats and renewals go on from here."""
    heard, renewed = len(coordinator.named("send-node-heartbeat")), len(site.renewals)
    until(lambda: len(coordinator.named("send-node-heartbeat")) > heard + 2 and len(site.renewals) > renewed + 2)


_FAILURES: dict[str, Exception] = {
    "receive": OSError(errno.ENOSPC, "No space left on device"),
    "decisions": OSError(errno.EIO, "Input/output error"),
    "asked": OSError(errno.ENOSPC, "No space left on device"),
    "answers": RunError("the memory of cohort questions cannot be used", "restore it"),
    "renew": RuntimeError("nobody foresaw this"),
    "witness": RunError("what the site has seen of the log cannot be read", "restore it"),
}


@pytest.mark.parametrize("step", _FAILURES)
def test_a_step_that_fails_for_ever_costs_neither_the_heartbeat_nor_the_renewal(
    step: str, coordinator: Coordinator, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    site = _Site()
    site.fails[step] = _FAILURES[step]
    coordinator.envelopes, coordinator.questions = [b"proposal"], [b"question"]
    start(site)
    until(lambda: str(_FAILURES[step]) in caplog.text)
    _beats_on(coordinator, site)
    site.fails.clear()
    site.words = [b"approved"]
    until(lambda: site.received == [b"proposal"] and coordinator.named("decision") == [b"approved"])


def test_a_decision_that_is_refused_is_told_and_holds_up_no_other(
    coordinator: Coordinator, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.refuses = lambda envelope: "no plan of this digest was proposed" if envelope == b"first" else ""
    site = _Site()
    site.words = [b"first", b"second"]
    start(site)
    until(lambda: b"second" in coordinator.named("decision"))
    _beats_on(coordinator, site)
    assert coordinator.named("decision") == [b"first", b"second"]
    (told,) = [record for record in caplog.records if "no plan of this digest" in record.getMessage()]
    assert told.levelname == "WARNING"


def test_a_proposal_that_cannot_be_used_costs_itself_and_is_told_once(
    coordinator: Coordinator, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.envelopes = [b"bad", b"good", b"bad"]
    site = _Site()
    start(site)
    until(lambda: site.received == [b"good"])
    _beats_on(coordinator, site)
    assert caplog.text.count("2 proposals cannot be used; the first of them: it is not signed") == 1


def test_a_question_that_cannot_be_used_costs_itself_and_answers_are_told_anew_when_the_registry_has_changed(
    coordinator: Coordinator, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.questions = [b"bad", b"good"]
    site = _Site()
    site.answers = [Statement(b"answer", "ab" * 32, b"{}")]
    start(site)
    until(lambda: site.questions == [b"good"] and coordinator.named("answer") == [b"answer"])
    _beats_on(coordinator, site)
    assert coordinator.named("answer") == [b"answer"]
    assert caplog.text.count("1 questions cannot be used; the first of them: a question does not count") == 1
    coordinator.state = 2
    until(lambda: coordinator.named("answer") == [b"answer", b"answer"])


def test_an_answer_that_is_refused_is_told_and_holds_up_no_other(
    coordinator: Coordinator, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.refuses = lambda envelope: "it is closed" if envelope == b"one" else ""
    site = _Site()
    site.answers = [Statement(b"one", "ab" * 32, b"{}"), Statement(b"two", "cd" * 32, b"{}")]
    start(site)
    until(lambda: coordinator.named("answer") == [b"one", b"two"])
    assert "the coordinator does not take an answer to a cohort question" in caplog.text


def test_readiness_that_a_steward_let_go_is_told_once_and_written_down_first(
    coordinator: Coordinator, start: Start
) -> None:
    site = _Site()
    site.readiness = [b"ready"]
    pulse = start(site)
    until(lambda: coordinator.named("answer") == [b"ready"])
    _beats_on(coordinator, site)
    assert coordinator.named("answer") == [b"ready"]
    left = [json.loads(entry) for entry in pulse.releases.log.entries()]
    assert [(entry["purpose"], entry["sha256"]) for entry in left if entry.get("purpose") == "readiness"] == [
        ("readiness", sha256_hex(b"ready"))
    ]


def test_decisions_are_told_anew_over_each_connection_and_when_the_registry_has_changed(
    coordinator: Coordinator, start: Start
) -> None:
    site = _Site()
    site.words = [b"approved"]
    pulse = start(site)
    until(lambda: len(coordinator.named("decision")) == 1)
    _beats_on(coordinator, site)
    assert len(coordinator.named("decision")) == 1
    coordinator.state = 2  # as after a restart from a backup, when the plan is proposed again
    until(lambda: len(coordinator.named("decision")) == 2)
    assert pulse._way is not None
    pulse.follow(pulse._way.channel, pulse._way.fleet, "here")
    until(lambda: len(coordinator.named("decision")) == 3)


def test_the_log_is_looked_at_when_it_has_grown(coordinator: Coordinator, start: Start) -> None:
    site = _Site()
    site.vouched = coordinator.log_size = 3
    start(site)
    until(lambda: site.looks == 1)
    _beats_on(coordinator, site)
    assert site.looks == 1
    site.vouched = coordinator.log_size = 4
    until(lambda: site.looks == 2)
    _beats_on(coordinator, site)
    assert site.looks == 2


def test_a_log_that_is_never_said_to_grow_is_looked_at_all_the_same(
    coordinator: Coordinator, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    site = _Site()
    start(site)
    until(lambda: site.looks > 3)


def test_a_log_that_forked_costs_no_other_step_and_is_looked_at_again(
    coordinator: Coordinator, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    site = _Site()
    site.fails["witness"] = ForkedError("the log has forked", "ask")
    start(site)
    _beats_on(coordinator, site)
    until(lambda: site.looks > 3)


def test_a_certificate_is_renewed_by_the_coordinators_clock(coordinator: Coordinator, start: Start) -> None:
    coordinator.ahead = 90 * 86_400.0
    site = _Site()
    start(site)
    until(lambda: any((now - datetime.now(UTC)).days >= 89 for now in site.renewals))


def test_a_clock_that_is_off_is_told_once(
    coordinator: Coordinator, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator.ahead = 300.0
    site = _Site()
    pulse = start(site)
    until(lambda: len(coordinator.named("report")) > 5)
    assert pulse.offset == pytest.approx(300, abs=5)
    assert caplog.text.count("this machine's clock is -300 s off the coordinator's") == 1


def test_an_answer_that_is_no_message_costs_a_heartbeat(coordinator: Coordinator, start: Start) -> None:
    coordinator.answers["send-node-heartbeat"] = lambda _: pb.FleetAnswer(status=200, body=b"\xff\xff")
    site = _Site()
    start(site)
    _beats_on(coordinator, site)
