"""An agent's day with a coordinator that does it harm, or that goes away: it answers what it may, and never ends."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import grpc
import pytest
from flwr.app import ConfigRecord, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse

from locum.common.activity import Activity
from locum.common.errors import Code
from locum.common.fab import build_bundle
from locum.common.log.entries import RefusalEntry, ReleaseEntry, read_entry
from locum.common.log.store import Log
from locum.common.messages import INLINE, LOCAL, TRAIN, Carrier, TrainResult, pack
from locum.common.proto import locum_pb2 as pb
from locum.site_client import pulse
from locum.site_client import service as module
from locum.site_client.configuration import read_configuration
from locum.site_client.fleet import Incoming, RunOf, dated
from locum.site_client.releases import open_releases
from locum.site_client.service import Service
from locum.site_client.start import open_log, open_service
from locum.site_client.status import Doing, doing
from tests.plans import initial, plan
from tests.site_client.asking import message as asked
from tests.site_client.asking import training
from tests.site_client.coordinator import Coordinator, open_coordinator, until
from tests.site_client.enrolled import Hospital

OF = plan()
ORIGIN = "locum.Test%20federation/sites/north"


class _Answerer:
    """Stands where an agent stands: answers training at once, and says how often it was asked."""

    def __init__(self) -> None:
        self.worker, self.trained = self, 0
        self.told: Callable[[Activity, int], None] = lambda *_: None
        self.before: Callable[[], None] = lambda: None

    def stop(self) -> None:
        """There is no worker."""

    def handle(self, message: Message, bundle: bytes, carrier: Carrier = INLINE, *, run: str = LOCAL) -> Message:
        assert run == "run-1"
        self.told("training", 1)
        self.trained += 1
        self.before()
        return _reply(message)


def _reply(message: Message) -> Message:
    result = TrainResult(plan_digest=OF.digest, round=1, weight=1, steps=1, loss=None, seconds=0)
    return Message(pack(result, initial(OF)), reply_to=message)


def _message(ttl: float = 600.0) -> Message:
    made = asked(training(OF, initial(OF)), TRAIN)
    made.metadata.ttl = ttl
    return made


@dataclass
class Site:
    """An agent with a coordinator of its own, not yet started."""

    hospital: Hospital
    coordinator: Coordinator
    service: Service
    answerer: _Answerer
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self.service.run)
        self.thread.start()

    def works(self) -> Message:
        """The agent is alive: it answers a training message. Returns the reply."""
        replies = len(self.coordinator.replies)
        self.coordinator.give(_message(), OF)
        until(lambda: len(self.coordinator.replies) > replies)
        return self.coordinator.replies[-1]

    def finished(self, *, ttl: float = 600.0) -> None:
        """An update that was made before the agent was killed, in its journal."""
        message = _message(ttl)
        message.metadata.__dict__["_message_id"] = message.object_id
        self.service.journal.begin(Incoming(message, 1), RunOf("run-1", build_bundle(OF)))
        self.service.journal.finish(dated(_reply(message), message))

    @property
    def log(self) -> str:
        return (self.hospital.home / "site.log").read_text()


@pytest.fixture
def site(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site whose stewards have approved the plan `OF`."""
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.1)
    (hospital.home / "store").mkdir()
    (hospital.home / "site.yaml").write_text("stores: [store]\n")
    hospital.approvals().receive(hospital.proposal(OF))
    hospital.approvals().approve(OF.digest, "Anna")
    configuration = read_configuration(hospital.home / "site.yaml")
    service = open_service(hospital.home, configuration, open_log(hospital.home, "north", configuration))
    answerer = _Answerer()
    with open_coordinator() as coordinator:
        service.agent, service.connect = answerer, coordinator.channel  # type: ignore[assignment]
        answerer.told = service.doing
        made = Site(hospital, coordinator, service, answerer)
        yield made
        made.service.end()
        if made.thread is not None:
            made.thread.join(30)
            assert not made.thread.is_alive()


# --- it never ends


def _answer(body: bytes) -> Callable[[bytes], pb.FleetAnswer]:
    return lambda _: pb.FleetAnswer(status=200, body=body)


def _pull(trees: list[ObjectTree]) -> bytes:
    made = _message()
    made.metadata.__dict__["_message_id"] = made.object_id
    answer = PullMessagesResponse(messages_list=[message_to_proto(remove_content_from_message(made))])
    answer.message_object_trees.extend(trees)
    return answer.SerializeToString()


_WIDE = ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id=f"{n:064x}") for n in range(1000)])


@pytest.mark.parametrize(
    ("call", "answer", "told"),
    [
        ("pull-messages", b"\xff\xff", "an answer cannot be read"),
        ("activate-node", b"\xff\xff", "an answer cannot be read"),
        ("pull-messages", _pull([]), "a message came without its parts"),
        ("pull-messages", _pull([_WIDE]), "a message has more than 8 parts"),
        ("pull-messages", _pull([ObjectTree(object_id="a" * 64)]), "unexpected error"),
    ],
    ids=["noise", "no node", "no parts", "many parts", "a part that is none"],
)
def test_an_answer_that_makes_no_sense_ends_the_connection_and_not_the_agent(
    call: str, answer: bytes, told: str, site: Site
) -> None:
    site.coordinator.answers[call] = _answer(answer)
    site.start()
    until(lambda: told in site.log)
    site.coordinator.answers.clear()
    site.works()


def test_a_part_of_a_message_that_is_too_large_is_not_taken(site: Site) -> None:
    large = PullObjectResponse(object_found=True, object_available=True, object_content=bytes(2 << 20))
    site.coordinator.answers["pull-object"] = _answer(large.SerializeToString())
    site.coordinator.give(_message(), OF)
    site.start()
    until(lambda: "which is more than any of ours" in site.log)
    site.coordinator.answers.clear()
    site.works()


def test_a_folder_that_cannot_be_written_and_a_coordinator_that_is_away_are_both_survived(site: Site) -> None:
    (site.hospital.home / "agent.json").mkdir()
    there = site.service.connect
    site.service.connect = lambda: grpc.insecure_channel("127.0.0.1:1")
    site.start()
    until(lambda: "the coordinator cannot be reached" in site.log and "cannot be told" in site.log)
    site.service.connect = there
    site.works()


def test_an_identity_that_is_away_for_a_while_is_survived_and_told(site: Site) -> None:
    folder = site.hospital.home / "identity"
    folder.rename(folder.with_name("elsewhere"))
    site.start()
    until(lambda: "holds no enrolled site" in site.log)
    folder.with_name("elsewhere").rename(folder)
    site.works()


def test_a_node_file_that_was_cut_off_is_no_number(site: Site) -> None:
    (site.hospital.home / "node").write_text("")
    refusals = iter([pb.FleetAnswer(status=400, body=b"")])
    proper = site.coordinator._activate_node(b"").SerializeToString()
    site.coordinator.answers["activate-node"] = lambda _: next(refusals, pb.FleetAnswer(status=200, body=proper))
    site.start()
    site.works()
    assert (site.hospital.home / "node").read_text() == "7"


def test_proxies_for_other_programs_do_not_keep_an_agent_from_its_work(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy.hospital.example:1080")
    monkeypatch.setenv("NO_PROXY", "[::1,*.hospital.example")
    site.start()
    site.works()


# --- what is finished


def test_an_update_that_was_finished_is_delivered_after_a_restart(site: Site) -> None:
    site.finished()
    site.start()
    until(lambda: site.coordinator.replies)
    assert site.coordinator.replies[0].has_content()
    assert site.answerer.trained == 0


def test_an_update_that_did_not_outlive_a_power_cut_is_made_again(site: Site) -> None:
    message = _message()
    message.metadata.__dict__["_message_id"] = message.object_id
    gone = _reply(message)
    record = gone.content["locum"]
    assert isinstance(record, ConfigRecord)
    gone.content["locum"] = ConfigRecord({"json": record["json"], "sha256": "0" * 64, "size": 7})
    site.service.journal.begin(Incoming(message, 1), RunOf("run-1", build_bundle(OF)))
    site.service.journal.finish(dated(gone, message))
    site.start()
    until(lambda: site.coordinator.replies)
    assert site.answerer.trained == 1
    assert not site.coordinator.replies[0].has_error()


def test_an_update_that_was_finished_stays_when_the_approval_is_gone(site: Site) -> None:
    site.finished()
    site.hospital.approvals().revoke(OF.digest, "Anna")
    site.start()
    (reply,) = until(lambda: site.coordinator.replies)
    assert (reply.has_content(), reply.error.code) == (False, Code.NOT_APPROVED)
    until(lambda: site.service.journal.current() is None)


def test_an_approval_that_is_taken_back_during_the_training_keeps_its_update_here(site: Site) -> None:
    site.answerer.before = lambda: site.hospital.approvals().revoke(OF.digest, "Anna")
    site.start()
    reply = site.works()
    assert (reply.has_content(), reply.error.code) == (False, Code.NOT_APPROVED)


def test_a_policy_that_was_tightened_keeps_a_finished_update_here_and_the_hours_do_not(site: Site) -> None:
    closed = f"{time.strftime('%a', time.localtime(time.time() + 2 * 86_400))} 00:00-01:00"
    for policy, kept in ((f"hours: ['{closed}']", False), ("most_rounds: 1", True)):
        (site.hospital.home / "site.yaml").write_text(f"stores: [store]\npolicy: {{{policy}}}\n")
        configuration = read_configuration(site.hospital.home / "site.yaml")
        tightened = open_service(site.hospital.home, configuration, site.service.log)
        site.service.may_leave = tightened.may_leave
        site.finished()
        thread = threading.Thread(target=site.service.run)
        thread.start()
        before = len(site.coordinator.replies)
        until(lambda before=before: len(site.coordinator.replies) > before)
        assert site.coordinator.replies[-1].has_error() is kept
        site.service.stop.set()
        thread.join(30)
        site.service.stop.clear()


def test_a_failure_that_nobody_wants_costs_no_connection(site: Site) -> None:
    site.finished()
    site.hospital.approvals().revoke(OF.digest, "Anna")
    site.coordinator.answers["push-messages"] = lambda _: pb.FleetAnswer(status=400, body=b"")
    site.start()
    until(lambda: "does not take a reply any more" in site.log)
    site.coordinator.answers.clear()
    site.answerer.before = lambda: site.hospital.approvals().approve(OF.digest, "Anna")
    assert site.works().has_content()
    assert len(site.coordinator.named("activate-node")) == 1


# --- time


@pytest.mark.parametrize("ahead", [0.0, 3600.0])
def test_what_is_too_late_is_neither_trained_nor_sent_by_the_coordinators_clock(ahead: float, site: Site) -> None:
    site.coordinator.ahead = ahead
    site.finished(ttl=0.001)
    site.start()
    until(lambda: "its time is over" in site.log and site.service.journal.current() is None)
    late = _message()
    late.metadata.ttl = 1800.0 if ahead else 0.001
    site.coordinator.give(late, OF)
    until(lambda: site.log.count("its time is over") == 2)
    assert site.answerer.trained == 0
    assert site.coordinator.replies == []


def test_an_update_that_is_finished_too_late_is_not_sent(site: Site) -> None:
    site.answerer.before = lambda: time.sleep(1.2)
    site.start()
    site.coordinator.give(_message(ttl=1.0), OF)
    until(lambda: "its time is over" in site.log)
    assert site.answerer.trained == 1
    assert site.coordinator.replies == []


# --- what it says


def test_the_status_tells_run_and_round(site: Site) -> None:
    said: list[Mapping[str, Any]] = []
    site.answerer.before = lambda: said.append(doing(site.hospital.home).said)
    site.start()
    site.works()
    assert Doing(running=True, said=said[0]).in_words().endswith(", training in round 1 of run-1")


def test_the_status_tells_since_when_the_connection_is_lost_and_not_of_the_last_attempt(site: Site) -> None:
    site.start()
    site.works()
    site.coordinator.answers = dict.fromkeys(
        ("pull-messages", "activate-node"), lambda _: pb.FleetAnswer(status=503, body=b"")
    )
    lost = until(lambda: not (said := doing(site.hospital.home).said)["connected"] and said)
    attempts = len(site.coordinator.named("activate-node"))
    until(lambda: len(site.coordinator.named("activate-node")) > attempts + 2)
    assert doing(site.hospital.home).said["at"] == lost["at"]
    assert lost["at"] == pytest.approx(time.time(), abs=60)


def test_nothing_is_written_while_nothing_changes(site: Site) -> None:
    site.start()
    site.works()
    until(lambda: doing(site.hospital.home).said.get("activity") == "idle")
    written = (site.hospital.home / "agent.json").stat().st_mtime_ns
    pulls = len(site.coordinator.named("pull-messages"))
    until(lambda: len(site.coordinator.named("pull-messages")) > pulls + 5)
    assert (site.hospital.home / "agent.json").stat().st_mtime_ns == written


# --- what leaves is written down


def _releases(site: Site) -> list[ReleaseEntry]:
    """The entries of the site's own log of what left, reports left out."""
    found = map(read_entry, Log(site.hospital.home / "log", ORIGIN).entries())
    return [entry for entry in found if isinstance(entry, ReleaseEntry) and not entry.purpose.startswith("report.")]


def _answers(site: Site) -> list[ReleaseEntry]:
    return [entry for entry in _releases(site) if entry.purpose == TRAIN]


def test_every_reply_that_arrived_stands_in_the_log_with_its_digest_size_run_and_round(site: Site) -> None:
    site.start()
    for _ in range(3):
        site.works()
    arrived = [(reply.object_id, sum(map(len, site.coordinator.parts_of(reply)))) for reply in site.coordinator.replies]
    found = _answers(site)
    assert [(entry.sha256, entry.bytes) for entry in found] == arrived
    assert {(entry.run, entry.round, entry.code) for entry in found} == {("run-1", 1, None)}


def test_the_entry_is_on_the_disk_when_the_first_byte_arrives(site: Site) -> None:
    there: list[str] = []

    def pushed(body: bytes) -> pb.FleetAnswer:
        there.extend(entry.sha256 for entry in _answers(site))
        answer = site.coordinator._push_messages(body)
        return pb.FleetAnswer(status=200, body=answer.SerializeToString())

    site.coordinator.answers["push-messages"] = pushed
    site.start()
    assert there == [site.works().object_id]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_agent_killed_before_or_after_it_sent_delivers_again_under_one_entry(when: str, site: Site) -> None:
    site.finished()
    arguments = [str(site.hospital.home), str(site.coordinator.port), when]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *arguments], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(site.coordinator.replies) == (when == "after")
    (entry,) = _answers(site)
    site.service.releases = open_releases(site.hospital.home)
    site.start()
    until(lambda: site.service.journal.current() is None)
    assert {reply.object_id for reply in site.coordinator.replies} == {entry.sha256}
    assert _answers(site) == [entry]


_KILLED = """
import os, signal, sys
from pathlib import Path
import grpc
from locum.site_client.configuration import read_configuration
from locum.site_client.fleet import Fleet
from locum.site_client.start import open_log, open_service

home, port, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
whole = Fleet.push

def push(fleet, reply):
    if when == "after":
        whole(fleet, reply)
    os.kill(os.getpid(), signal.SIGKILL)

Fleet.push = push
configuration = read_configuration(home / "site.yaml")
service = open_service(home, configuration, open_log(home, "north", configuration))
service.connect = lambda: grpc.insecure_channel(f"127.0.0.1:{port}")
service.run()
"""


def test_nothing_leaves_while_the_log_cannot_be_written_and_what_is_finished_leaves_afterwards(site: Site) -> None:
    for _ in range(300):  # so that no other file is as large
        site.service.releases.cosignature("line", lambda: None)
    site.start()
    site.works()
    until(lambda: site.service.journal.current() is None)
    entries = site.hospital.home / "log" / "entries.jsonl"
    size = entries.stat().st_size
    site.answerer.before = lambda: _limit(size)
    replies = len(site.coordinator.replies)
    site.coordinator.give(_message(), OF)
    try:
        until(lambda: "cannot be written" in (doing(site.hospital.home).said.get("problem") or ""))
        assert entries.stat().st_size == size
        assert len(site.coordinator.replies) == replies
    finally:
        site.answerer.before = lambda: None
        _limit(resource.RLIM_INFINITY)
    until(lambda: len(site.coordinator.replies) > replies)
    assert site.answerer.trained == 2
    assert [entry.sha256 for entry in _answers(site)] == [reply.object_id for reply in site.coordinator.replies]


def _limit(size: int) -> None:
    """No file of this process grows beyond so many bytes; to write more fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_refusal_has_two_entries_why_and_that_it_left(site: Site) -> None:
    closed = f"{time.strftime('%a', time.localtime(time.time() + 2 * 86_400))} 00:00-01:00"
    (site.hospital.home / "site.yaml").write_text(f"stores: [store]\npolicy: {{hours: ['{closed}']}}\n")
    configuration = read_configuration(site.hospital.home / "site.yaml")
    service = open_service(site.hospital.home, configuration, site.service.log)
    service.connect, site.service = site.coordinator.channel, service
    site.start()
    site.coordinator.give(_message(), OF)
    until(lambda: site.coordinator.replies)
    found = [read_entry(leaf) for leaf in Log(site.hospital.home / "log", ORIGIN).entries()]
    (number,) = [number for number, entry in enumerate(found) if isinstance(entry, RefusalEntry)]
    refusal, release = found[number], found[number + 1]
    assert isinstance(refusal, RefusalEntry)
    assert isinstance(release, ReleaseEntry)
    assert (refusal.run, refusal.asked, refusal.code, refusal.clause) == ("run-1", TRAIN, "POLICY_REFUSED", "hours")
    assert (release.purpose, release.code) == (TRAIN, "POLICY_REFUSED")
    assert release.sha256 == site.coordinator.replies[0].object_id


def test_a_report_is_written_down_when_its_words_change_and_not_at_each_beat(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "_BEAT_SECONDS", 0.05)
    site.service.pulse.start()
    site.start()
    site.works()
    until(lambda: len(site.coordinator.named("report")) > 10)
    found = [read_entry(leaf) for leaf in Log(site.hospital.home / "log", ORIGIN).entries()]
    reports = [entry for entry in found if isinstance(entry, ReleaseEntry) and entry.purpose.startswith("report.")]
    words = [(entry.purpose, entry.run, entry.round) for entry in reports]
    assert all(one != other for one, other in pairwise(words))
    heard = {(f"report.{said.activity}", said.run or None) for said in site.coordinator.named("report")}
    assert {(purpose, run) for purpose, run, _ in words} == heard
