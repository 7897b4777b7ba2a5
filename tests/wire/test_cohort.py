"""Over real connections: a question goes out, sites that allow it answer with what they may tell, others say so."""

from __future__ import annotations

import csv
import io
import json
import logging
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import grpc
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from locum.common.canonical import sha256_hex
from locum.common.cohort import (
    Answer,
    Query,
    Question,
    Told,
    load_query,
    open_answer,
    parse_query,
    seal_answer,
    seal_question,
)
from locum.common.errors import RunError
from locum.common.log.entries import AnswerEntry, QuestionEntry, read_entry
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub
from locum.server.authority import load_log_key
from locum.server.cohort import ask, result
from locum.server.log import open_log
from locum.server.registry import Registry
from locum.simulations.catalogs import Entry, write_catalog
from locum.site_client.cohort.answering import Answering
from locum.site_client.cohort.counting import Cohorts
from locum.site_client.cohort.memory import FOLDER, Memory
from locum.site_client.gate import Policy
from locum.site_client.identity import SiteIdentity, load_identity
from tests.server.door import Door, open_door
from tests.wire.federation import Federation, Process, locum, open_federation, until

QUERY = """
name: lungs-by-sex
study: lung-nodules
purpose: to see whether there are enough women
where: {modality: [CT], body_part: [CHEST]}
group_by: [sex]
"""


def people(number: int, sex: str, first: int = 0) -> list[Entry]:
    return [
        Entry(f"{first + index:016x}", modality="CT", manufacturer="SIEMENS", body_part="CHEST", sex=sex, age=50)
        for index in range(number)
    ]


def site(federation: Federation, name: str, entries: list[Entry], **policy: object) -> None:
    """An agent over a catalog, under a policy."""
    home = federation.enrol(name)
    write_catalog(home / "store", entries)
    (home / "site.yaml").write_text(yaml.safe_dump({"stores": ["store"], "policy": policy}))
    federation.agent(name, home / "store")


def test_a_question_is_answered_by_whoever_allows_it_and_everybody_who_does_not_is_named(tmp_path: Path) -> None:
    query = tmp_path / "query.yaml"
    query.write_text(QUERY)
    with open_federation(tmp_path) as federation:
        site(federation, "north", [*people(25, "F"), *people(9, "M", 100)], cohort="on")
        site(federation, "south", [*people(12, "F"), *people(31, "M", 100)], cohort="on", least_cell=12)
        site(federation, "east", people(40, "F"))
        federation.enrol("west")
        at = ("--home", federation.home.path)
        locum("cohort", query, "--wait", 0, "--by", "Team A", *at)
        asked = load_query(query).digest
        until(lambda: result(federation.home, asked).silent == ("west",), 60, "not all have answered")
        found = json.loads(locum("cohort", "--show", asked, "--json", *at))
        cells = {cell["key"][0]: cell for cell in found["tables"][0]["cells"]}
        assert cells["F"] == {"key": ["F"], "sites": {"north": 25, "south": 12}, "least": 37, "not_told": 0, "few": 0}
        assert cells["M"]["sites"] == {"north": None, "south": 31}
        assert (cells["M"]["least"], cells["M"]["few"]) == (31, 9)
        assert cells["O"]["sites"] == {"north": None, "south": None}
        assert (found["refused"], found["silent"]) == ({"east": "cohort"}, ["west"])

        digest = found["question"]
        assert json.loads(locum("cohort", "--show", digest[:8], "--json", *at)) == found
        assert "lungs-by-sex, for lung-nodules, by Team A" in locum("cohort", "--list", *at)
        lines = list(csv.DictReader(io.StringIO(locum("cohort", "--show", digest, "--csv", *at))))
        assert [line["patients"] for line in lines if line["key"] == "M"] == ["", "31"]
        page = tmp_path / "page.html"
        told = locum("cohort", "--show", digest, "--html", page, *at)
        assert "≥ 31 (1 not told)" in told
        assert "silent: west" in told
        assert "to see whether there are enough women" in page.read_text()

        entries = [read_entry(leaf) for leaf in open_log(federation.home).store.entries()]
        assert [entry.question for entry in entries if isinstance(entry, QuestionEntry)] == [digest]
        assert {entry.site for entry in entries if isinstance(entry, AnswerEntry)} == {"north", "south", "east"}
        shown = json.loads(locum("site", "questions", "--json", "--home", tmp_path / "north"))
        (asked,) = shown["questions"]
        assert (asked["by"], asked["study"], asked["state"]) == ("Team A", "lung-nodules", "answered")
        assert "cohort" in locum("site", "released", "--home", tmp_path / "east")
        assert "POLICY_REFUSED (cohort)" in locum("site", "released", "--home", tmp_path / "east")

        write_catalog(tmp_path / "north" / "store", [*people(25, "F"), *people(12, "M", 100)])
        again = json.loads(locum("cohort", query, "--wait", 3, "--json", *at))
        assert again == found


# --- a coordinator and a site at close quarters


def _query(**changes: object) -> Query:
    return parse_query(yaml.safe_dump({**yaml.safe_load(QUERY), **changes}).encode())


def _state(door: Door, identity: SiteIdentity, envelope: bytes) -> pb.StateReply:
    with door.channel(identity) as channel:
        return RegistryStub(channel).State(pb.StateRequest(envelope=envelope), timeout=10)


def _answer(query: Query, site_name: str, **changes: object) -> Answer:
    cells = tuple(Told(table=0, key=key, patients=20) for key in query.tables[0].keys or ())
    fields = {"site": site_name, "question": query.digest, "at": time.time(), "least_cell": 10, "cells": cells}
    return Answer.model_validate({**fields, **changes})


def test_an_answer_that_is_forged_replayed_or_to_something_else_is_not_taken(tmp_path: Path) -> None:
    query, other = _query(), _query(edition=2)
    with open_door(tmp_path / "coordinator") as door:
        berlin, paris = door.enrol("berlin"), door.enrol("paris")
        for asked in (query, other):
            ask(door.home, asked, by="Team A", days=1)
        good = seal_answer(_answer(query, "berlin"), berlin.key)

        def refused(identity: SiteIdentity, envelope: bytes) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as caught:
                _state(door, identity, envelope)
            code = caught.value.code()
            assert isinstance(code, grpc.StatusCode)
            return code

        wrong = grpc.StatusCode.INVALID_ARGUMENT
        assert refused(paris, good) is wrong  # another site's
        assert refused(berlin, seal_answer(_answer(query, "paris"), berlin.key)) is grpc.StatusCode.PERMISSION_DENIED
        assert refused(berlin, seal_answer(_answer(query, "berlin"), paris.key)) is wrong
        assert refused(berlin, good.replace(b'"patients":20', b'"patients":21', 1)) is wrong
        elsewhere = _answer(query, "berlin", question="ab" * 32)
        assert refused(berlin, seal_answer(elsewhere, berlin.key)) is grpc.StatusCode.NOT_FOUND
        unasked = _answer(query, "berlin", cells=(Told(table=0, key=("X",), patients=20),))
        assert refused(berlin, seal_answer(unasked, berlin.key)) is wrong
        assert (
            refused(berlin, seal_answer(_answer(query, "berlin", cells=(Told(table=3, key=()),)), berlin.key)) is wrong
        )
        assert refused(berlin, b"hello") is wrong
        assert refused(berlin, b"{" * 70_000) is wrong
        assert result(door.home, query.digest).answers == {}

        _state(door, berlin, good)
        _state(door, berlin, good)  # sent again after a cut
        another = seal_answer(_answer(query, "berlin", cells=()), berlin.key)
        assert refused(berlin, another) is grpc.StatusCode.PERMISSION_DENIED
        assert set(result(door.home, query.digest).answers) == {"berlin"}
        assert result(door.home, other.digest).answers == {}  # an answer to one question is none to another
        kinds = [read_entry(leaf).kind for leaf in open_log(door.home).store.entries()]
        assert kinds.count("answer") == 1

        closed = _query(edition=3)
        ask(door.home, closed, by="Team A", days=1e-8)
        with door.channel(berlin) as channel:
            envelopes = RegistryStub(channel).Questions(pb.QuestionsRequest(), timeout=10).envelopes
        assert len(envelopes) == 2
        late = seal_answer(_answer(closed, "berlin"), berlin.key)
        assert refused(berlin, late) is grpc.StatusCode.FAILED_PRECONDITION


def test_a_coordinator_with_two_faces_hears_the_same_of_one_question_and_a_forged_one_is_not_answered(
    tmp_path: Path,
) -> None:
    """The coordinator asks under two names, signs one question twice, and asks in another key."""
    with open_door(tmp_path / "coordinator") as door:
        identity = door.enrol("berlin")
        home = door.site_home("berlin")
        write_catalog(home / "store", [*people(25, "F"), *people(15, "M", 100)])
        key = load_log_key(door.home)
        now = time.time()

        def question(query: Query, by: str, signer: Ed25519PrivateKey = key) -> bytes:
            fields = {"digest": query.digest, "query": query.model_dump(mode="json"), "by": by}
            return seal_question(Question(**fields, asked_at=now, until=now + 3600), signer)

        answering = Answering(
            Memory(home / FOLDER),
            Cohorts((home / "store",)),
            Policy(cohort="on"),
            lambda: load_identity(home),
            time.time,
            frozenset,
            logging.getLogger("test"),
        )
        answering.receive(question(_query(), "Team A"))
        answering.receive(question(_query(), "Team B"))
        answering.receive(question(_query(name="another", study="other", purpose="none"), "Team B"))
        with pytest.raises(RunError, match="does not count"):
            answering.receive(question(_query(edition=7), "Team C", Ed25519PrivateKey.generate()))
        until(lambda: len(list(answering.statements())) == 2)
        told = [open_answer(said.envelope, identity.key.public_key()) for said in answering.statements()]
        assert [answer.numbers(0) for answer in told] == [{("F",): 25, ("M",): 15}] * 2


# --- kill -9


@pytest.mark.parametrize("moment", ["before the memory", "before the log", "before it is sent"])
def test_kill_9_around_an_answer_leaves_one_answer_that_is_in_memory_and_log(tmp_path: Path, moment: str) -> None:
    query = _query()
    with open_federation(tmp_path) as federation:
        home = federation.enrol("north")
        write_catalog(home / "store", people(25, "F"))
        (home / "site.yaml").write_text("stores: [store]\npolicy: {cohort: on}\n")
        (home / "die").write_text(moment)
        command = (sys.executable, "-m", "tests.wire.dying_counter", str(home))
        process = Process(command, tmp_path / "north.log").start()
        federation.sites["north"] = process
        ask(federation.home, query, by="Team A", days=1)
        assert process.popen is not None
        assert process.popen.wait(60) == -signal.SIGKILL
        assert result(federation.home, query.digest).answers == {}
        remembered = [asked.answer for asked in Memory(home / FOLDER).questions() if asked.answer is not None]
        assert len(remembered) == (moment != "before the memory")
        write_catalog(home / "store", people(40, "F"))  # what was decided stands
        federation.agent("north", home / "store")
        until(lambda: result(federation.home, query.digest).answers, 60, "there is no answer")
        (answer,) = result(federation.home, query.digest).answers.values()
        assert answer.numbers(0) == {("F",): 25 if remembered else 40}
        (kept,) = [asked.answer for asked in Memory(home / FOLDER).questions()]
        assert kept is not None
        if remembered:
            assert [kept] == remembered
        with closing(Registry(federation.home.registry)) as registry:
            assert registry.answers(query.digest) == {"north": kept}
        shown = json.loads(locum("site", "released", "--json", "--home", home))["releases"]
        assert [one["sha256"] for one in shown if one["purpose"] == "cohort"] == [sha256_hex(kept)]
