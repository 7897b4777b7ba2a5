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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
from locum.site_client.journal import Journal
from locum.site_client.secure import SecureSite, seeded
from locum.site_client.start import credentials_of
from tests.plans import initial, plan, secured
from tests.wire import scan
from tests.wire.federation import Federation, Process, ended, events, model_of, open_federation, until
from tests.wire.harm import bits, kill_app, processes, told
from tests.wire.secure_peer import GIFTS, sums_of, update_of, value_of

SITES = tuple(GIFTS)
LARGE = {"name": "Classifier", "channels": [16, 32, 64]}
#: Loads of this machine are waited for, sites that are dead are not waited for long.
_PATIENT, _SHORT = {"quorum": 3, "deadline": "3 min"}, {"quorum": 3, "deadline": "12 s"}
_CAP = {"admission__weight_cap": 4e9}

_MEAN = secured(name="mean", network=LARGE, participation=_PATIENT, **_CAP)
_LOST = secured(name="lost", rounds=3, participation=_SHORT, evaluation__every_rounds=3, **_CAP)
_DISK = secured(name="disk", participation=_PATIENT, network=LARGE, **_CAP)
_PHASES = secured(name="phases", participation=_PATIENT, **_CAP)
_SECOND = secured(name="second", rounds=1, participation=_SHORT, **_CAP)
_VOID = secured(name="void", rounds=1, participation=_SHORT, **_CAP)
_SEEN = {size: secured(name=f"seen-{size}", rounds=1, participation=_PATIENT, **changes, **_CAP)
         for size, changes in (("small", {}), ("large", {"network": LARGE}))}  # fmt: skip
_OPEN = {size: plan(name=f"open-{size}", rounds=1, participation=_PATIENT, **changes, **_CAP)
         for size, changes in (("small", {}), ("large", {"network": LARGE}))}  # fmt: skip
_PLANS = (_MEAN, _LOST, _DISK, _PHASES, _SECOND, _VOID, *_SEEN.values(), *_OPEN.values())


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


# --- a sum


@dataclass(frozen=True)
class Replayed:
    """A run that has ended, and of its first round what was asked of the site a, with the vault as it was then."""

    run: Run
    vault: Path
    asked: Message


@pytest.fixture(scope="module")
def mean(opened: Federation) -> Replayed:
    home, vault = opened.folder / "a", opened.folder / "vault-of-a"
    _hold(opened, f"unsent-{UNMASK}", "a")
    run = opened.run(_MEAN)
    _at(opened, f"unsent-{UNMASK}", "a")
    shutil.copytree(home / "secagg", vault)
    left = Journal(home / "journal").current()
    assert left is not None
    _release(opened)
    assert ended(run) == "completed"
    return Replayed(run, vault, left.message)


def test_a_run_gives_the_weighted_mean_of_its_sites_exactly_as_each_has_rounded_its_update(
    mean: Replayed, federation: Federation
) -> None:
    found = model_of(mean.run)
    assert bits(found) == bits(_expected(_MEAN, Sum(), Sum()))
    start, weights = initial(_MEAN), {site: GIFTS[site].cases for site in SITES}
    error = mean_error(Ring(32, 4, _MEAN.admission.norm_bound), weight_cap(_MEAN), sum(weights.values()))
    for name, tensor in start.items():
        updates = [(weights[site], update_of(site, start, number, 1)[name]) for site in SITES for number in (1, 2)]
        exact = tensor + sum(w * u.astype(np.float64) for w, u in updates) / sum(weights.values())
        assert np.abs(found[name] - exact).max() <= 2 * error + 4 * np.finfo(np.float32).eps * np.abs(exact).max()
    for record in _record(mean.run)["history"]:
        assert (record["secured"]["sites"], record["secured"]["threshold"]) == (4, 3)
        assert set(record["secured"]["uploads"]) == set(SITES)
        assert (record["weights"], record["losses"]) == ({}, dict.fromkeys(SITES))
    test = _record(mean.run)["test"]
    assert test["total"] == sum(weights.values())
    assert test["per_site"] == {}
    summed = {name: sum(sums_of(site, _MEAN)[name] for site in SITES) for name in _MEAN.released_metrics}
    overall = {name: build.metric_of(name).value(summed[name], 2) for name in summed}
    assert test["overall"] == pytest.approx(overall, abs=1e-9)
    _no_mask_was_used_twice(federation)


def test_a_site_gives_its_shares_for_one_set_of_survivors_and_for_no_other(
    mean: Replayed, federation: Federation, tmp_path: Path
) -> None:
    shutil.copytree(mean.vault, tmp_path / "secagg")
    credentials = credentials_of(load_identity(federation.folder / "a"))
    site = SecureSite(tmp_path / "secagg", lambda: credentials, lambda: datetime.now(UTC))
    task, tensors = unpack(mean.asked.content, UnmaskTask)

    def ask(*survivors: str) -> None:
        rows = [list(SITES).index(name) for name in survivors]
        other = task.model_copy(update={"uploads": {name: task.uploads[name] for name in survivors}})
        site.unmask(mean.run.id, _MEAN, other, {"boxes": tensors["boxes"][rows]}, 3)

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
    run = federation.run(_DISK)
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
    assert bits(model_of(run)) == bits(_expected(_DISK, Sum("abc"), Sum()))
    arrived = _sent(federation, "c", TRAIN, sent["c"])[0]
    assert arrived == _read(federation, "c", reply)
    assert _record(run)["history"][0]["secured"]["uploads"]["c"] == sha256_hex(arrived.header.encode())
    assert [bool(each.context) for each in _sent(federation, "d", TRAIN, sent["d"])] == [False, True]
    _no_mask_was_used_twice(federation)


def test_a_sum_that_cannot_be_unmasked_is_void_and_the_round_trains_again_when_sites_are_back(
    federation: Federation,
) -> None:
    _hold(federation, TRAIN, "c", "d")
    run = federation.run(_VOID)
    _at(federation, TRAIN, "c", "d")
    _kill(federation, "c", "d")  # too few give
    told(run, "void", reason="2 sites gave to the sum, and 3 must")
    _release(federation)
    _hold(federation, UNMASK, "c", "d")
    _start(federation, "c", "d")
    _at(federation, UNMASK, "c", "d")
    _kill(federation, "c", "d")  # all give, too few answer
    until(lambda: any("could not be unmasked: 3 must answer" in each["reason"] for each in events(run, "void")))
    _release(federation)
    _start(federation, "c", "d")
    assert ended(run) == "completed"

    attempt = _record(run)["history"][0]["attempt"]
    assert attempt >= 3
    assert bits(model_of(run)) == bits(_expected(_VOID, Sum(attempt=attempt)))
    reasons = [each["reason"] for each in events(run, "void")]
    assert "\n  c: no answer by the deadline\n  d: no answer by the deadline" in "".join(reasons)
    _no_mask_was_used_twice(federation)


# --- the run's process is lost


def test_the_runs_process_is_killed_while_it_collects_and_unmasks_and_between_rounds_and_the_bits_stay(
    federation: Federation,
) -> None:
    _hold(federation, TRAIN, "a")
    run = federation.run(_PHASES)
    _at(federation, TRAIN, "a")
    _delivered(federation, "b", "c", "d")
    kill_app(run)  # it has three uploads of four
    _hold(federation, UNMASK, "c", "d")
    _release(federation, TRAIN)
    _at(federation, UNMASK, "c", "d")
    _hold(federation, EVALUATE, "a")
    with _Stopped(run) as number:
        _release(federation, UNMASK)
        _delivered(federation)
        os.kill(number, signal.SIGKILL)  # every site has answered, and nothing is committed
    assert events(run, "committed") == []
    _at(federation, EVALUATE, "a")
    kill_app(run)  # committed, not evaluated
    _release(federation)
    assert ended(run) == "completed"

    assert bits(model_of(run)) == bits(_expected(_PHASES, Sum(), Sum()))
    assert len(events(run, "committed")) == 2
    assert _keys(run) == [list(SITES)] * 4
    _no_mask_was_used_twice(federation)


def test_a_coordinator_that_begins_anew_cannot_have_the_same_sum_of_fewer_sites(federation: Federation) -> None:
    _hold(federation, UNMASK, "c", "d")
    run = federation.run(_SECOND)
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
    assert bits(model_of(run)) == bits(_expected(_SECOND, Sum("abc", roster=3, attempt=2)))
    _no_mask_was_used_twice(federation)


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


# --- what the coordinator has on its disk

#: What the coordinator rightly holds: the models that it has committed.
_RIGHTLY = r"^runs/[^/]+/(checkpoints/|model\.safetensors$)"


def _patterns(of: Plan, run: Run) -> dict[str, set[bytes]]:
    """What is of one site, or of the model on its way."""
    models = [initial(of), *(map_tensors(path) for path in run.folder.glob("checkpoints/round-*/model.safetensors"))]
    return {
        "update": {form for site in SITES for number in (1, 2, 3) for form in scan.run_of(value_of(site, number))},
        "cases": {form for gift in GIFTS.values() for form in scan.number(gift.cases)},
        "loss": {form for gift in GIFTS.values() for form in scan.number(gift.loss)},
        "metrics": {form for gift in GIFTS.values() for form in scan.number(gift.metric)},
        "model": {form for model in models for form in scan.rows_of(model)},
    }


def _observed(federation: Federation, of: Plan) -> dict[str, set[str]]:
    """What is found while all replies of training, and then of evaluation, lie at the coordinator; and at the end."""
    seen: dict[str, set[str]] = {}

    def look(run: Run) -> None:
        for name, files in scan.found(federation.home.path, _patterns(of, run), rightly=_RIGHTLY).items():
            seen.setdefault(name, set()).update(files)

    _hold(federation, TRAIN)
    _hold(federation, EVALUATE)
    run = federation.run(of)
    for kind in (TRAIN, EVALUATE):
        _at(federation, kind)
        with _Stopped(run):
            _release(federation, kind)
            _delivered(federation)
            look(run)
    assert ended(run) == "completed"
    look(run)
    return seen


@pytest.mark.parametrize("size", ["large", "small"])
def test_nothing_of_one_site_and_no_model_on_its_way_lies_at_the_coordinator(size: str, federation: Federation) -> None:
    assert _observed(federation, _SEEN[size]) == {}


@pytest.mark.parametrize("size", ["large", pytest.param("small", marks=pytest.mark.slow)])
def test_without_secure_sums_all_of_it_lies_there(size: str, federation: Federation) -> None:
    seen = _observed(federation, _OPEN[size])
    assert set(seen) == {"update", "cases", "loss", "metrics", "model"}
    assert "superlink/state.sqlite" in seen["cases"] & seen["loss"] & seen["metrics"]
    way = r"spool/" if size == "large" else "superlink/"
    assert any(name.startswith(way) for name in seen["update"])
    assert any(name.startswith(way) for name in seen["model"])
