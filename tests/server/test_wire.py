"""The way to real hospitals under the real engine, over a real registry and spool; the sites are in this process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from flwr.app import RecordDict

from locum.common.fab import build_bundle
from locum.common.identity import load_ec_key
from locum.common.messages import Description, MessageError
from locum.common.plan import Plan
from locum.server.admission import reasons
from locum.server.checkpoints import Checkpoints
from locum.server.gateway.spool import Spool
from locum.server.home import Home, read_config
from locum.server.records import Events
from locum.server.registry import Registry
from locum.server.rounds import Finished, open_engine, run
from locum.server.runs import Run, create_run
from locum.server.wire import Incoming, Wire
from locum.simulations.engines.local import LocalGrid
from tests.peers import Answer, Peer
from tests.plans import initial, plan
from tests.readiness import ready
from tests.server.coordinator import approve, approved_run, enrol, go_on, key_of, new_home, say


def _open(home: Home, asked: Run) -> Wire:
    return Wire(home, read_config(home), run=asked, events=Events(asked.events))


def _connect(home: Home, nodes: Mapping[int, str]) -> None:
    """Notes the sites' nodes, as the gateway does when they connect, and that they are heard."""
    with closing(Registry(home.registry)) as registry:
        for node, site in nodes.items():
            registry.set_node(site, node)
    say(home, **{site: {} for site in nodes.values()})


def _go(home: Home, asked: Run, peers: Mapping[int, Peer]) -> Finished:
    """Runs the engine over the wire's link; no gateway is there, so replies are pulled without hints."""
    for peer in peers.values():
        peer.ready = partial(_ready, home, asked, peer)
    grid = LocalGrid(peers, build_bundle(asked.plan), len(peers))  # type: ignore[arg-type]
    checkpoints, events = Checkpoints(asked.checkpoints, asked.plan), Events(asked.events)
    try:
        return run(open_engine(asked.plan, grid, checkpoints, events, _open(home, asked)))
    finally:
        grid.close()


def _ready(home: Home, asked: Run, peer: Peer, plan: Plan) -> str:
    """What a peer says of its data, signed with the key that it is enrolled with."""
    return str(ready(plan, peer.site, load_ec_key(key_of(home, peer.site)), asked.id).envelope)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return new_home(tmp_path / "coordinator")


def _plan(**changes: object) -> Plan:
    return plan(name="wire", participation={"quorum": 2, "deadline": "20 s"}, **changes)


def test_a_site_that_was_revoked_while_no_process_worked_is_lost_and_the_run_goes_on(home: Home) -> None:
    asked = approved_run(home, _plan(rounds=3), "abc")
    go_on(asked, [Peer(name) for name in "abc"], rounds=1)
    _connect(home, {2: "a", 3: "b", 4: "c"})
    with closing(Registry(home.registry)) as registry:
        registry.revoke("c")
    finished = _go(home, asked, {2: Peer("a"), 3: Peer("b")})
    assert finished.status == "completed with losses"
    assert finished.losses == {"c": [2, 3]}
    assert finished.history[1].excluded == {"c": "its certificate was revoked"}


class _Moving(Peer):
    """A site that enrols again while it trains round 1: it has another node from then on."""

    def __init__(self, site: str, home: Home, digest: str) -> None:
        super().__init__(site)
        self.home, self.digest = home, digest

    def train(self, plan: Plan, content: RecordDict) -> Answer:
        if not self.trained:
            with closing(Registry(self.home.registry)) as registry:
                registry.revoke(self.site)
            enrol(self.home, self.site)
            approve(self.home, self.digest, self.site)
            with closing(Registry(self.home.registry)) as registry:
                registry.set_node(self.site, 9)
        return super().train(plan, content)


def test_a_site_that_enrols_again_in_mid_run_is_asked_at_its_new_node(home: Home) -> None:
    asked = approved_run(home, _plan(rounds=3), "ab")
    _connect(home, {2: "a", 3: "b"})
    before, after = _Moving("b", home, asked.plan.digest), Peer("b")
    finished = _go(home, asked, {2: Peer("a"), 3: before, 9: after})
    assert (before.trained, after.trained) == ([1], [2, 3])
    assert finished.status == "completed"


def test_a_site_that_has_enrolled_again_and_is_not_back_is_away_in_words(home: Home) -> None:
    wire = _open(home, approved_run(home, _plan(), "ab"))
    _connect(home, {2: "a"})
    assert wire.away("ab") == {"b": "it has enrolled again, and has not connected since"}
    assert wire.current("ab") == {"a": 2, "b": 0}


def test_a_site_that_the_run_is_without_is_not_asked(home: Home) -> None:
    of = approved_run(home, _plan(), "abc").plan
    _connect(home, {2: "a", 3: "b", 4: "c"})
    wire = _open(home, create_run(home, of, sites="ab", without="c"))
    assert wire.nodes([2, 3, 4]) == {2: "a", 3: "b"}


def test_a_stranger_who_resolves_a_plan_differently_does_not_stop_a_run_that_has_begun(home: Home) -> None:
    class Other(Peer):
        def description(self, plan: Plan) -> Description:
            found = super().description(plan)
            return found.model_copy(update={"configuration": {**found.configuration, "torch": "9.9\x1b[2J" * 99}})

    asked = approved_run(home, _plan(rounds=2), "abc")
    go_on(asked, [Peer("a"), Peer("b")], rounds=1)
    _connect(home, {2: "a", 3: "b", 4: "c"})
    finished = _go(home, asked, {2: Peer("a"), 3: Peer("b"), 4: Other("c")})
    assert reasons(finished.roster.excluded) == {"c": "was not there when the run began"}
    assert finished.losses == {}


@pytest.mark.parametrize("left", [(), ("down",)])
def test_whatever_a_process_before_has_left_the_spool_knows_what_the_run_allows(
    home: Home, left: tuple[str, ...]
) -> None:
    asked = create_run(home, _plan())
    for name in left:
        (home.spool / asked.id / name).mkdir(parents=True)
    _open(home, asked).outgoing(initial(asked.plan))
    assert Spool(home.spool).limit(asked.id).plan == asked.plan.digest


@pytest.mark.parametrize("digest", ["\U0001d7ce" * 64, "A" * 64, "../" * 21 + "a", "0" * 63, "\0" * 64, ""])
def test_a_reply_that_names_no_blob_is_a_bad_message_and_no_fault_of_the_disk(tmp_path: Path, digest: str) -> None:
    with pytest.raises(MessageError, match="was not uploaded"):
        Incoming(tmp_path).fetch({"sha256": digest, "size": 1})
