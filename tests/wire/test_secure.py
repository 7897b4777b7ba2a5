"""Secure sums between real processes: who is lost, killed or wiped, and what the coordinator has on its disk.

The sites are real agents whose worker gives what is known (`secure_peer.py`). What a run gives is compared, to the bit,
with the sum of what the sites gave, each rounded as the site rounds and none masked.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from locum.common import build
from locum.common.build import Model
from locum.common.canonical import sha256_hex
from locum.common.errors import MEANING, Code, SiteFailure
from locum.common.messages import EVALUATE, TRAIN, UNMASK, Arrays, MaskedResult, UnmaskTask, body_of, take_apart, unpack
from locum.common.plan import Plan
from locum.common.secagg.masks import Stream
from locum.common.secagg.ring import CHUNK, Ring, Scalar, mean_error, read_scalars, write_scalars
from locum.common.secagg.roster import Context, Header, verified
from locum.common.sums import WEIGHT, weight_cap
from locum.common.tensor_files import map_tensors
from locum.server.runs import Run, all_runs
from locum.server.secure import RingTotals
from locum.server.strategies import strategy_of
from locum.site_client.fleet import from_bytes
from locum.site_client.identity import load_identity
from locum.site_client.journal import Entry, Journal
from locum.site_client.secure import SecureSite, seeded
from locum.site_client.start import credentials_of
from tests.plans import initial, plan, secured
from tests.wire import scan
from tests.wire.federation import Federation, Process, ended, events, model_of, open_federation, until
from tests.wire.harm import bits, kill_app, processes, told
from tests.wire.secure_peer import GIFTS, sums_of, update_of, value_of

SITES = tuple(GIFTS)
#: Of a model and an update that travel as blobs; those of the other plans travel inside the messages.
_CHANNELS = {"name": "Classifier", "channels": [16, 32, 64]}
#: Who is slow is waited for; who is dead is not waited for long.
_PATIENT, _SHORT = {"quorum": 3, "deadline": "3 min"}, {"quorum": 3, "deadline": "10 s"}
_CAP = {"admission__weight_cap": 4e9}

_LARGE = secured(name="large", network=_CHANNELS, participation=_PATIENT, **_CAP)
_SMALL = secured(name="small", participation=_PATIENT, **_CAP)
_LOST = secured(name="lost", rounds=3, participation=_SHORT, evaluation__every_rounds=3, **_CAP)
_VOID = secured(name="void", rounds=1, participation=_SHORT, **_CAP)
_OPEN = {
    "large": plan(name="open-large", rounds=1, network=_CHANNELS, participation=_PATIENT, **_CAP),
    "small": plan(name="open-small", rounds=1, participation=_PATIENT, **_CAP),
}
_PLANS = (_LARGE, _SMALL, _LOST, _VOID, *_OPEN.values())


# --- the federation


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    try:
        with open_federation(folder) as federation:
            for of in _PLANS:
                federation.propose(of)
                resolved = json.dumps(build.configuration(of, initial(of)))
                (folder / f"{of.digest}.json").write_text(resolved)
            for name in SITES:
                home = federation.enrol(name)
                with (home / "site.yaml").open("a") as file:
                    file.write("rehearsal: true\n")
                _start(federation, name)
            for of in _PLANS:
                for name in SITES:
                    federation.approve(name, of)
            for of in _PLANS:
                federation.ready(of, *SITES)
            yield federation
            _release(federation)
    finally:
        for number in processes(folder):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


@pytest.fixture
def federation(opened: Federation) -> Iterator[Federation]:
    yield opened
    _release(opened)
    for name in SITES:
        popen = opened.sites[name].popen
        if popen is None or popen.poll() is not None:
            _start(opened, name)
    for run in all_runs(opened.home):
        if not run.status().ended:
            run.want("stop")
            ended(run)


def _start(federation: Federation, *names: str) -> None:
    for name in names:
        command = (sys.executable, "-m", "tests.wire.secure_peer", str(federation.folder / name))
        federation.sites[name] = Process(command, federation.folder / f"{name}.log").start()


def _kill(federation: Federation, *names: str) -> None:
    for name in names:
        federation.sites[name].kill()


def _hold(federation: Federation, stage: str, *names: str) -> None:
    for name in names or SITES:
        (federation.folder / name / f"at-{stage}").unlink(missing_ok=True)
        (federation.folder / name / f"hold-{stage}").touch()


def _at(federation: Federation, stage: str, *names: str) -> None:
    """Waits until sites are at a stage."""
    for name in names or SITES:
        until((federation.folder / name / f"at-{stage}").exists, 120, f"{name} was never at {stage}")


def _release(federation: Federation, *stages: str) -> None:
    """Lets sites go on that wait at these stages, or at all."""
    for stage in stages or ("*",):
        for path in federation.folder.glob(f"?/hold-{stage}"):
            path.unlink()


def _delivered(federation: Federation, *names: str) -> None:
    """Waits until what sites had in hand has arrived."""
    for name in names or SITES:
        journal = Journal(federation.folder / name / "journal")
        until(lambda journal=journal: journal.current() is None, 120, f"{name} does not deliver")


# --- what a run should give


@dataclass(frozen=True)
class Sum:
    """The sites of a round's sum, how many the roster had, and the attempt that brought it."""

    sites: str = "abcd"
    roster: int = 4
    attempt: int = 1


def _expected(of: Plan, *sums: Sum) -> Model:
    """The model of the sums of these rounds, without masks."""
    model = initial(of)
    for number, each in enumerate(sums, start=1):
        ring, lane = Ring(of.protection.ring, each.roster, of.admission.norm_bound), (Scalar(WEIGHT, 1, 1.0),)
        cap = weight_cap(of)
        total = np.zeros(sum(tensor.size for tensor in model.values()), ring.dtype)
        weights = np.zeros(1, np.uint64)
        for site in each.sites:
            weight = GIFTS[site].cases / cap
            weights += write_scalars(lane, {WEIGHT: np.array([weight])}, each.roster)
            total += _rounded(of, ring, site, weight, update_of(site, model, number, each.attempt), _sum(number, each))
        summed = float(read_scalars(lane, weights, each.roster)[WEIGHT][0])
        model, _ = strategy_of(of).step(model, RingTotals(total, ring, model, scale=cap), summed * cap, {})
    return model


def _sum(number: int, of: Sum) -> Context:
    return Context(roster="0" * 64, step=1, purpose="train", round=number, attempt=of.attempt, model="0" * 64)


def _rounded(of: Plan, ring: Ring, site: str, weight: float, update: Arrays, context: Context) -> np.ndarray[Any, Any]:
    """A site's update in the ring."""
    stream: Stream = seeded(of, site, context)
    parts = []
    for name in sorted(update):
        flat = update[name].reshape(-1)
        for start in range(0, flat.size, CHUNK):
            part = flat[start : start + CHUNK]
            draws, out = np.empty(part.size, np.uint32), np.empty(part.size, ring.dtype)
            stream.fill(draws)
            ring.write(part, weight, draws, out)
            parts.append(out)
    return np.concatenate(parts)


def _record(run: Run) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(run.summary.read_bytes())
    return found


@dataclass(frozen=True)
class Sent:
    """A reply that a site was about to send: the digest of its bytes, and of an upload its header and body."""

    digest: str
    context: str = ""
    header: str = ""
    body: str = ""


def _sent(federation: Federation, name: str, kind: str, since: int = 0) -> list[Sent]:
    """What a site was about to send of a kind, in order."""
    paths = sorted((federation.folder / name / "sent").glob(f"*-{kind}"))
    return [_read(federation, name, path.read_bytes()) for path in paths[since:]]


def _read(federation: Federation, name: str, content: bytes) -> Sent:
    reply, key = from_bytes(content), load_identity(federation.folder / name).certificate.public_key()
    if not reply.has_content() or reply.metadata.message_type == UNMASK:
        return Sent(sha256_hex(content))
    header, _ = take_apart(reply.content, MaskedResult)
    signed = verified(header.upload, Header, key)  # type: ignore[arg-type]
    assert signed.body == body_of(reply.content)
    return Sent(sha256_hex(content), signed.context, header.upload, signed.body)


def _no_mask_was_used_twice(federation: Federation) -> None:
    """Of all that any site was ever about to send, there is one upload for each sum."""
    for name in SITES:
        bodies: dict[str, set[str]] = defaultdict(set)
        for kind in (TRAIN, EVALUATE):
            for sent in _sent(federation, name, kind):
                if sent.context:
                    bodies[sent.context].add(sent.body)
        assert bodies
        assert all(len(each) == 1 for each in bodies.values()), name


def _keys(run: Run) -> list[Sequence[str]]:
    """The sites of each set-up."""
    return [event["sites"] for event in events(run, "keys")]


# --- what the coordinator has on its disk

#: What it rightly holds: the models that it has committed.
_RIGHTLY = r"^runs/[^/]+/(checkpoints/|model\.safetensors$)"


class _Stopped:
    """A run's process stands still within this context."""

    def __init__(self, run: Run) -> None:
        self._number = int(until(run.alive, 120, "the run has no process"))

    def __enter__(self) -> int:
        os.kill(self._number, signal.SIGSTOP)
        return self._number

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._number, signal.SIGCONT)


@dataclass(frozen=True)
class Seen:
    """What of single sites, or of models on their way, was found at the coordinator: the files by what it is."""

    federation: Federation
    plan: Plan
    files: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def look(self, run: Run) -> None:
        """Looks through everything that lies there now."""
        for name, files in scan.found(self.federation.home.path, self._patterns(run), rightly=_RIGHTLY).items():
            self.files[name] |= files

    def _patterns(self, run: Run) -> dict[str, set[bytes]]:
        committed = [map_tensors(path) for path in run.folder.glob("checkpoints/round-*/model.safetensors")]
        gifts = GIFTS.values()
        return {
            "update": {
                form for site in SITES for number in (1, 2) for form in scan.run_of(float(value_of(site, number)))
            },
            "cases": {form for gift in gifts for form in scan.number(gift.cases)},
            "loss": {form for gift in gifts for form in scan.number(gift.loss)},
            "metrics": {form for gift in gifts for form in scan.number(gift.metric)},
            "model": {form for model in (initial(self.plan), *committed) for form in scan.rows_of(model)},
        }

    def run(self, between: Callable[[], None] = lambda: None) -> Run:
        """A run to its end that is looked at while all replies of training, then of evaluation, lie there."""
        _hold(self.federation, TRAIN)
        _hold(self.federation, EVALUATE)
        run = self.federation.run(self.plan)
        for kind, then in ((TRAIN, between), (EVALUATE, lambda: None)):
            _at(self.federation, kind)
            with _Stopped(run):
                _release(self.federation, kind)
                _delivered(self.federation)
                self.look(run)
            then()
        assert ended(run) == "completed"
        self.look(run)
        return run


# --- a sum


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and what was seen of it; of its first round what was asked of a, with the vault of then."""

    run: Run
    seen: Seen
    asked: Message
    vault: Path


@pytest.fixture(scope="module")
def large(opened: Federation) -> Ended:
    home, vault = opened.folder / "a", opened.folder / "vault-of-a"
    left: list[Entry | None] = []

    def copy() -> None:
        _at(opened, stage, "a")
        shutil.copytree(home / "secagg", vault)
        left.append(Journal(home / "journal").current())
        _release(opened, stage)

    stage, seen = f"unsent-{UNMASK}", Seen(opened, _LARGE)
    _hold(opened, stage, "a")
    run = seen.run(copy)
    assert left[0] is not None
    return Ended(run, seen, left[0].message, vault)


def test_a_run_gives_the_weighted_mean_of_its_sites_exactly_as_each_has_rounded_its_update(
    large: Ended, federation: Federation
) -> None:
    found = model_of(large.run)
    assert bits(found) == bits(_expected(_LARGE, Sum(), Sum()))
    start, weights = initial(_LARGE), {site: GIFTS[site].cases for site in SITES}
    error = mean_error(Ring(32, 4, _LARGE.admission.norm_bound), weight_cap(_LARGE), sum(weights.values()))
    for name, tensor in start.items():
        updates = [(weights[site], update_of(site, start, number, 1)[name]) for site in SITES for number in (1, 2)]
        exact = tensor + sum(w * u.astype(np.float64) for w, u in updates) / sum(weights.values())
        assert np.abs(found[name] - exact).max() <= 2 * error + 4 * np.finfo(np.float32).eps * np.abs(exact).max()
    for record in _record(large.run)["history"]:
        assert (record["secured"]["sites"], record["secured"]["threshold"]) == (4, 3)
        assert set(record["secured"]["uploads"]) == set(SITES)
        assert (record["weights"], record["losses"]) == ({}, dict.fromkeys(SITES))
    test = _record(large.run)["test"]
    assert test["total"] == sum(weights.values())
    assert test["per_site"] == {}
    summed = {name: np.sum([sums_of(site, _LARGE)[name] for site in SITES], axis=0) for name in _LARGE.released_metrics}
    overall = {name: build.metric_of(name).value(summed[name], 2) for name in summed}
    assert test["overall"] == pytest.approx(overall, abs=1e-9)
    _no_mask_was_used_twice(federation)


def test_a_site_gives_its_shares_for_one_set_of_survivors_and_for_no_other(
    large: Ended, federation: Federation, tmp_path: Path
) -> None:
    shutil.copytree(large.vault, tmp_path / "secagg")
    credentials = credentials_of(load_identity(federation.folder / "a"))
    site = SecureSite(tmp_path / "secagg", lambda: credentials, lambda: datetime.now(UTC))
    task, tensors = unpack(large.asked.content, UnmaskTask)

    def ask(*survivors: str) -> None:
        rows = [list(SITES).index(name) for name in survivors]
        # Of the boxes for all receivers the site's own, the first one's, come first.
        changes = {"uploads": {name: task.uploads[name] for name in survivors}, "receivers": ()}
        other = task.model_copy(update=changes)
        site.unmask(large.run.id, _LARGE, other, {"boxes": tensors["boxes"][rows]}, 3)

    ask(*SITES)  # what it has said it says again
    for survivors in ("abc", "abd", "acd"):
        with pytest.raises(SiteFailure, match="this sum was unmasked for other survivors") as refused:
            ask(*survivors)
        assert refused.value.code is Code.SECURE_SUM_REFUSED
    with pytest.raises(SiteFailure, match="not among the survivors"):
        ask(*"bcd")
    with pytest.raises(SiteFailure, match="3 are the least"):
        ask(*"ab")


# --- sites that are lost


def test_sites_that_are_killed_before_or_after_they_gave_or_lose_their_keys_take_part_again(
    federation: Federation,
) -> None:
    _hold(federation, TRAIN, "d")
    _hold(federation, UNMASK, "a")
    run = federation.run(_LOST)
    _at(federation, TRAIN, "d")
    _kill(federation, "d")  # before it gave
    _at(federation, UNMASK, "a")
    _release(federation)
    _start(federation, "d")
    _hold(federation, f"unsent-{TRAIN}", "a")
    _at(federation, f"unsent-{TRAIN}", "a")
    _hold(federation, UNMASK, "b", "c")
    _release(federation, f"unsent-{TRAIN}")
    _at(federation, UNMASK, "b", "c")
    _kill(federation, "c")  # after it gave
    _hold(federation, TRAIN, "a", "b")
    _release(federation, UNMASK)
    told(run, "committed", round=2)
    _start(federation, "c")
    _at(federation, TRAIN, "a", "b")
    shutil.rmtree(federation.folder / "b" / "secagg")
    _release(federation)
    assert ended(run) == "completed with losses"

    assert _record(run)["lost"] == {"b": [3], "d": [1]}
    assert bits(model_of(run)) == bits(_expected(_LOST, Sum("abc"), Sum(), Sum("acd")))
    refused = events(run, "refused")
    wiped = [each for each in refused if each["reason"] == MEANING[Code.SETUP_UNKNOWN][0]]
    assert [(each["round"], each["site"]) for each in wiped] == [(3, "b")]
    assert _keys(run) == [list(SITES)] * 2  # who comes back needs no new keys, who has lost his gets some
    assert _record(run)["test"]["sites"] == list(SITES)
    _no_mask_was_used_twice(federation)


def test_a_mask_is_used_once_and_a_reply_in_the_journal_arrives_as_it_is_whenever_a_site_is_killed(
    federation: Federation,
) -> None:
    sent = {name: len(_sent(federation, name, TRAIN)) for name in SITES}
    _hold(federation, f"unsent-{TRAIN}", "c")
    _hold(federation, f"unwritten-{TRAIN}", "d")
    run = federation.run(_LARGE)
    _at(federation, f"unsent-{TRAIN}", "c")
    _at(federation, f"unwritten-{TRAIN}", "d")
    reply = (federation.folder / "c" / "journal" / "current" / "reply").read_bytes()
    _kill(federation, "c", "d")
    _release(federation)
    _start(federation, "c", "d")
    assert ended(run) == "completed with losses"

    assert _record(run)["lost"] == {"d": [1]}
    assert _record(run)["history"][0]["excluded"] == {"d": MEANING[Code.SECURE_SUM_REFUSED][0]}
    assert "cannot be used: the last one was" in (federation.folder / "d" / "site.log").read_text()
    assert bits(model_of(run)) == bits(_expected(_LARGE, Sum("abc"), Sum()))
    arrived = _sent(federation, "c", TRAIN, sent["c"])[0]
    assert arrived == _read(federation, "c", reply)
    assert _record(run)["history"][0]["secured"]["uploads"]["c"] == sha256_hex(arrived.header.encode())
    assert [bool(each.context) for each in _sent(federation, "d", TRAIN, sent["d"])] == [False, True]
    _no_mask_was_used_twice(federation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (TRAIN, "2 sites gave to the sum, and 3 must"),
        (UNMASK, "the sum of 4 sites could not be unmasked: 3 must answer"),
    ],
)
def test_a_sum_of_too_few_is_void_and_the_round_trains_again_when_sites_are_back(
    kind: str, reason: str, federation: Federation
) -> None:
    _hold(federation, kind, "c", "d")
    run = federation.run(_VOID)
    _at(federation, kind, "c", "d")
    _kill(federation, "c", "d")
    until(lambda: any(each["reason"].startswith(reason) for each in events(run, "void")))
    _release(federation)
    _start(federation, "c", "d")
    assert ended(run) == "completed"

    attempt = _record(run)["history"][0]["attempt"]
    assert attempt > 1
    assert bits(model_of(run)) == bits(_expected(_VOID, Sum(attempt=attempt)))
    if kind == UNMASK:
        silent = [f"\n  {name}: no answer by the deadline" for name in "cd"]
        assert events(run, "void")[0]["reason"] == reason + "".join(silent)
    _no_mask_was_used_twice(federation)


# --- the run's process is lost


@pytest.fixture(scope="module")
def small(opened: Federation) -> tuple[Run, Seen]:
    """A run whose process is killed three times, and what was seen of it."""
    seen = Seen(opened, _SMALL)
    _hold(opened, TRAIN)
    run = opened.run(_SMALL)
    _at(opened, TRAIN)
    _hold(opened, UNMASK, "c", "d")
    _dies(seen, run, TRAIN)  # it has not yet taken the uploads that are there
    _at(opened, UNMASK, "c", "d")
    _hold(opened, EVALUATE)
    _dies(seen, run, UNMASK)  # every site has answered, and nothing is committed
    assert events(run, "committed") == []
    _at(opened, EVALUATE)
    _dies(seen, run, EVALUATE)  # committed, not evaluated
    ended(run)
    seen.look(run)
    return run, seen


def _dies(seen: Seen, run: Run, kind: str) -> None:
    """The run's process is killed when the sites' replies of a kind are there."""
    with _Stopped(run) as number:
        _release(seen.federation, kind)
        _delivered(seen.federation)
        seen.look(run)
        os.kill(number, signal.SIGKILL)


def test_a_run_whose_process_is_killed_while_it_collects_and_unmasks_and_between_rounds_gives_the_same_bits(
    small: tuple[Run, Seen], federation: Federation
) -> None:
    run, _ = small
    assert run.status().state == "completed"
    assert bits(model_of(run)) == bits(_expected(_SMALL, Sum(), Sum()))
    assert len(events(run, "committed")) == 2
    assert _keys(run) == [list(SITES)] * 4
    _no_mask_was_used_twice(federation)


@pytest.mark.slow
def test_a_coordinator_that_begins_anew_cannot_have_the_same_sum_of_fewer_sites(federation: Federation) -> None:
    _hold(federation, UNMASK, "c", "d")
    run = federation.run(_VOID)
    _at(federation, UNMASK, "c", "d")
    _delivered(federation, "a", "b")  # for all four
    kill_app(run)
    _kill(federation, "d")
    _release(federation)
    assert ended(run) == "completed with losses"

    (void,) = events(run, "void")
    assert "the sum of 3 sites could not be unmasked" in void["reason"]
    for name in "ab":
        assert "this sum was unmasked for other survivors" in (federation.folder / name / "site.log").read_text()
    assert bits(model_of(run)) == bits(_expected(_VOID, Sum("abc", roster=3, attempt=2)))
    _no_mask_was_used_twice(federation)


# --- what the coordinator has on its disk


def test_nothing_of_one_site_and_no_model_on_its_way_lies_at_the_coordinator(
    large: Ended, small: tuple[Run, Seen]
) -> None:
    assert large.seen.files == {}
    assert small[1].files == {}


@pytest.mark.parametrize("size", ["large", pytest.param("small", marks=pytest.mark.slow)])
def test_without_secure_sums_all_of_it_lies_there(size: str, federation: Federation) -> None:
    seen = Seen(federation, _OPEN[size])
    seen.run()
    assert set(seen.files) == {"update", "cases", "loss", "metrics", "model"}
    assert "superlink/state.sqlite" in seen.files["cases"] & seen.files["loss"] & seen.files["metrics"]
    way = "spool/" if size == "large" else "superlink/"
    assert any(name.startswith(way) for name in seen.files["update"])
    assert any(name.startswith(way) for name in seen.files["model"])
