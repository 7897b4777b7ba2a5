"""The site's own log: what is written when, what a steward is shown of it, and what becomes of one that was changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from locum.common.canonical import sha256_hex
from locum.common.cli import main
from locum.common.envelope import Spent, open_approval, seal_spent
from locum.common.errors import Code, SiteFailure
from locum.common.identity import new_key, utc_now
from locum.common.log.entries import (
    DecisionEntry,
    Entry,
    LedgerEntry,
    OwnerEntry,
    PolicyEntry,
    RefusalEntry,
    ReleaseEntry,
    read_entry,
)
from locum.common.log.note import check_cosignature, sign
from locum.common.log.store import LogError
from locum.common.messages import EVALUATE, TRAIN, UNMASK, UnmaskTask, pack
from locum.site_client import gate
from locum.site_client.configuration import read_configuration
from locum.site_client.gate import Policy, PolicyRefusal
from locum.site_client.identity import load_identity
from locum.site_client.privacy.ledger import State
from locum.site_client.releases import NotWrittenError, Releases, Sent, begin_releases, open_releases, set_aside
from locum.site_client.start import open_log, open_service
from tests.plans import initial, plan
from tests.site_client.asking import message, training
from tests.site_client.enrolled import Hospital

OF = plan()
RUN = "20261126-test-2f66"


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    return begin_releases(tmp_path / "log", "test", "north")


def _entries(releases: Releases) -> list[Entry]:
    return [read_entry(leaf) for leaf in releases.log.entries()]


def _since(releases: Releases, number: int) -> list[Any]:
    return _entries(releases)[number:]


def _asked(number: int = 1) -> Message:
    return message(training(OF, initial(OF), number), TRAIN)


def _reply(asked: Message, **header: Any) -> Message:
    content = RecordDict({"locum": ConfigRecord({"json": json.dumps(header).encode()})})
    return Message(content, reply_to=asked)


def _sent(content: str) -> Sent:
    return Sent(sha256_hex(content.encode()), 1000)


def _nothing() -> None:
    """Sends nothing."""


# --- what is written


def test_a_log_begins_with_its_owner_and_a_second_opening_adds_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        (entry,) = _entries(begin_releases(tmp_path / "log", "test", "north"))
        assert isinstance(entry, OwnerEntry)
        assert (entry.federation, entry.site) == ("test", "north")


def test_agents_and_commands_that_begin_a_log_at_once_name_one_owner(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from locum.site_client.releases import begin_releases as begin\n"
    code += "begin(Path(sys.argv[1]), 'test', 'north').cosignature(sys.argv[2], lambda: None)"
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    for process in [subprocess.Popen([*command, str(number)]) for number in range(4)]:
        assert process.wait(120) == 0
    found = _entries(begin_releases(tmp_path / "log", "test", "north"))
    assert [entry.kind for entry in found] == ["owner", *["release"] * 4]


def test_an_answer_tells_its_run_round_size_digest_statements_and_what_was_spent(releases: Releases) -> None:
    key = new_key()
    statement = seal_spent(
        Spent(site="north", run=RUN, plan=OF.digest, round=2, purpose="train", at=1.0, epsilon=0.25, delta=1e-6), key
    ).decode()
    asked = _asked(2)
    sent = Sent("a" * 64, 5000, "b" * 64)
    assert releases.answer(RUN, asked, _reply(asked, upload="signed", spent=statement), sent, lambda: 7) == 7
    (entry,) = _since(releases, 1)
    assert isinstance(entry, ReleaseEntry)
    assert (entry.purpose, entry.run, entry.round) == (TRAIN, RUN, 2)
    assert (entry.bytes, entry.sha256, entry.tensors) == (5000, "a" * 64, "b" * 64)
    assert entry.statements == tuple(sorted([sha256_hex(b"signed"), sha256_hex(statement.encode())]))
    assert (entry.epsilon, entry.delta, entry.code) == (0.25, 1e-6, None)


def test_the_round_of_an_unmasking_is_that_of_its_signed_context(releases: Releases) -> None:
    context = json.dumps({"body": {"round": 5, "sum": "x"}, "kind": "context", "signature": ""})
    asked = message(pack(UnmaskTask(plan_digest=OF.digest, context=context, uploads={})), UNMASK)
    releases.answer(RUN, asked, _reply(asked), _sent("shares"), _nothing)
    assert _since(releases, 1)[0].round == 5


@pytest.mark.parametrize("failure", [PolicyRefusal("hours", "it is late"), SiteFailure(Code.NOT_APPROVED, OF.digest)])
def test_a_refusal_is_written_down_before_the_answer_that_tells_it(failure: SiteFailure, releases: Releases) -> None:
    asked = _asked()
    reply = Message(gate.release_failure(failure), reply_to=asked)
    releases.answer(RUN, asked, reply, _sent("no"), _nothing)
    refusal, release = _since(releases, 1)
    assert isinstance(refusal, RefusalEntry)
    assert (refusal.code, refusal.clause) == (failure.code.name, getattr(failure, "clause", None))
    assert release.code == failure.code.name


def test_a_failure_is_no_refusal_and_its_text_is_not_there(releases: Releases) -> None:
    asked = _asked()
    reply = Message(gate.release_failure(SiteFailure(Code.WORKER_DIED, "a name")), reply_to=asked)
    releases.answer(RUN, asked, reply, _sent("died"), _nothing)
    (release,) = _since(releases, 1)
    assert release.code == "WORKER_DIED"
    assert "a name" not in release.model_dump_json()


@pytest.mark.parametrize("run", ["", "x" * 200, "Zwölf^Ada", "../run", "a\nb"])
def test_words_of_a_coordinator_that_are_no_names_do_not_stand_in_the_log(run: str, releases: Releases) -> None:
    for content in (b"no json", b'{"round": true}', b'{"round": -1}', b"[" * 100_000, b'{"context": "[[["}'):
        asked = message(RecordDict({"locum": ConfigRecord({"json": content})}), TRAIN)
        releases.answer(run, asked, _reply(asked), _sent(repr(content)), _nothing)
    found = _since(releases, 1)
    assert len(found) == 5
    assert {(entry.run, entry.round) for entry in found} == {(None, None)}


def test_what_is_sent_again_to_the_byte_has_one_entry_also_after_a_restart(releases: Releases, tmp_path: Path) -> None:
    first, second = _asked(1), _asked(2)
    sends: list[int] = []
    for opened in (releases, releases, begin_releases(tmp_path / "log", "test", "north")):
        opened.answer(RUN, first, _reply(first), _sent("one"), lambda: sends.append(1))
        opened.decision(b"approved", lambda: sends.append(2))
    releases.answer(RUN, second, _reply(second), _sent("two"), _nothing)
    assert sends == [1, 2] * 3
    assert [entry.purpose for entry in _since(releases, 1)] == [TRAIN, "decision", TRAIN]


def test_reports_are_written_down_when_their_words_change(releases: Releases) -> None:
    said = [("idle", "", 0), ("training", RUN, 1), ("training", RUN, 1), ("training", RUN, 2), ("idle", "", 0)]
    for number, (activity, run, of) in enumerate(said):
        releases.report(activity, run, of, f"clock {number}".encode(), _nothing)  # type: ignore[arg-type]
    found = [(entry.purpose, entry.run, entry.round) for entry in _since(releases, 1)]
    training = [("report.training", RUN, 1), ("report.training", RUN, 2)]
    assert found == [("report.idle", None, None), *training, ("report.idle", None, None)]


def test_the_policy_is_written_down_when_it_changes(hospital: Hospital) -> None:
    (hospital.home / "store").mkdir()
    for text in ("", "", "policy: {most_rounds: 7}", "policy: {most_rounds: 7}", ""):
        (hospital.home / "site.yaml").write_text(f"stores: [store]\n{text}\n")
        configuration = read_configuration(hospital.home / "site.yaml")
        open_service(hospital.home, configuration, open_log(hospital.home, "north", configuration))
    found = [entry.policy for entry in _entries(open_releases(hospital.home)) if isinstance(entry, PolicyEntry)]
    plain, strict = gate.policy_digest(Policy()), gate.policy_digest(Policy(most_rounds=7))
    assert found == [plain, strict, plain]


def test_the_state_of_the_ledger_goes_before_the_first_answer_after_it_changed(releases: Releases) -> None:
    states = iter([State(1, "a" * 64), State(1, "a" * 64), None, State(3, "c" * 64)])
    releases.ledger = lambda: next(states)
    for number in range(4):
        asked = _asked()
        releases.answer(RUN, asked, _reply(asked), _sent(str(number)), _nothing)
    found = _since(releases, 1)
    assert [entry.kind for entry in found] == ["ledger", *["release"] * 3, "ledger", "release"]
    assert [entry.rows for entry in found if isinstance(entry, LedgerEntry)] == [1, 3]


# --- decisions


def test_each_decision_of_a_steward_is_written_down_as_it_was_signed(hospital: Hospital) -> None:
    of, key = hospital.proposed(), load_identity(hospital.home).key.public_key()
    hospital.approvals().approve(of.digest, "Anna")
    hospital.approvals().approve(of.digest, "Anna")
    hospital.approvals().revoke(of.digest, "Bert")
    found = [entry for entry in _entries(open_releases(hospital.home)) if isinstance(entry, DecisionEntry)]
    signed = [open_approval(entry.statement.encode(), key) for entry in found]
    assert [(one.decision, one.steward, one.digest) for one in signed] == [
        ("approve", "Anna", of.digest),
        ("revoke", "Bert", of.digest),
    ]


def test_an_approval_that_cannot_be_written_down_does_not_count_and_a_revocation_does(hospital: Hospital) -> None:
    first, second = hospital.proposed(), hospital.proposed(rounds=3)
    hospital.approvals().approve(first.digest, "Anna")
    _damage(hospital)
    with pytest.raises(LogError, match="was damaged"):
        hospital.approvals().approve(second.digest, "Anna")
    with pytest.raises(LogError, match="was damaged"):
        hospital.approvals().revoke(first.digest, "Anna")
    assert not hospital.approvals().standing(second.digest)
    assert not hospital.approvals().standing(first.digest)


def _damage(hospital: Hospital) -> None:
    """A log that was signed and then changed."""
    open_releases(hospital.home).seal()
    path = hospital.home / "log" / "entries.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"site":"north"', b'"site":"south"'))


# --- when it cannot be written


@pytest.mark.parametrize("send", ["answer", "decision", "report", "cosignature", "renewal", "enrolment"])
def test_what_cannot_be_written_down_is_not_sent(send: str, releases: Releases, tmp_path: Path) -> None:
    asked = _asked()
    (tmp_path / "log" / "entries.jsonl").rename(tmp_path / "elsewhere")
    ways: dict[str, Callable[[], object]] = {
        "answer": lambda: releases.answer(RUN, asked, _reply(asked), _sent("x"), lambda: sends.append(1)),
        "decision": lambda: releases.decision(b"x", lambda: sends.append(1)),
        "report": lambda: releases.report("idle", "", 0, b"x", lambda: sends.append(1)),
        "cosignature": lambda: releases.cosignature("x", lambda: sends.append(1)),
        "renewal": lambda: releases.renewal(b"x", lambda: sends.append(1)),
        "enrolment": lambda: releases.enrolment(b"x", lambda: sends.append(1)),
    }
    sends: list[int] = []
    with pytest.raises(NotWrittenError, match="cannot be written: No such file"):
        ways[send]()
    assert sends == []
    (tmp_path / "elsewhere").rename(tmp_path / "log" / "entries.jsonl")
    ways[send]()
    assert sends == [1]
    assert len(_since(releases, 1)) == 1


# --- who owns it


def test_a_site_that_enrols_anew_elsewhere_begins_a_log_and_keeps_the_old_one(tmp_path: Path) -> None:
    begin_releases(tmp_path / "log", "test", "north").seal()
    set_aside(tmp_path, "test", "north")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    set_aside(tmp_path, "another", "north")
    (old,) = tmp_path.glob("log.until-*")
    assert len(_entries(begin_releases(old, "test", "north"))) == 1
    assert len(_entries(begin_releases(tmp_path / "log", "another", "north"))) == 1


# --- what a steward is shown


@pytest.fixture
def told(hospital: Hospital, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`locum site released` after a small history; returns exit code, output and errors."""
    releases, first, second = open_releases(hospital.home), _asked(1), _asked(2)
    releases.report("training", RUN, 1, b"x", _nothing)
    releases.answer(RUN, first, _reply(first, round=1), Sent("a" * 64, 5_400_000, "b" * 64), _nothing)
    refusal = Message(gate.release_failure(PolicyRefusal("hours", "")), reply_to=second)
    releases.answer("another-run", second, refusal, Sent("c" * 64, 160), _nothing)
    releases.cosignature("line", _nothing)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["site", "released", *words, "--home", str(hospital.home)])
        found = capsys.readouterr()
        return code or 0, found.out, found.err

    return run


def test_every_release_is_shown_with_time_run_round_size_and_digest(told: Callable[..., Any]) -> None:
    code, out, _ = told()
    assert code == 0
    enrolment, update, refused, summary, checked = out.splitlines()
    assert "enrolment" in enrolment
    assert f"train              round 1 of {RUN}" in update
    assert "5.4 MB  bbbbbbbbbbbbbbbb" in update
    assert refused.endswith("160 B  cccccccccccccccc  POLICY_REFUSED (hours)")
    assert "3 releases" in summary
    assert "2 reports and cosignatures (--all)" in summary
    assert checked.startswith("the site's own log was checked: 7 entries, root ")
    assert "report.training" in told("--all")[1]


def test_releases_are_chosen_by_run_and_by_time(told: Callable[..., Any]) -> None:
    (found,) = json.loads(told("another-run", "--json")[1])["releases"]
    assert (found["code"], found["clause"], found["sha256"]) == ("POLICY_REFUSED", "hours", "c" * 64)
    assert json.loads(told("--since", "2999-01-01", "--json")[1])["releases"] == []
    assert len(json.loads(told("--since", "2020-01-01T06:00", "--json")[1])["releases"]) == 5


def test_the_log_is_signed_when_it_is_shown_and_by_the_sites_key(told: Callable[..., Any], hospital: Hospital) -> None:
    found = json.loads(told("--json")[1])["log"]
    note = open_releases(hospital.home).log.latest()
    assert note is not None
    check_cosignature(note, found["origin"], load_identity(hospital.home).key.public_key())
    assert f"\n{found['entries']}\n" in note


def test_a_log_that_was_changed_is_not_shown(told: Callable[..., Any], hospital: Hospital) -> None:
    _damage(hospital)
    code, out, err = told()
    assert (code, out) == (1, "")
    assert "was damaged" in err
    assert "restore the folder from a backup" in err


def test_a_log_that_another_key_has_signed_is_not_shown(told: Callable[..., Any], hospital: Hospital) -> None:
    releases, stranger = open_releases(hospital.home), new_key()
    releases.sign = lambda checkpoint: sign(checkpoint, checkpoint.origin, stranger, utc_now())
    releases.seal()
    code, out, err = told()
    assert (code, out) == (1, "")
    assert "no key that this site has or had signed it" in err


def test_checkpoints_are_signed_as_the_log_grows(hospital: Hospital) -> None:
    releases = open_releases(hospital.home)
    for number in range(100):
        releases.cosignature(str(number), _nothing)
    assert len(list(releases.log.checkpoints())) == 3


def test_evaluations_are_told_by_their_own_name(releases: Releases) -> None:
    asked = message(training(OF, initial(OF)), EVALUATE)
    releases.answer(RUN, asked, _reply(asked), _sent("sums"), _nothing)
    assert _since(releases, 1)[0].purpose == EVALUATE
