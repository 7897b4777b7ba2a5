"""What happens at the coordinator stands in its log: each thing, as it was, once."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest

from locum.common.canonical import sha256_hex
from locum.common.envelope import Approval, Spent, seal_approval, seal_spent
from locum.common.errors import Code, RunError
from locum.common.identity import fingerprint_of, load_certificate, new_key
from locum.common.log.entries import (
    ApprovalEntry,
    EndEntry,
    Entry,
    FederationEntry,
    MetricsEntry,
    RosterEntry,
    RoundEntry,
    RunEntry,
    VoidEntry,
    read_entry,
)
from locum.common.log.note import check_signature, opened
from locum.common.messages import LOCAL, Description, TrainResult, TrainTask
from locum.common.plan import Plan
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub
from locum.server import wire
from locum.server.adopt import adopt
from locum.server.app import end, write_result
from locum.server.home import Home, read_config
from locum.server.link import Direct
from locum.server.log import NotLoggedError, open_log
from locum.server.proposals import propose
from locum.server.records import Events
from locum.server.registry import Registry
from locum.server.rounds import Finished
from locum.server.runs import create_run
from locum.server.supervisor import Conductor
from locum.server.wire import Wire
from locum.simulations.institutions import credentials_of, found_federation
from locum.site_client.enrolment import renew
from locum.site_client.identity import SiteIdentity
from locum.site_client.releases import begin_releases
from tests.peers import Failing, Mute, Peer, Spoiler, run_peers
from tests.plans import plan
from tests.readiness import ready
from tests.secure_peers import SecurePeer, run_secure
from tests.server.coordinator import enrol, new_home
from tests.server.door import Door, open_door
from tests.wire.federation import locum, until


def entries_of(folder: Path) -> list[Entry]:
    """The log in a folder, each entry read as a stranger reads it."""
    return [read_entry(line) for line in (folder / "entries.jsonl").read_bytes().replace(b" \n", b"\n").splitlines()]


def told(folder: Path) -> list[str]:
    """What a run's log says, an entry a word."""
    words = []
    for entry in entries_of(folder):
        more = [getattr(entry, name, "") for name in ("event", "fold", "round", "status")]
        words.append(" ".join(str(part) for part in (entry.kind, *more) if part != ""))
    return words


def of_kind(folder: Path, kind: type[Any]) -> list[Any]:
    return [entry for entry in entries_of(folder) if isinstance(entry, kind)]


def _finish(folder: Path, finished: Finished, of: Plan) -> None:
    log = Direct(Home(folder)).log(of)
    write_result(folder, finished, log)
    end(folder, log)


# --- a run


def test_a_run_stands_in_the_log_from_its_start_to_its_end_and_its_models_are_those_on_the_disk(tmp_path: Path) -> None:
    of = plan(rounds=2)
    finished = run_peers(of, [Peer("b"), Peer("a")], tmp_path)
    _finish(tmp_path, finished, of)
    assert told(tmp_path / "log") == [
        "federation",
        "run started",
        "roster 0",
        "round 1",
        "metrics validation 1",
        "round 2",
        "metrics validation 2",
        "metrics test 2",
        "end 2 completed",
    ]
    one, two = of_kind(tmp_path / "log", RoundEntry)
    (roster,), (ended,) = of_kind(tmp_path / "log", RosterEntry), of_kind(tmp_path / "log", EndEntry)
    on_disk = [
        hashlib.sha256((tmp_path / "checkpoints" / f"round-{number:06d}" / "model.safetensors").read_bytes())
        for number in (1, 2)
    ]
    assert (roster.sites, one.sites, one.refused) == (("a", "b"), ("a", "b"), {})
    assert (one.start, one.model, two.start) == (roster.model, on_disk[0].hexdigest(), one.model)
    released = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert two.model == on_disk[1].hexdigest() == ended.model == released
    test = of_kind(tmp_path / "log", MetricsEntry)[-1]
    assert (test.model, test.overall["AUC"], test.sites) == (two.model, 1.0, ("a", "b"))
    assert {entry.run for entry in entries_of(tmp_path / "log")[1:]} == {LOCAL}  # type: ignore[union-attr]
    assert {entry.plan for entry in entries_of(tmp_path / "log")[1:]} == {of.digest}  # type: ignore[union-attr]


def test_the_first_entry_says_whose_log_it_is_and_a_checkpoint_is_signed_with_each_round(tmp_path: Path) -> None:
    run_peers(plan(rounds=2), [Peer("a"), Peer("b")], tmp_path)
    log = open_log(Home(tmp_path))
    (first,) = of_kind(tmp_path / "log", FederationEntry)
    authority, own = (load_certificate(tmp_path / "authority" / name) for name in ("ca.pem", "log.pem"))
    assert (first.authority, first.log_key) == (fingerprint_of(authority), fingerprint_of(own))
    notes = list(log.store.checkpoints())
    kinds = told(tmp_path / "log")
    sealed = [kinds[check_signature(note, log.store.origin, log.key.public_key()).size - 1] for note in notes]
    assert sealed == ["roster 0", "round 1", "round 2"]


_LATE = plan(rounds=1, participation={"quorum": 2, "deadline": "1 s"})


@pytest.mark.parametrize(
    ("peer", "of", "word"),
    [
        (lambda: Failing("c", int(Code.LOSS_NOT_FINITE), "Mustermann"), plan(rounds=1), "LOSS_NOT_FINITE"),
        (lambda: Failing("c", 4711, "Mustermann"), plan(rounds=1), "INTERNAL"),
        (lambda: Spoiler("c", lambda update: {}), plan(rounds=1), "NOT_ADMITTED"),
        (lambda: Mute("c", 1.6), _LATE, "LATE"),
    ],
)  # fmt: skip
def test_why_a_site_is_not_in_a_round_is_one_word(
    peer: Callable[[], Peer], of: Plan, word: str, tmp_path: Path
) -> None:
    run_peers(of, [Peer("a"), Peer("b"), peer()], tmp_path)
    (round_,) = of_kind(tmp_path / "log", RoundEntry)
    assert (round_.sites, round_.refused) == (("a", "b"), {"c": word})
    assert b"Mustermann" not in (tmp_path / "log" / "entries.jsonl").read_bytes()


def test_a_site_that_cannot_take_part_is_named_with_the_roster_and_policies_are_told(tmp_path: Path) -> None:
    class Told(Peer):
        def description(self, plan: Plan) -> Description:
            able = self.site != "c"
            changes = {"policy": "ab" * 32, "able": able, "reason": "" if able else "no case of Mustermann"}
            return super().description(plan).model_copy(update=changes)

    run_peers(plan(rounds=1), [Told("a"), Peer("b"), Told("c")], tmp_path)
    (roster,) = of_kind(tmp_path / "log", RosterEntry)
    assert (roster.sites, roster.excluded, roster.policies) == (("a", "b"), {"c": "NO_DATA"}, {"a": "ab" * 32})
    assert b"Mustermann" not in (tmp_path / "log" / "entries.jsonl").read_bytes()


def test_a_round_below_quorum_is_void_in_the_log_and_never_a_round(tmp_path: Path) -> None:
    of = plan(participation={"quorum": 2, "deadline": "30 s", "attempts": 2})
    with pytest.raises(RunError):
        run_peers(of, [Peer("a"), Failing("b", int(Code.OUT_OF_MEMORY), "")], tmp_path)
    voids = of_kind(tmp_path / "log", VoidEntry)
    assert [(void.round, void.attempt, void.fold, void.refused) for void in voids] == [
        (1, 1, "train", {"b": "OUT_OF_MEMORY"}),
        (1, 2, "train", {"b": "OUT_OF_MEMORY"}),
    ]
    assert not of_kind(tmp_path / "log", RoundEntry)


def test_a_secure_sum_stands_with_its_uploads_and_the_digest_of_the_total(tmp_path: Path) -> None:
    of = plan(rounds=1, protection__secure_aggregation="required", admission={"norm_bound": 50})
    finished = run_secure(of, [SecurePeer(name) for name in "abc"], tmp_path)
    (round_,), record = of_kind(tmp_path / "log", RoundEntry), finished.history[0].secured
    assert record is not None
    assert set(round_.secured.uploads) == {"a", "b", "c"}
    assert (round_.secured.roster, round_.secured.threshold) == (record.roster, 3)
    assert round_.secured.total == record.total is not None


# --- what was spent


class _Spender(Peer):
    """States what it has spent; `changes` of it, or another key, make it a lie."""

    def __init__(self, site: str, folder: Path, changes: Mapping[str, Any] | None = None) -> None:
        super().__init__(site)
        self.key = credentials_of(site, found_federation(folder)).key
        self.changes = dict(changes or {})
        self.ready = lambda plan: str(ready(plan, site, self.key, LOCAL).envelope)

    def header(self, plan: Plan, task: TrainTask) -> TrainResult:
        fields = {"site": self.site, "run": LOCAL, "plan": plan.digest, "round": task.round, "purpose": "train",
                  "at": time.time(), "epsilon": 0.5 * task.round, "delta": 1e-5} | self.changes  # fmt: skip
        key = fields.pop("key", self.key)
        envelope = seal_spent(Spent.model_validate(fields), key).decode()
        return super().header(plan, task).model_copy(update={"spent": envelope})


_PRIVACY = {"epsilon": 1, "delta": 1e-5, "clip": 1}


def _private(rounds: int) -> Plan:
    """A plan whose updates have noise, and which releases nothing else."""
    without = {"metrics": [], "training_loss": False}
    return plan(rounds=rounds, protection__differential_privacy=_PRIVACY, release=without)


def test_what_sites_have_spent_stands_as_they_signed_it(tmp_path: Path) -> None:
    finished = run_peers(_private(2), [_Spender("a", tmp_path), _Spender("b", tmp_path)], tmp_path)
    stated = [json.loads(entry.spent["a"])["body"]["epsilon"] for entry in of_kind(tmp_path / "log", RoundEntry)]
    assert stated == [0.5, 1.0]
    assert [record.epsilon for record in finished.history] == [{"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}]


@pytest.mark.parametrize("private", [True, False])
def test_an_update_counts_only_with_a_statement_where_one_is_due_and_with_none_where_nothing_is_spent(
    private: bool, tmp_path: Path
) -> None:
    right, wrong = (_Spender, lambda site, _: Peer(site)) if private else (lambda site, _: Peer(site), _Spender)
    peers = [right("a", tmp_path), right("b", tmp_path), wrong("c", tmp_path)]
    run_peers(_private(1) if private else plan(rounds=1), peers, tmp_path)
    (round_,) = of_kind(tmp_path / "log", RoundEntry)
    assert (round_.sites, round_.refused) == (("a", "b"), {"c": "NOT_ADMITTED"})


@pytest.mark.parametrize(
    "changes", [{"key": new_key()}, {"round": 2}, {"run": "another"}, {"site": "b"}, {"purpose": "test"}]
)
def test_a_statement_that_is_not_the_sites_own_of_this_very_round_is_not_written_and_its_update_does_not_count(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    right = [_Spender("a", tmp_path), _Spender("b", tmp_path)]
    run_peers(_private(1), [*right, _Spender("c", tmp_path, changes)], tmp_path)
    (round_,) = of_kind(tmp_path / "log", RoundEntry)
    assert (round_.sites, round_.refused, set(round_.spent)) == (("a", "b"), {"c": "NOT_ADMITTED"}, {"a", "b"})


# --- whatever dies


_WHOLE = [
    "federation",
    "run started",
    "roster 0",
    "round 1",
    "metrics validation 1",
    "round 2",
    "metrics validation 2",
    "metrics test 2",
    "end 2 completed",
]


def _process(folder: Path, *words: object) -> int:
    command = [sys.executable, "-m", "tests.server.log_process", str(folder), *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "number"), [("round", 2), ("metrics", 1), ("end", 2)])
def test_kill_9_between_disk_and_log_leaves_each_round_measurement_and_end_in_the_log_once(
    when: str, kind: str, number: int, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(plan(rounds=2).to_yaml())
    assert _process(tmp_path, when, kind, number) == -signal.SIGKILL
    assert not (tmp_path / "run.json").exists()
    assert _process(tmp_path, "never", kind, number) == 0
    assert (tmp_path / "run.json").exists()
    entries = [entry for entry in entries_of(tmp_path / "log") if entry.kind not in {"run", "roster"}]
    assert len({(entry.kind, getattr(entry, "fold", ""), getattr(entry, "round", 0)) for entry in entries}) == len(
        entries
    )
    words = told(tmp_path / "log")
    assert [word for word in words if word in _WHOLE] == _WHOLE
    start, *models = [entry for entry in entries_of(tmp_path / "log") if isinstance(entry, RosterEntry | RoundEntry)]
    before = start.model
    for entry in models:
        if isinstance(entry, RoundEntry):
            assert entry.start == before
            before = entry.model


def test_a_run_that_goes_on_says_so_and_who_takes_part_from_there(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(plan(rounds=2).to_yaml())
    _process(tmp_path, "after", "round", 1)
    _process(tmp_path, "never", "round", 1)
    words = told(tmp_path / "log")
    assert words[:6] == ["federation", "run started", "roster 0", "round 1", "run resumed", "roster 1"]
    first, second = of_kind(tmp_path / "log", RosterEntry)
    assert second.model == of_kind(tmp_path / "log", RoundEntry)[0].model != first.model


def test_a_run_that_fails_on_one_machine_says_so(tmp_path: Path) -> None:
    of = plan(rounds=1, participation={"quorum": 3, "deadline": "30 s"})
    (tmp_path / "plan.yaml").write_text(of.to_yaml())
    command = [sys.executable, "-m", "tests.server.log_process", str(tmp_path), "never", "round", "1"]
    assert subprocess.run(command, check=False, capture_output=True, cwd=Path(__file__).parents[2]).returncode == 1
    assert told(tmp_path / "log") == ["federation", "run started", "run failed"]


# --- runs between hospitals


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return new_home(tmp_path / "coordinator")


def test_a_run_that_was_stopped_or_failed_without_a_process_has_its_end_in_the_log(home: Home) -> None:
    of = plan()
    stopped, failed, waiting = (create_run(home, of, by="test") for _ in range(3))
    log = open_log(home)
    for run in (stopped, failed):
        Wire(home, read_config(home), run=run, events=Events(run.events)).log(of).begin([])
    stopped.want("stop")
    failed.fail("a reason with Mustermann", "a remedy")
    waiting.want("stop")
    for _ in range(2):
        conductor = Conductor(home, read_config(home))
        for _ in range(2):
            conductor.look()
    said = {
        run.id: [entry.event for entry in of_kind(home.log, RunEntry) if entry.run == run.id]
        for run in (stopped, failed, waiting)
    }
    assert said == {stopped.id: ["started", "stopped"], failed.id: ["started", "failed"], waiting.id: []}
    assert opened(log.store.latest() or "")[0].size == log.store.size


def test_a_run_whose_log_cannot_be_written_waits_until_it_can_and_then_says_that_it_paused(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "_FIRST_PAUSE", 0.01)
    run = create_run(home, plan(), by="test")
    link = Wire(home, read_config(home), run=run, events=Events(run.events))
    link.log(run.plan).begin([])
    entries, aside = home.log / "entries.jsonl", home.path / "aside"
    entries.rename(aside)
    with pytest.raises(NotLoggedError):
        link.log(run.plan).append(link.log(run.plan).void(1, 1, "train", {}))
    waiting = threading.Thread(target=link.wait, args=(RunError("the disk is full", "free space"), ()))
    waiting.start()
    until(lambda: caplog.text.count("cannot be used") > 1)
    assert waiting.is_alive()
    aside.rename(entries)
    waiting.join()
    assert told(home.log) == ["federation", "run started", "run paused", "run resumed"]


# --- members and plans


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with open_door(tmp_path / "coordinator") as opened_door:
        yield opened_door


def _decide(
    door: Door, identity: SiteIdentity, digest: str, decision: Any = "approve", at: float | None = None
) -> bytes:
    body = Approval(site=identity.site, digest=digest, at=at or time.time(), decision=decision, steward="Dr. May")
    envelope = seal_approval(body, identity.key)
    with door.channel(identity) as channel:
        RegistryStub(channel).Approve(pb.ApproveRequest(envelope=envelope), timeout=10)
    return envelope


def test_members_proposals_and_decisions_stand_in_the_log_once_as_they_are_accepted(door: Door, tmp_path: Path) -> None:
    identity = door.enrol("berlin")
    digest = propose(door.home, plan(), "team")
    propose(door.home, plan(), "team")
    approved = _decide(door, identity, digest)
    with door.channel(identity) as channel:
        for _ in range(2):  # told anew over each connection
            RegistryStub(channel).Approve(pb.ApproveRequest(envelope=approved), timeout=10)
    revoked = _decide(door, identity, digest, "revoke")
    _decide(door, identity, digest, at=time.time() - 1000)  # an older word changes nothing
    locum("server", "revoke", "berlin", "--home", door.home.path)
    locum("server", "revoke", "berlin", "--home", door.home.path)
    assert told(door.home.log) == ["federation", "site enrolled", "proposal", "approval", "approval", "site revoked"]
    _, enrolled, proposal, *words, _ = entries_of(door.home.log)
    assert enrolled.certificate == fingerprint_of(identity.certificate)  # type: ignore[union-attr]
    assert proposal.statement == sha256_hex(door.registry.proposals()[0])  # type: ignore[union-attr]
    assert [word.statement.encode() for word in words] == [approved, revoked]  # type: ignore[union-attr]
    assert {word.certificate for word in words} == {enrolled.certificate}  # type: ignore[union-attr]


def test_a_renewed_certificate_stands_in_the_log(tmp_path: Path) -> None:
    with open_door(tmp_path / "coordinator", certificate_days=0.0001) as door:
        identity = door.enrol("berlin")
        releases = begin_releases(tmp_path / "site-log", "Test federation", "berlin")
        time.sleep(6)  # two thirds of the certificate's time
        with door.channel(identity) as channel:
            renewed = renew(identity, door.site_home("berlin"), channel, releases)
    assert told(door.home.log) == ["federation", "site enrolled", "site renewed"]
    assert entries_of(door.home.log)[-1].certificate == fingerprint_of(renewed.certificate)  # type: ignore[union-attr]


def test_a_decision_that_cannot_be_logged_is_not_accepted(door: Door) -> None:
    identity = door.enrol("berlin")
    digest = propose(door.home, plan(), "team")
    content = (door.home.log / "entries.jsonl").read_bytes()
    (door.home.log / "entries.jsonl").write_bytes(content[: len(content) // 2])  # the log is damaged
    with pytest.raises(grpc.RpcError) as caught:
        _decide(door, identity, digest)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not door.registry.approved("berlin", digest)
    with pytest.raises(RunError, match="log cannot be written"):
        door.enrol("paris")
    assert door.registry.site("paris") is None
    (door.home.log / "entries.jsonl").write_bytes(content)
    _decide(door, identity, digest)
    assert door.registry.approved("berlin", digest)
    assert told(door.home.log)[-1] == "approval"


def test_a_coordinator_that_had_no_log_begins_one_with_what_its_registry_knows(home: Home) -> None:
    enrol(home, "berlin", "paris")
    digest = propose(home, plan(), "team")
    with closing(Registry(home.registry)) as registry:
        registry.record_approval("berlin", digest, approved=True, at=1.0, envelope=b"as it was signed")
        registry.revoke("paris")
        for path in home.log.iterdir():
            path.unlink()
        for _ in range(2):
            adopt(registry, open_log(home))
    assert told(home.log) == [
        "federation",
        "site enrolled",
        "site enrolled",
        "site revoked",
        "proposal",
        "approval",
    ]
    (approval,) = of_kind(home.log, ApprovalEntry)
    assert (approval.site, approval.plan, approval.statement) == ("berlin", digest, "as it was signed")


def test_two_processes_that_begin_a_log_write_one_first_entry(home: Home) -> None:
    code = "import sys, pathlib; from locum.server.home import Home; from locum.server.log import open_log\n"
    command = [sys.executable, "-c", f"{code}open_log(Home(pathlib.Path(sys.argv[1])))", str(home.path)]
    for process in [subprocess.Popen(command) for _ in range(4)]:
        assert process.wait() == 0
    assert told(home.log) == ["federation"]


# --- what a person sees


def test_the_command_tells_size_root_and_which_site_has_witnessed_how_much(home: Home) -> None:
    enrol(home, "berlin", "paris")
    with closing(Registry(home.registry)) as registry:
        adopt(registry, open_log(home))
    log = open_log(home)
    log.seal()
    found = json.loads(locum("server", "log", "--home", home.path, "--json"))
    assert (found["origin"], found["size"]) == ("locum.Test%20federation/log", 3)
    assert (found["checkpoint"], found["root"]) == (3, log.store.root().hex())
    assert found["witnesses"] == {"berlin": {"size": 0, "behind": 3}, "paris": {"size": 0, "behind": 3}}
    assert "berlin: has not witnessed anything yet" in locum("server", "log", "--home", home.path)


def test_a_new_coordinator_has_its_log_from_the_start(tmp_path: Path) -> None:
    options = ("--name", "A B", "--host", "localhost", "--home", tmp_path / "c")
    locum("server", "init", *options)
    assert told(tmp_path / "c" / "log") == ["federation"]
    assert "entries: 1\n" in locum("server", "log", "--home", tmp_path / "c")
