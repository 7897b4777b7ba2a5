"""Sites that do harm over the real wire: each costs its own contribution, and its reason is told in words.

One federation for all tests. The runs go on at the same time, so that a module of tests takes little longer than one.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from locum.common.plan import Plan
from locum.server.gateway.live import read_live
from locum.server.runs import Run
from tests.peers import Peer, run_peers
from tests.plans import plan
from tests.wire.federation import Federation, Process, ended, events, model_of, open_federation, until
from tests.wire.harm import bits
from tests.wire.hostile import answers, start_hostile

LARGE = {"name": "Classifier", "channels": [16, 32, 64]}
#: So many that the sums of their metrics are larger than what travels inside a message.
MANY_CLASSES = [f"class-{number}" for number in range(12)]
#: What a good site's update is everywhere. `foreign` names the blob of `a`.
GOOD = {"a": 1.0, "b": 0.3}

#: Sites of the run whose tensors travel inside the messages: behaviour, and what is told of it.
INLINE: dict[str, tuple[str, str]] = {
    "nan": ("nan", "a value is not finite"),
    "shape": ("shape", "the network has ["),
    "broadcast": ("broadcast", "has shape [1"),
    "missing": ("missing", "1 tensors are missing"),
    "extra": ("extra", "1 tensors do not belong to the network, the first is 'extra'"),
    "float64": ("float64", "has dtype float64, the network has float32"),
    "heavy": ("heavy:1e9", "its weight 1e+09 is not between 0 and"),
    "weight-nan": ("weight_nan", "not a TrainResult: 1 fields are wrong"),
    "round": ("round", "an update of round 2"),
    "garbage": ("garbage", "it is no message of this protocol"),
    "another-kind": ("another_kind", "it is no message of this protocol"),
    "childless": ("childless", "it is no message of this protocol"),
    "circle": ("circle", "an unexpected error inside the agent"),
    "several": ("several", "an unexpected error inside the agent"),
    "another-node": ("another_node", "an unexpected error inside the agent"),
}
#: Those whose announcement the gateway does not even carry on.
REFUSED_AT_THE_DOOR = ("circle", "several", "another-node")

#: Sites of the run whose tensors travel as blobs.
BLOBS: dict[str, tuple[str, str]] = {
    "blob-nan": ("nan", "a value is not finite"),
    "blob-broadcast": ("broadcast", "has shape [1"),
    "blob-heavy": ("heavy:1e9", "its weight 1e+09 is not between 0 and"),
    "blob-foreign": ("foreign", "it names a blob that was not uploaded"),
    "blob-outside": ("outside", "it names a blob that was not uploaded"),
    "blob-words": ("words", "it names a blob that was not uploaded"),
    "blob-letters": ("letters", "it names a blob that was not uploaded"),
    "blob-lying": ("lying", "it names a blob that was not uploaded"),
    "blob-large": ("ten_gigabytes", "it names a blob that was not uploaded"),
    "blob-noise": ("no_tensors", "its blob is not tensors"),
}

IMPOSTOR, NEVER, SLOW = "impostor", "never", ("slow-1", "slow-2")
EARLY, LATE, CLOCK_SECONDS = "early", "late", 600
TWIN, REFUSED = "twin", "another agent with this site's key was heard in the last 15 s"

_SHIFTED_CLOCK = '''
"""Python's clocks in this process are so many seconds ahead; gRPC's core keeps the machine's, for its deadlines."""
import datetime, os, time, types

import grpc._channel

_ahead = float(os.environ["CLOCK_AHEAD"])
grpc._channel.time = types.SimpleNamespace(**vars(time))
_time, _time_ns, _datetime = time.time, time.time_ns, datetime.datetime
time.time = lambda: _time() + _ahead
time.time_ns = lambda: _time_ns() + int(_ahead * 1e9)


class _Kind(type):
    def __instancecheck__(cls, thing):
        return isinstance(thing, _datetime)


class _Shifted(_datetime, metaclass=_Kind):
    @classmethod
    def now(cls, tz=None):
        return _datetime.now(tz) + datetime.timedelta(seconds=_ahead)

    @classmethod
    def utcnow(cls):
        return _datetime.utcnow() + datetime.timedelta(seconds=_ahead)


datetime.datetime = _Shifted
'''


@dataclass(frozen=True)
class Scene:
    """The federation and its runs, which have been asked for."""

    federation: Federation
    plans: Mapping[str, Plan]
    runs: Mapping[str, Run]

    def reasons(self, kind: str) -> dict[str, str]:
        """Why each site was refused in round 1."""
        return {event["site"]: event["reason"] for event in events(self.runs[kind], "refused") if event["round"] == 1}


def _plans() -> dict[str, Plan]:
    two = {"quorum": 2, "deadline": "120 s"}
    return {
        "inline": plan(name="inline", rounds=1, participation=two),
        "blobs": plan(name="blobs", rounds=1, participation=two, network=LARGE),
        "never": plan(name="never", rounds=1, participation={"quorum": 2, "deadline": "20 s"}),
        "clock": plan(
            name="clock", rounds=1, participation={"quorum": 3, "deadline": "60 s"}, contract__classes=MANY_CLASSES
        ),
    }


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder, plans = tmp_path_factory.mktemp("misbehaviour"), _plans()
    takes_part = {
        "inline": (*GOOD, *INLINE, IMPOSTOR),
        "blobs": (*GOOD, *BLOBS),
        "never": (NEVER, *SLOW),
    }
    behaviours = {name: f"value:{value}" for name, value in GOOD.items()}
    behaviours |= {name: behaviour for name, (behaviour, _) in (INLINE | BLOBS).items()}
    behaviours |= {IMPOSTOR: "name:a", NEVER: "never"} | dict.fromkeys(SLOW, "slow:4")
    with open_federation(folder) as federation:
        for of in plans.values():
            federation.propose(of)
        for name in (*behaviours, EARLY, LATE, TWIN):
            federation.enrol(name)
        start_hostile(federation, behaviours)
        federation.peer(TWIN)
        for name, ahead in ((EARLY, CLOCK_SECONDS), (LATE, -CLOCK_SECONDS)):
            _start_shifted(federation, name, ahead)
        for kind, names in takes_part.items():
            for name in names:
                federation.approve(name, plans[kind])
        for kind, names in takes_part.items():
            federation.ready(plans[kind], *names)
        yield Scene(federation, plans, {kind: federation.run(plans[kind]) for kind in takes_part})


def _start_shifted(federation: Federation, name: str, ahead: float) -> None:
    """A peer whose Python has another clock; what is not Python in it (the TLS of gRPC) has the machine's."""
    folder = federation.folder / "shifted"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SHIFTED_CLOCK)
    command = (sys.executable, "-m", "tests.wire.peer", str(federation.folder / name), name, "value:0.3")
    environment = {"PYTHONPATH": str(folder), "CLOCK_AHEAD": str(ahead)}
    federation.sites[name] = Process(command, federation.folder / f"{name}.log", environment).start()


def _expected(of: Plan, peers: list[Peer], folder: Path) -> dict[str, bytes]:
    return bits(run_peers(of, peers, folder).model)


def _good() -> list[Peer]:
    return [Peer(name, value) for name, value in GOOD.items()]


# --- tests


def test_bad_updates_inside_messages_cost_their_sites_and_nobody_else(scene: Scene, tmp_path: Path) -> None:
    assert ended(scene.runs["inline"]) == "completed with losses"
    reasons = scene.reasons("inline")
    assert set(reasons) == set(INLINE)
    for name, (_, told) in INLINE.items():
        assert told in reasons[name], name
    assert bits(model_of(scene.runs["inline"])) == _expected(scene.plans["inline"], _good(), tmp_path)


def test_a_reply_that_is_not_as_an_agent_makes_one_does_not_pass_the_gateway(scene: Scene) -> None:
    ended(scene.runs["inline"])
    for name in REFUSED_AT_THE_DOOR:
        assert answers(scene.federation, name) == "INVALID_ARGUMENT: this is no reply as an agent makes one\n"


def test_a_site_that_takes_anothers_name_is_left_out_by_its_own(scene: Scene) -> None:
    ended(scene.runs["inline"])
    (roster,) = events(scene.runs["inline"], "roster")
    assert roster["excluded"] == {IMPOSTOR: "it calls itself 'a', which is not the name in its certificate"}


def test_bad_blobs_cost_their_sites_and_nobody_else(scene: Scene, tmp_path: Path) -> None:
    assert ended(scene.runs["blobs"]) == "completed with losses"
    reasons = scene.reasons("blobs")
    assert set(reasons) == set(BLOBS)
    for name, (_, told) in BLOBS.items():
        assert told in reasons[name], name
    assert bits(model_of(scene.runs["blobs"])) == _expected(scene.plans["blobs"], _good(), tmp_path)


def test_ten_gigabytes_and_a_digest_that_lies_are_refused_in_words_at_the_site_too(scene: Scene) -> None:
    ended(scene.runs["blobs"])
    assert answers(scene.federation, "blob-large").startswith("INVALID_ARGUMENT: a blob of 10737418240 bytes; the run ")
    lying = "INVALID_ARGUMENT: the blob is not what its digest says; it was removed\n"
    assert answers(scene.federation, "blob-lying") == lying


def test_a_reply_that_is_announced_and_never_comes_keeps_nobody_waiting(scene: Scene, tmp_path: Path) -> None:
    run = scene.runs["never"]
    assert ended(run) == "completed with losses"
    assert [event["attempt"] for event in events(run, "round")] == [1]
    assert "announced" in answers(scene.federation, NEVER)
    peers = [Peer(name) for name in SLOW]
    assert bits(model_of(run)) == _expected(scene.plans["never"], peers, tmp_path)


@pytest.fixture(scope="module")
def copied(scene: Scene) -> Path:
    """The folder of a second agent with a site's key, which was refused while the first was there, and is not now."""
    federation = scene.federation
    home = federation.folder / "copy" / TWIN
    shutil.copytree(federation.folder / TWIN, home)
    command = (sys.executable, "-m", "tests.wire.peer", str(home), TWIN, "")
    federation.sites["copy"] = Process(command, federation.folder / "copy.log").start()
    until(lambda: REFUSED in _log(home), 60, "the second agent was not refused")
    assert not _connected(home)
    federation.sites[TWIN].kill()
    until(lambda: _connected(home), 90, "it did not take over")
    return home


def _log(home: Path) -> str:
    return (home / "site.log").read_text()


def _connected(home: Path) -> bool:
    """Whether an agent was connected after it was refused."""
    return "connected to" in _log(home).partition(REFUSED)[2]


def test_two_agents_with_one_key_are_one_site_and_clocks_ten_minutes_off_cost_nothing(
    scene: Scene, copied: Path, tmp_path: Path
) -> None:
    federation, of = scene.federation, scene.plans["clock"]
    for source in (federation.folder / TWIN / "proposals", federation.folder / f"{of.digest}.safetensors"):
        _copy(source, copied)
    for name in ("a", EARLY, LATE, TWIN):
        federation.approve(name, of)
    _copy(federation.folder / TWIN / "approvals", copied)
    federation.ready(of, "a", EARLY, LATE, TWIN)
    run = federation.run(of)
    assert ended(run) == "completed"
    peers = [Peer("a", 1.0), Peer(EARLY, 0.3), Peer(LATE, 0.3), Peer(TWIN)]
    assert bits(model_of(run)) == _expected(of, peers, tmp_path)
    (evaluated,) = events(run, "evaluated")
    assert set(evaluated["per_site"]) == {"a", EARLY, LATE, TWIN}


def _copy(source: Path, copied: Path) -> None:
    """What lies in the folder of the first agent, or beside it, for the second one."""
    if source.is_dir():
        shutil.copytree(source, copied / source.name, dirs_exist_ok=True)
    else:
        shutil.copy(source, copied.parent)


def test_a_clock_that_is_off_is_told_at_the_site_and_at_the_coordinator(scene: Scene) -> None:
    for name, ahead in ((EARLY, CLOCK_SECONDS), (LATE, -CLOCK_SECONDS)):
        said = f"this machine's clock is {ahead} s off the coordinator's; set it"
        until(lambda name=name, said=said: said in _log(scene.federation.folder / name), 30, said)
        assert abs(read_live(scene.federation.home.live)[name].clock_offset - ahead) < 60
