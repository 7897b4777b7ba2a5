"""A site whose data do not meet the contract is not selected, whatever it or the coordinator says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from locum.common.cli import main
from locum.common.envelope import open_readiness
from locum.common.errors import Code, RunError
from locum.common.identity import certified_key, new_key, utc_now
from locum.common.log.entries import ReadinessEntry, RosterEntry
from locum.common.messages import LOCAL, Description
from locum.common.plan import Plan
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub
from locum.server.home import Home
from locum.server.link import Direct
from locum.server.proposals import propose
from locum.server.readiness import newest
from locum.server.rounds import Finished
from locum.simulations.institutions import credentials_of, found_federation
from locum.site_client.identity import SiteIdentity
from tests.peers import Peer, run_peers
from tests.plans import plan
from tests.readiness import ready
from tests.server.door import Door, open_door
from tests.server.test_log import of_kind


class Stating(Peer):
    """A peer with a key, which says of its data what a test wants; `lies` of the statement, or another key."""

    def __init__(self, site: str, folder: Path, failing: tuple[str, ...] = (), /, **lies: Any) -> None:
        super().__init__(site)
        self.failing, self.lies = failing, dict(lies)
        self.key = self.lies.pop("key", credentials_of(site, found_federation(folder)).key)
        self.ready = self._said

    def _said(self, of: Plan) -> str:
        run = self.lies.get("run", LOCAL)
        lies = {name: value for name, value in self.lies.items() if name != "run"}
        return str(ready(of, self.site, self.key, run, self.failing, **lies).envelope)

    def description(self, plan: Plan) -> Description:
        return super().description(plan).model_copy(update={"able": not self.failing})


def _run(folder: Path, *others: Peer) -> Finished:
    return run_peers(plan(rounds=1), [Stating("a", folder), Stating("b", folder), *others], folder)


def test_a_site_that_says_that_a_clause_is_not_met_is_left_out_with_one_word(tmp_path: Path) -> None:
    finished = _run(tmp_path, Stating("c", tmp_path, ("spacing", "strata")))
    assert set(finished.roster.nodes) == {"a", "b"}
    assert finished.roster.excluded["c"].word == "NOT_READY"
    assert finished.status == "completed with losses"
    (roster,) = of_kind(tmp_path / "log", RosterEntry)
    assert roster.excluded == {"c": "NOT_READY"}


def test_what_each_site_said_stands_in_the_log_before_the_roster_as_it_was_signed(tmp_path: Path) -> None:
    _run(tmp_path, Stating("c", tmp_path, ("modality",)))
    entries = of_kind(tmp_path / "log", ReadinessEntry)
    assert [entry.site for entry in entries] == ["a", "b", "c"]
    link = Direct(Home(tmp_path))
    for entry in entries:
        certificate = link.certificate(entry.site)
        assert certificate is not None
        said = open_readiness(entry.statement.encode(), certified_key(certificate))
        assert (said.site, said.run, said.plan) == (entry.site, LOCAL, entry.plan)
    assert [e.site for e in entries if not open_readiness(
        e.statement.encode(), certified_key(link.certificate(e.site))).ready] == ["c"]  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    ("lies", "words"),
    [
        ({"key": new_key()}, "does not count"),
        ({"plan": "0" * 64}, "about something else"),
        ({"run": "another"}, "about something else"),
        ({"run": None}, "about something else"),
        ({"site": "b"}, "about something else"),
    ],
)
def test_a_statement_that_is_not_the_sites_own_of_this_run_and_plan_leaves_it_out(
    lies: dict[str, Any], words: str, tmp_path: Path
) -> None:
    finished = _run(tmp_path, Stating("c", tmp_path, **lies))
    assert words in finished.roster.excluded["c"].reason
    assert finished.roster.excluded["c"].word == "NOT_ADMITTED"
    assert [entry.site for entry in of_kind(tmp_path / "log", ReadinessEntry)] == ["a", "b"]


def test_a_site_with_a_certificate_that_says_nothing_of_its_data_is_left_out(tmp_path: Path) -> None:
    silent = Stating("c", tmp_path)
    silent.ready = None
    finished = _run(tmp_path, silent)
    assert finished.roster.excluded["c"].reason == "it does not say whether its data meet the contract"


def test_a_site_that_calls_itself_able_beside_a_statement_that_it_is_not_is_left_out(tmp_path: Path) -> None:
    class Bold(Stating):
        def description(self, plan: Plan) -> Description:
            return super().description(plan).model_copy(update={"able": True})

    finished = _run(tmp_path, Bold("c", tmp_path, ("consent",)))
    assert finished.roster.excluded["c"].code is Code.NOT_READY
    assert finished.roster.excluded["c"].reason == "the contract is not met: consent"


def test_too_few_sites_whose_data_are_ready_begin_no_run(tmp_path: Path) -> None:
    peers = [Stating("a", tmp_path), Stating("b", tmp_path, ("modality",))]
    with pytest.raises(RunError, match="1 sites can take part"):
        run_peers(plan(rounds=1), peers, tmp_path)


def test_a_site_whose_data_have_ceased_to_meet_the_contract_is_not_in_the_run_that_goes_on(tmp_path: Path) -> None:
    class Dying(Stating):
        def train(self, plan: Plan, content: Any) -> Any:
            if self.trained:
                raise SystemExit
            return super().train(plan, content)

    first = [Stating("a", tmp_path), Stating("b", tmp_path), Dying("c", tmp_path)]
    with pytest.raises(SystemExit):
        run_peers(plan(rounds=3), first, tmp_path)
    later = Stating("c", tmp_path, ("least_patients",))
    finished = run_peers(plan(rounds=3), [Stating("a", tmp_path), Stating("b", tmp_path), later], tmp_path)
    assert later.trained == []
    assert set(finished.roster.nodes) == {"a", "b"}
    rosters = of_kind(tmp_path / "log", RosterEntry)
    assert [(entry.sites, entry.excluded) for entry in rosters] == [
        (("a", "b", "c"), {}),
        (("a", "b"), {"c": "NOT_READY"}),
    ]


# --- what was said before any run


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_door(tmp_path_factory.mktemp("door") / "coordinator") as opened:
        yield opened


def _state(door: Door, caller: SiteIdentity, envelope: bytes) -> object:
    with door.channel(caller) as channel:
        try:
            return RegistryStub(channel).State(pb.StateRequest(envelope=envelope), timeout=20)
        except grpc.RpcError as error:
            return error.code()


def test_a_statement_that_was_let_go_before_any_run_is_kept_and_the_newest_counts(
    door: Door, capsys: pytest.CaptureFixture[str]
) -> None:
    of, north, silent = plan(name="kept"), door.enrol("north"), door.enrol("silent")
    propose(door.home, of, "team")
    now = utc_now().timestamp()
    told = [ready(of, "north", north.key, None, ("spacing",), at=now), ready(of, "north", north.key, None, at=now + 1),
            ready(of, "north", north.key, None, ("consent",), at=now - 1)]  # fmt: skip
    for one in told:
        assert _state(door, north, str(one.envelope).encode()) == pb.StateReply()
    assert newest(door.home, door.registry, of.digest)["north"] == told[1].said
    assert main(["readiness", of.digest[:12], "--home", str(door.home.path)]) in {None, 0}
    out = capsys.readouterr().out
    assert "north  ready" in out
    assert "training patients: 40 or more" in out
    assert "nothing was said by: silent" in out
    assert main(["readiness", of.digest, "--home", str(door.home.path), "--json"]) in {None, 0}
    assert json.loads(capsys.readouterr().out)["silent"] == [silent.site]


def test_who_is_not_ready_is_shown_with_the_clauses_that_fail(door: Door, capsys: pytest.CaptureFixture[str]) -> None:
    of, identity = plan(name="failing"), door.enrol("riverside")
    propose(door.home, of, "team")
    said = ready(of, "riverside", identity.key, None, ("modality", "least_patients"))
    assert _state(door, identity, str(said.envelope).encode()) == pb.StateReply()
    assert main(["readiness", of.digest, "--home", str(door.home.path)]) in {None, 0}
    assert "riverside  NOT ready: modality, least_patients" in capsys.readouterr().out


def test_what_is_not_the_sites_own_word_on_a_proposed_plan_before_a_run_is_refused(door: Door) -> None:
    of, identity = plan(name="refused"), door.enrol("st-anne")
    wrong, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    assert _state(door, identity, str(ready(of, "st-anne", identity.key, None).envelope).encode()) == missing
    propose(door.home, of, "team")
    late = utc_now().timestamp() + 90_000
    for said, code in (
        (ready(of, "st-anne", new_key(), None), wrong),
        (ready(of, "another", identity.key, None), grpc.StatusCode.PERMISSION_DENIED),
        (ready(of, "st-anne", identity.key, "run-1"), wrong),
        (ready(of, "st-anne", identity.key, None, at=late), wrong),
    ):
        assert _state(door, identity, str(said.envelope).encode()) == code
    assert _state(door, identity, b"{}") == wrong
    assert door.registry.readiness(of.digest) == {}


def test_a_statement_under_a_key_that_the_site_has_no_more_is_not_shown(door: Door) -> None:
    of, identity = plan(name="gone"), door.enrol("lakeview")
    propose(door.home, of, "team")
    said = ready(of, "lakeview", identity.key, None)
    assert _state(door, identity, str(said.envelope).encode()) == pb.StateReply()
    assert "lakeview" in newest(door.home, door.registry, of.digest)
    door.registry.revoke("lakeview")
    assert "lakeview" not in newest(door.home, door.registry, of.digest)
