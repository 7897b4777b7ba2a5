"""What a site does with cohort questions: within its policy, each once, never without its memory."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from locum.common.canonical import sha256_hex
from locum.common.cohort import Answer, Query, Question, open_answer, parse_query, seal_question
from locum.common.errors import DataError, RunError
from locum.simulations.catalogs import Entry, write_catalog
from locum.site_client.cohort.answering import Answering
from locum.site_client.cohort.counting import Cohorts
from locum.site_client.cohort.memory import FILE, FOLDER, ForgottenError, Memory
from locum.site_client.gate import Policy
from locum.site_client.identity import load_identity
from locum.site_client.releases import open_releases
from tests.site_client.enrolled import Hospital, copy_of, enrol_hospital

NOW = 1_800_000_000.0


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return enrol_hospital(tmp_path_factory.mktemp("federation"))


@dataclass
class Desk:
    """A site that is asked; its clock is set by hand, and nobody counts but `work`."""

    hospital: Hospital
    policy: Policy
    now: float = NOW
    left: set[str] = field(default_factory=set)
    local: datetime = datetime(2026, 11, 27, 12, tzinfo=UTC)

    @property
    def answering(self) -> Answering:
        """As an agent that has just started."""
        home = self.hospital.home
        made = Answering(
            Memory(home / FOLDER), Cohorts((home / "store",)), self.policy, lambda: load_identity(home),
            lambda: self.now, lambda: frozenset(self.left), logging.getLogger("test"), lambda: self.local,
        )  # fmt: skip
        made._begin = lambda: None  # type: ignore[method-assign]
        return made

    def ask(self, query: Query, *, until: float = NOW + 1e6) -> None:
        fields = {"digest": query.digest, "query": query.model_dump(mode="json"), "by": "Team A"}
        self.answering.receive(seal_question(Question(**fields, asked_at=NOW, until=until), self.hospital.log_key))

    def work(self) -> int:
        return self.answering.answer_waiting()

    def answers(self) -> list[Answer]:
        key = load_identity(self.hospital.home).key.public_key()
        return [open_answer(said.envelope, key) for said in self.answering.statements()]


@pytest.fixture
def desk(enrolled: Hospital, tmp_path: Path) -> Desk:
    hospital = copy_of(enrolled, tmp_path / "north")
    write_catalog(hospital.home / "store", [Entry(f"p{number}", sex="FM"[number % 2]) for number in range(50)])
    return Desk(hospital, Policy(cohort="on"))


def query(name: str = "people", **changes: Any) -> Query:
    return parse_query(yaml.safe_dump({"name": name, "study": "s", "purpose": "p", **changes}).encode())


def test_a_question_is_answered_once_and_the_same_whatever_the_data_become(desk: Desk) -> None:
    desk.ask(query(group_by=["sex"]))
    assert (desk.work(), desk.work()) == (1, 0)
    (answer,) = desk.answers()
    assert answer.numbers(0) == {("F",): 25, ("M",): 25}
    assert [cell.patients for cell in answer.cells] == [25, 25, None]
    write_catalog(desk.hospital.home / "store", [Entry(f"q{number}", sex="F") for number in range(90)])
    desk.ask(query(group_by=["sex"]))
    assert desk.work() == 0
    assert desk.answers() == [answer]


def test_a_policy_that_says_nothing_answers_that_it_does_not(desk: Desk) -> None:
    desk.policy = Policy()
    desk.ask(query())
    assert desk.work() == 1
    (answer,) = desk.answers()
    assert (answer.refused, answer.cells) == ("cohort", ())
    (said,) = desk.answering.statements()
    assert said.refused == "cohort"


def test_beyond_so_many_a_day_questions_wait_for_the_next(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.policy = Policy(cohort="on", cohort_questions_a_day=2)
    for number in range(5):
        desk.ask(query(f"question-{number}"))
    assert desk.work() == 2
    desk.local += timedelta(hours=1)
    assert desk.work() == 0
    assert "2 were answered in 24 hours" in caplog.text
    desk.local += timedelta(days=1)
    assert desk.work() == 2
    desk.local += timedelta(days=1, seconds=1)
    assert desk.work() == 1


def test_a_day_is_one_of_the_hospital_s_clock_and_not_of_the_coordinator_s(desk: Desk) -> None:
    desk.policy = Policy(cohort="on", cohort_questions_a_day=2)
    for number in range(4):
        desk.ask(query(f"question-{number}"), until=NOW + 1e7)
    assert desk.work() == 2
    desk.now += 5 * 86_400
    assert desk.work() == 0


def test_an_answer_that_has_not_left_stays_once_the_policy_says_off(desk: Desk) -> None:
    desk.ask(query())
    desk.work()
    (made,) = desk.answering.statements()
    desk.policy = Policy()
    assert desk.answers() == []
    desk.left = {sha256_hex(made.envelope)}
    assert len(desk.answers()) == 1


def test_a_statement_of_readiness_that_left_is_none_that_the_memory_lacks(desk: Desk) -> None:
    releases = open_releases(desk.hospital.home)
    releases.readiness(b'{"kind":"readiness"}', lambda: None)
    desk.left = set(open_releases(desk.hospital.home).answers)
    desk.ask(query())
    assert desk.work() == 1


def test_a_label_that_no_answer_can_have_costs_no_other(desk: Desk) -> None:
    crowds = {"effusion": 30, "a whole sentence " * 8: 30, "two\nlines": 30}
    entries = [Entry(f"{number} {label}", label=label) for label, many in crowds.items() for number in range(many)]
    write_catalog(desk.hospital.home / "store", entries)
    desk.ask(query("by-label", group_by=["label"]))
    desk.ask(query("all"))
    assert desk.work() == 2
    assert {("effusion",): 30} in [answer.numbers(0) for answer in desk.answers()]


def test_who_asks_writes_one_line_into_the_site_s_log(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    desk.ask(query(purpose="good\x1b[2J\n2026-11-27 INFO nobody asked"))
    (record,) = caplog.records
    assert record.getMessage().isprintable()


def test_outside_its_hours_and_during_an_ingest_a_question_waits(desk: Desk) -> None:
    desk.policy = Policy.model_validate({"cohort": "on", "hours": ["20:00-06:00"]})
    desk.ask(query())
    assert desk.work() == 0
    desk.local = datetime(2026, 11, 27, 23, tzinfo=UTC)
    catalog = desk.hospital.home / "store" / "catalog.sqlite"
    for complete, answered in (("false", False), ("true", True)):
        with closing(sqlite3.connect(catalog)) as connection, connection:
            connection.execute("UPDATE meta SET value = ? WHERE name = 'complete'", (complete,))
        if answered:
            assert desk.work() == 1
        else:
            with pytest.raises(DataError, match="did not finish"):
                desk.work()


def test_a_question_that_is_closed_or_of_somebody_else_is_not_answered(desk: Desk) -> None:
    desk.ask(query("closed"), until=NOW - 1)
    desk.ask(query("closing"), until=NOW + 10)
    desk.now += 11
    assert desk.work() == 0
    with pytest.raises(RunError, match="does not count"):
        desk.answering.receive(b"{}")
    assert desk.answers() == []


def test_a_cell_below_the_least_never_leaves_and_a_higher_least_keeps_what_was_told_before(desk: Desk) -> None:
    desk.ask(query(group_by=["sex"]))
    desk.work()
    desk.policy = Policy(cohort="on", least_cell=40)
    desk.ask(query("women", where={"sex": ["F"]}))
    desk.work()
    assert {answer.least_cell: answer.numbers(0) for answer in desk.answers()} == {10: {("F",): 25, ("M",): 25}, 40: {}}


def test_a_memory_that_lacks_an_answer_of_the_log_answers_nothing(desk: Desk) -> None:
    desk.ask(query())
    desk.work()
    (said,) = desk.answering.statements()
    desk.left = {sha256_hex(said.envelope)}
    desk.ask(query("another"))
    assert desk.work() == 1
    (desk.hospital.home / FOLDER / FILE).unlink()
    desk.ask(query("a-third"))
    with pytest.raises(ForgottenError, match="lacks 1 answers that left this site"):
        desk.work()
    (desk.hospital.home / FOLDER / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(ForgottenError, match="cannot be used"):
        desk.work()


def test_the_memory_is_the_accounts_own_and_has_no_pseudonym_in_it(desk: Desk) -> None:
    desk.ask(query())
    desk.work()
    path = desk.hospital.home / FOLDER / FILE
    assert path.stat().st_mode & 0o077 == 0
    assert b"p17" not in path.read_bytes()


def test_two_questions_are_one_memory_whatever_study_they_name(desk: Desk) -> None:
    desk.ask(query("all"))
    desk.work()
    write_catalog(desk.hospital.home / "store", [Entry(f"p{number}", sex="FM"[number % 2]) for number in range(54)])
    other = query("all", study="another", where={"modality": ["MR"]})
    same = query("all", study="a-third")
    for asked in (other, same):
        desk.ask(asked)
    desk.work()
    told = {answer.question: answer.numbers(0) for answer in desk.answers()}
    assert told == {query("all").digest: {(): 50}, other.digest: {}, same.digest: {(): 50}}
