"""Over real connections: sites vouch for the log of a run, and a coordinator that shows two histories is found out."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from locum.common.log.entries import EndEntry, RoundEntry, read_entry
from locum.common.log.note import NoteError, check_cosignature, opened, with_lines
from locum.common.log.origins import site_origin
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub, add_RegistryServicer_to_server
from locum.server.authority import load_log_certificate
from locum.server.gateway.peers import site_peer
from locum.server.gateway.registry import Federation as Registered
from locum.server.gateway.registry import RegistryService
from locum.server.home import Home
from locum.server.log import FederationLog, open_log
from locum.site_client.identity import SiteIdentity
from locum.site_client.releases import begin_releases
from locum.site_client.start import credentials_of
from locum.site_client.witness import ForkedError, Witness, over
from tests.plans import plan
from tests.server.door import Door, open_door
from tests.wire.federation import Federation, ended, locum, open_federation, until

SITES = ("a", "b", "c")


def test_every_site_vouches_for_the_end_of_a_run_and_none_for_another_history_of_it(tmp_path: Path) -> None:
    of = plan(rounds=2, name="witnessed")
    with open_federation(tmp_path) as federation:
        federation.propose(of)
        for name in SITES:
            federation.peer(name)
        for name in SITES:
            federation.approve(name, of)
        federation.ready(of, *SITES)
        run = federation.run(of)
        assert ended(run) == "completed"
        log = open_log(federation.home)
        until(lambda: _vouched(log) == dict.fromkeys(SITES, log.store.size), 60, "not every site has signed")
        _check_entries(log, run.id)
        told = json.loads(locum("server", "log", "--json", "--home", federation.home.path))
        assert told["witnesses"] == {name: {"size": log.store.size, "behind": 0} for name in SITES}

        federation.server.stop()
        true = tmp_path / "true"
        federation.home.log.rename(true)
        forged = _forge(federation.home, true)
        federation.start()
        for name in SITES:
            until(lambda name=name: b"NOT WHAT IT WAS" in _site_log(federation, name), 90, f"{name} has not noticed")
        assert _vouched(forged) == {}
        status = json.loads(locum("site", "status", "--json", "--home", tmp_path / "a"))["log"]
        assert "another history" in status["problem"]
        assert len(status["refused"]) == 1

        federation.server.stop()
        shutil.rmtree(federation.home.log)
        true.rename(federation.home.log)
        federation.start()
        log = open_log(federation.home)
        federation.propose(plan(rounds=3, name="another"))  # so the log grows
        until(lambda: _vouched(log) == dict.fromkeys(SITES, log.store.size), 90, "the true log is not signed again")


def _vouched(log: FederationLog) -> dict[str, int]:
    return {name.rpartition("/")[2]: size for name, size in log.witnesses().items()}


def _site_log(federation: Federation, name: str) -> bytes:
    return (federation.folder / name / "site.log").read_bytes()


def _check_entries(log: FederationLog, run: str) -> None:
    """What happened is there, each thing once, in order."""
    words = []
    for leaf in log.store.entries():
        entry = read_entry(leaf)
        assert getattr(entry, "run", run) == run
        words.append(" ".join(str(getattr(entry, name, "")) for name in ("kind", "event", "round", "fold")).split())
    kinds = [" ".join(word) for word in words]
    assert kinds[:2] == ["federation", "proposal"]
    assert sorted(kinds[2:8]) == ["approval"] * 3 + ["site enrolled"] * 3
    begun = ["run started", *["readiness"] * 3, "roster 0"]
    rounds = ["round 1", "metrics 1 validation", "round 2", "metrics 2 validation", "metrics 2 test"]
    assert kinds[8:] == [*begun, *rounds, "end 2"]


def _forge(home: Home, true: Path) -> FederationLog:
    """The same log, but that another model came out, and longer: signed by the coordinator, who has the key."""
    entries = [read_entry(line) for line in (true / "entries.jsonl").read_bytes().replace(b" \n", b"\n").splitlines()]
    log = open_log(home)
    with_other = [
        entry.model_copy(update={"model": "ab" * 32}) if isinstance(entry, RoundEntry | EndEntry) else entry
        for entry in entries
    ]
    shutil.rmtree(home.log)
    home.log.mkdir()
    log = replace(log, store=type(log.store)(home.log, log.store.origin))
    log.append(*with_other, with_other[-1])
    log.seal()
    return log


# --- a coordinator with two faces


class _TwoFaced(RegistryService):
    """A gateway that shows each site the log that is meant for it."""

    def __init__(self, faces: Mapping[str, Registered]) -> None:
        super().__init__(next(iter(faces.values())))
        self.faces = dict(faces)

    def Witness(self, request: pb.WitnessRequest, context: grpc.ServicerContext) -> pb.WitnessReply:  # noqa: N802
        peer = site_peer(context, self._federation.registry)
        return RegistryService(self.faces[peer.name]).Witness(request, context)


def _look(door: Door, identity: SiteIdentity) -> int:
    """As an agent looks that has just started."""
    home = door.site_home(identity.site)
    releases = begin_releases(home / "log", "Test federation", identity.site)
    looking = Witness(
        home / "witness", lambda: credentials_of(identity), lambda: datetime.now(UTC), logging.getLogger("test")
    )
    with door.channel(identity) as channel:
        return looking.look(over(RegistryStub(channel), releases))


def test_two_sites_that_are_shown_two_histories_find_out_as_soon_as_one_sees_what_the_other_saw(tmp_path: Path) -> None:
    services: list[_TwoFaced] = []

    def two_faced(server: grpc.Server, door: Door) -> None:
        face = Registered(
            door.registry, door.authority, load_log_certificate(door.home), door.live, open_log(door.home)
        )
        services.append(_TwoFaced({"berlin": face, "paris": face}))
        add_RegistryServicer_to_server(services[0], server)

    with open_door(tmp_path / "coordinator", (two_faced,)) as door:
        berlin, paris = door.enrol("berlin"), door.enrol("paris")
        service = services[0]
        one = service.faces["berlin"].log
        copied = Home(tmp_path / "another")
        copied.path.mkdir()
        for name in ("authority", "log"):
            shutil.copytree(door.home.path / name, copied.path / name)
        other = open_log(copied)
        for log, site in ((one, "berlin"), (other, "paris")):  # each is shown a history of its own
            entry = read_entry(log.store.entry(1))
            log.append(entry.model_copy(update={"site": site}))
            log.seal()
        service.faces["paris"] = replace(service.faces["paris"], log=other)
        assert (_look(door, berlin), _look(door, paris)) == (4, 4)
        (line,) = [line.text() for line in opened(other.store.latest() or "")[1] if "paris" in line.name]
        merged = with_lines(one.store.latest() or "", [line])
        with pytest.raises(NoteError, match="not of this checkpoint"):
            check_cosignature(merged, site_origin("Test federation", "paris"), paris.key.public_key())
        service.faces |= {"berlin": service.faces["paris"], "paris": service.faces["berlin"]}
        for identity in (berlin, paris):
            with pytest.raises(ForkedError, match="another history"):
                _look(door, identity)
        assert (_vouched(one), _vouched(other)) == ({"berlin": 4}, {"paris": 4})


def test_a_line_that_is_not_the_sites_own_signature_of_a_checkpoint_is_not_kept(tmp_path: Path) -> None:
    with open_door(tmp_path / "coordinator") as door:
        berlin, paris = door.enrol("berlin"), door.enrol("paris")
        log = open_log(door.home)
        log.seal()
        _look(door, berlin)
        note = log.store.latest() or ""
        (own, line) = (text.text() for text in opened(note)[1])
        for identity, size, cosignature in (
            (paris, 3, line.encode()),  # another site's
            (berlin, 2, line.encode()),  # of no checkpoint
            (berlin, 3, own.encode()),  # the log's own
            (berlin, 3, b"\xff"),
            (berlin, 3, b"hello"),
            (berlin, 3, line.encode() * 100),
        ):
            request = pb.WitnessRequest(size=size, cosignature=cosignature)
            with door.channel(identity) as channel, pytest.raises(grpc.RpcError) as caught:
                RegistryStub(channel).Witness(request, timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert log.store.latest() == note
