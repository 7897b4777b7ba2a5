"""Secure sums at the coordinator: what they add up to, who may be lost, what is void, and what nobody learns."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from locum.common.errors import Code, RunError
from locum.common.identity import new_key
from locum.common.messages import (
    MaskedResult,
    Tensors,
    UnmaskResult,
    UnmaskTask,
    body_of,
    pack,
    unpack,
)
from locum.common.plan import Plan
from locum.common.secagg import keys
from locum.common.secagg.ring import Ring, mean_error
from locum.common.secagg.roster import Header, sign
from locum.common.secagg.shares import SHARE_BYTES
from locum.common.secagg.site import answer_purpose, wanted
from locum.common.secagg.upload import TOLD, UPDATE
from locum.common.sums import weight_cap
from locum.server.rounds import Finished
from locum.simulations.institutions import Federation
from locum.site_client.secure import SecureSite
from tests.peers import Peer, run_peers
from tests.plans import initial, plan, secured
from tests.secure_peers import SecurePeer, failed, run_secure

NAMES = ("a", "b", "c", "d", "e")
BOUNDS = {"norm_bound": 50, "weight_cap": 100}


def of(**changes: Any) -> Plan:
    """A secure plan of one round, with narrow bounds."""
    return secured(**{"rounds": 1, "admission": BOUNDS, **changes})


def hasty(seconds: int) -> dict[str, Any]:
    return {"participation": {"quorum": 3, "deadline": f"{seconds} s"}}


def honest(count: int) -> list[SecurePeer]:
    """Sites with an update and a number of cases each of its own."""
    return [SecurePeer(name, 0.05 * number, 7 * number) for number, name in enumerate(NAMES[:count], start=1)]


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def moved(finished: Finished, plan: Plan) -> list[np.ndarray[Any, Any]]:
    return [finished.model[name].astype(float) - start for name, start in initial(plan).items()]


def check_mean(finished: Finished, plan: Plan, peers: list[SecurePeer], sites: int) -> None:
    """The model has moved, in one round, by the weighted mean of the peers' updates, as far as a sum can tell."""
    weights = [1.0 if plan.participation.weighting == "equal" else float(peer.cases) for peer in peers]
    mean = sum(w * peer.value for w, peer in zip(weights, peers, strict=True)) / sum(weights)
    ring = Ring(plan.protection.ring, sites, plan.admission.norm_bound)
    most = mean_error(ring, weight_cap(plan), sum(weights)) + 1e-6  # of a float32 about 1
    assert max(float(np.abs(change - mean).max()) for change in moved(finished, plan)) <= most
    record = finished.history[0]
    assert record.sites == tuple(peer.site for peer in peers)
    assert record.weight == pytest.approx(sum(weights))
    assert record.secured is not None
    assert set(record.secured.uploads) == {peer.site for peer in peers}


# --- the sum


@pytest.mark.parametrize("ring", [32, 64])
@pytest.mark.parametrize("weighting", ["cases", "equal"])
def test_the_model_moves_by_the_weighted_mean_within_the_error_that_is_told(
    tmp_path: Path, weighting: str, ring: int
) -> None:
    plan = of(participation__weighting=weighting, protection__ring=ring)
    peers = honest(3)
    finished = run_secure(plan, peers, tmp_path)
    assert finished.status == "completed"
    check_mean(finished, plan, peers, 3)
    record = finished.history[0]
    assert record.loss == pytest.approx(0.5)
    assert record.bytes_up > 3 * ring // 8 * sum(tensor.size for tensor in finished.model.values())


class Measuring(SecurePeer):
    """A site whose sums are whole numbers of its own; what it measures is best after round 2."""

    def sums(self, plan: Plan, request: dict[str, Any]) -> Tensors:
        return whole_sums(self.cases, request["round"])


def whole_sums(cases: int, round_number: int) -> Tensors:
    histogram = np.zeros((2, 2, 1024))
    histogram[1, 0, 290:310], histogram[1, 1, 400 if round_number == 2 else 295] = cases, cases
    return {"AUC": histogram.ravel(), "accuracy": np.array([3.0 * cases, 1, 2, cases])}


class Plain(Peer):
    """The same, in the clear."""

    def sums(self, plan: Plan, task: Any) -> Tensors:
        return whole_sums(int(self.weight), task.round)


def test_metrics_of_whole_numbers_are_those_of_the_plain_sums_and_choose_the_same_model(tmp_path: Path) -> None:
    changes = {"rounds": 3, "evaluation": {"metrics": ["AUC", "accuracy"], "select": "best"}, "admission": BOUNDS}
    cases = {"a": 7, "b": 12, "c": 31}
    masked = run_secure(secured(**changes), [Measuring(name, 0.1, n) for name, n in cases.items()], tmp_path / "masked")
    clear = run_peers(plan(**changes), [Plain(name, 0.1, n) for name, n in cases.items()], tmp_path / "clear")
    assert masked.test.overall == clear.test.overall
    assert masked.round == clear.round == 2
    validated = [[r.evaluation and r.evaluation.overall for r in found.history] for found in (masked, clear)]
    assert validated[0] == validated[1]
    assert (masked.test.total, masked.test.sites) == (sum(cases.values()), tuple(cases))


def test_of_a_site_without_a_case_of_a_fold_nobody_learns_it(tmp_path: Path) -> None:
    peers = [Measuring("a", cases=5), Measuring("b", cases=6), Measuring("c", cases=0)]
    finished = run_secure(of(participation__weighting="equal"), peers, tmp_path)
    assert finished.test.sites == ("a", "b", "c")
    assert finished.test.total == 11
    assert finished.test.excluded == {}


# --- who is lost


class FailsToTrain(SecurePeer):
    """Fails before it gives, in the attempts named."""

    attempts: tuple[tuple[int, int], ...] = ((1, 1),)

    def train(self, message: Message, bundle: bytes) -> Message:
        context = self.contexts[-1]
        if (context.round, context.attempt) in self.attempts:
            return failed(message, Code.OUT_OF_MEMORY)
        return super().train(message, bundle)


class Silent(SecurePeer):
    """Is gone for some seconds when it is first asked to unmask; what it answers then is too late."""

    def __init__(self, site: str, seconds: float, value: float = 0.1, cases: int = 8) -> None:
        super().__init__(site, value, cases)
        self.seconds = seconds

    def unmask(self, message: Message, bundle: bytes) -> Message:
        time.sleep(self.seconds)
        self.seconds = 0
        return super().unmask(message, bundle)


def test_a_site_that_fails_before_it_gives_is_left_out_and_the_round_commits(tmp_path: Path) -> None:
    peers = [*honest(3), FailsToTrain("d", 5.0)]
    finished = run_secure(of(), peers, tmp_path)
    check_mean(finished, of(), peers[:3], 4)
    assert finished.history[0].excluded == {"d": "the worker ran out of memory"}
    assert finished.losses == {"d": [1]}


def test_a_site_that_gives_and_is_gone_before_it_is_unmasked_is_in_the_sum(tmp_path: Path) -> None:
    peers = [*honest(3), Silent("d", 2, 0.7, 20)]
    finished = run_secure(of(), peers, tmp_path)
    assert finished.history[0].seconds < 2
    check_mean(finished, of(), peers, 4)
    assert finished.status == "completed"


def test_too_many_lost_make_the_round_void_and_the_next_attempt_trains_again(tmp_path: Path) -> None:
    peers = [*honest(2), FailsToTrain("c"), FailsToTrain("d")]
    finished = run_secure(of(), peers, tmp_path)
    (void,) = events_of(tmp_path, "void")
    assert (void["attempt"], void["admitted"]) == (1, 2)
    assert void["reason"] == "2 sites gave to the sum, and 3 must"
    assert [peer.trained for peer in peers] == [[(1, 1), (1, 2)], [(1, 1), (1, 2)], [(1, 2)], [(1, 2)]]
    assert finished.history[0].attempt == 2
    assert finished.history[0].sites == ("a", "b", "c", "d")


def test_a_sum_that_cannot_be_unmasked_is_void_and_its_masks_are_never_used_again(tmp_path: Path) -> None:
    plan, peers = of(**hasty(3)), [*honest(2), Silent("c", 3.5)]
    finished = run_secure(plan, peers, tmp_path)
    (void,) = events_of(tmp_path, "void")
    assert void["reason"].splitlines() == [
        "the sum of 3 sites could not be unmasked: 3 must answer",
        "  c: no answer by the deadline",
    ]
    check_mean(finished, plan, peers, 3)
    assert finished.history[0].attempt == 2
    for peer in peers:
        assert peer.trained == [(1, 1), (1, 2)]
        steps = Counter((context.roster, context.step) for context in peer.contexts)
        assert set(steps.values()) == {1}


def test_a_round_below_its_threshold_in_every_attempt_ends_the_run_with_the_reasons(tmp_path: Path) -> None:
    class Never(FailsToTrain):
        attempts = ((1, 1), (1, 2), (1, 3))

    with pytest.raises(RunError, match="in 3 attempts") as caught:
        run_secure(of(), [*honest(2), Never("c")], tmp_path)
    assert "c: the worker ran out of memory" in caught.value.message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000000"]


def test_sites_that_are_lost_for_good_are_left_out_of_the_next_set_up_as_long_as_a_quorum_is_there(
    tmp_path: Path,
) -> None:
    class Leaving(SecurePeer):
        """Answers nothing from round 2 on."""

        def handle(self, message: Message, bundle: bytes) -> Message:
            left = any(round_number == 1 for round_number, _ in self.trained) and message.metadata.group_id != "1"
            return failed(message, Code.WORKER_DIED) if left else super().handle(message, bundle)

    plan = of(rounds=3, evaluation__every_rounds=3)
    finished = run_secure(plan, [*honest(3), Leaving("d"), Leaving("e")], tmp_path)
    assert [record.sites for record in finished.history] == [NAMES, NAMES[:3], NAMES[:3]]
    assert finished.losses == {"d": [2, 3], "e": [2, 3]}


def test_sites_that_fail_at_every_training_cost_the_run_nothing_as_long_as_a_quorum_is_there(tmp_path: Path) -> None:
    class Failing(FailsToTrain):
        attempts = tuple((number, attempt) for number in range(2, 9) for attempt in (1, 2))

    finished = run_secure(of(rounds=8), [*honest(3), Failing("d"), Failing("e")], tmp_path)
    assert finished.losses == {name: list(range(2, 9)) for name in "de"}
    assert [record.round for record in finished.history if record.attempt > 1] == [2, 3, 5]


def test_a_final_test_that_cannot_be_unmasked_does_not_pass_for_the_end(tmp_path: Path) -> None:
    class Gone(SecurePeer):
        def unmask(self, message: Message, bundle: bytes) -> Message:
            gone = self.contexts[-1].purpose == "test"
            return failed(message, Code.WORKER_DIED) if gone else super().unmask(message, bundle)

    with pytest.raises(RunError, match="answer in the final test") as caught:
        run_secure(of(), [*honest(2), Gone("c")], tmp_path)
    assert "could not be unmasked: 3 must answer" in caught.value.message
    (void,) = events_of(tmp_path, "void")
    assert (void["fold"], void["round"]) == ("test", 1)
    resumed = run_secure(of(), [*honest(2), SecurePeer("c", cases=8)], tmp_path)
    assert resumed.status == "completed"
    assert resumed.test.total == 7 + 14 + 8


def test_a_final_test_that_was_unmasked_for_others_before_does_not_hold_up_the_run_for_ever(tmp_path: Path) -> None:
    class Refusing(SecurePeer):
        """Has given its shares of the test's sum for other survivors, and never will for these."""

        def unmask(self, message: Message, bundle: bytes) -> Message:
            other = self.contexts[-1].purpose == "test"
            return failed(message, Code.SECURE_SUM_REFUSED) if other else super().unmask(message, bundle)

    finished = run_secure(of(), [*honest(2), Refusing("c", cases=8), Refusing("d", cases=8)], tmp_path)
    assert finished.test.overall == {"AUC": None, "accuracy": None}
    assert finished.status == "completed with losses"
    assert "refused a step of secure aggregation" in finished.test.excluded["a"]


# --- set-up


class Forgetful(SecurePeer):
    """Loses everything that it keeps of secure aggregation before it trains in round 2."""

    lost = False

    def train(self, message: Message, bundle: bytes) -> Message:
        if self.contexts[-1].round == 2 and not self.lost:
            self.lost = True
            shutil.rmtree(self.agent.secure.folder)
        return super().train(message, bundle)


def test_a_site_that_has_lost_its_keys_makes_the_next_attempt_set_up_anew_and_takes_part_again(tmp_path: Path) -> None:
    plan = of(rounds=3)
    finished = run_secure(plan, [*honest(2), Forgetful("c")], tmp_path)
    assert [record.attempt for record in finished.history] == [1, 2, 1]
    assert all(record.sites == ("a", "b", "c") for record in finished.history)
    rosters = [event["roster"] for event in events_of(tmp_path, "keys")]
    assert len(set(rosters)) == len(rosters) == 2
    assert [event["reason"] for event in events_of(tmp_path, "void")] == ["2 sites gave to the sum, and 3 must"]


def test_where_others_suffice_a_site_that_has_lost_its_keys_misses_one_round(tmp_path: Path) -> None:
    finished = run_secure(of(rounds=3), [*honest(3), Forgetful("d")], tmp_path)
    assert [record.attempt for record in finished.history] == [1, 1, 1]
    assert finished.losses == {"d": [2]}
    assert len(events_of(tmp_path, "keys")) == 2


class Late(SecurePeer):
    """Gives no keys the first `times` that it is asked."""

    def __init__(self, site: str, times: int) -> None:
        super().__init__(site)
        self.times = times

    def keys(self, message: Message, bundle: bytes) -> Message:
        self.times -= 1
        return failed(message, Code.WORKER_DIED) if self.times >= 0 else super().keys(message, bundle)


@pytest.mark.parametrize(("times", "rounds_missed"), [(1, [1]), (2, [1, 2, 3]), (3, [1, 2, 3, 4, 5, 6, 7])])
def test_a_site_that_is_away_at_a_set_up_is_asked_again_after_one_two_and_four_rounds(
    tmp_path: Path, times: int, rounds_missed: list[int]
) -> None:
    finished = run_secure(of(rounds=9), [*honest(3), Late("d", times)], tmp_path)
    assert finished.losses == {"d": rounds_missed}
    found = events_of(tmp_path, "keys")
    assert [event["excluded"] for event in found] == [{"d": "the worker process died"}] * times + [{}]
    assert (found[-1]["sites"], found[-1]["threshold"]) == (["a", "b", "c", "d"], 3)
    assert finished.history[0].excluded == {"d": "the worker process died"}


@pytest.mark.parametrize("step", ["pairs", "begin"])
def test_a_site_that_fails_within_a_set_up_costs_itself_and_nobody_else(tmp_path: Path, step: str) -> None:
    broken = SecurePeer("b")
    setattr(broken, step, lambda message, _: failed(message, Code.DISK_FULL))
    peers = [*honest(4)]
    peers[1] = broken
    finished = run_secure(of(), peers, tmp_path)
    assert finished.history[0].sites == ("a", "c", "d")
    assert finished.history[0].excluded == {"b": "the site's disk is full"}


def test_a_site_whose_keys_another_has_signed_is_not_in_the_roster(tmp_path: Path) -> None:
    class Forging(SecurePeer):
        def join(self, folder: Path, federation: Federation) -> None:
            super().join(folder, federation)
            forged = replace(self.agent.secure.credentials(), key=new_key())
            self.agent.secure = replace(self.agent.secure, credentials=lambda: forged)

    finished = run_secure(of(), [*honest(3), Forging("d")], tmp_path)
    assert finished.history[0].sites == ("a", "b", "c")
    assert "sign" in finished.history[0].excluded["d"]


def test_fewer_sites_than_a_secure_sum_needs_end_the_run_and_say_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"2 sites can take part, .* a secure sum is of three at least"):
        run_secure(of(participation__quorum=2), honest(2), tmp_path)
    assert events_of(tmp_path, "round") == []


# --- shares


class Lying(SecurePeer):
    """Answers with shares that are none."""

    def __init__(self, site: str, value: float, cases: int) -> None:
        super().__init__(site, value, cases)
        self.lied = threading.Event()

    def unmask(self, message: Message, bundle: bytes) -> Message:
        task, _ = unpack(message.content, UnmaskTask)
        ready, survivors = self.ready, tuple(sorted(task.uploads))
        assert ready.context is not None
        asked = sum(len(wanted(ready.roster, survivors, giver)) for giver in survivors)
        purpose = answer_purpose(ready.context, survivors, self.site)
        sealed = keys.seal(ready.roster.answers, purpose, bytes(SHARE_BYTES * asked))
        content = pack(UnmaskResult(plan_digest=task.plan_digest), {"sealed": np.frombuffer(sealed, np.uint8)})
        answer = Message(content, reply_to=message)
        self.lied.set()
        return answer


class After(SecurePeer):
    """Answers to unmask only after another has."""

    def __init__(self, site: str, value: float, cases: int, other: threading.Event) -> None:
        super().__init__(site, value, cases)
        self.other = other

    def unmask(self, message: Message, bundle: bytes) -> Message:
        self.other.wait(60)
        time.sleep(0.2)  # until the other's reply is there
        return super().unmask(message, bundle)


def test_a_site_whose_shares_are_wrong_is_named_and_the_sum_comes_out(tmp_path: Path) -> None:
    liar = Lying("a", 0.05, 7)
    rest = [After(peer.site, peer.value, peer.cases, liar.lied) for peer in honest(5)[1:]]
    peers: list[SecurePeer] = [liar, *rest]
    finished = run_secure(of(), peers, tmp_path)
    check_mean(finished, of(), peers, 5)
    named = {(event["site"], event["reason"]) for event in events_of(tmp_path, "refused")}
    assert named == {("a", "its shares do not fit those of the others")}


# --- uploads


class Tampering(SecurePeer):
    """Changes what its agent gives in round 2."""

    def __init__(self, site: str, tamper: Tamper) -> None:
        super().__init__(site)
        self.tamper = tamper
        self.before: Message | None = None

    def train(self, message: Message, bundle: bytes) -> Message:
        reply = super().train(message, bundle)
        before, self.before = self.before, reply
        if before is None:
            return reply
        return Message(self.tamper(self, reply, before), reply_to=message)


Tamper = Callable[[Tampering, Message, Message], Any]


def _taken_apart(reply: Message) -> tuple[MaskedResult, Tensors]:
    header, tensors = unpack(reply.content, MaskedResult)
    return header, dict(tensors)


def _signed_by_another(peer: Tampering, reply: Message, _: Message) -> Any:
    header, tensors = _taken_apart(reply)
    statement = Header(context=peer.contexts[-1].digest, site=peer.site, body=body_of(reply.content))
    return pack(header.model_copy(update={"upload": sign(statement, new_key())}), tensors)


def _unsigned(_: Tampering, reply: Message, __: Message) -> Any:
    header, tensors = _taken_apart(reply)
    return pack(header.model_copy(update={"upload": "{}"}), tensors)


def _other_body(_: Tampering, reply: Message, __: Message) -> Any:
    header, tensors = _taken_apart(reply)
    return pack(header, {**tensors, "scalars": tensors["scalars"] + np.uint64(1)})


def _resigned(peer: Tampering, reply: Message, change: Callable[[Tensors], Tensors]) -> Any:
    """Other tensors under the site's own, honest signature."""
    header, tensors = _taken_apart(reply)

    def signed(body: str) -> MaskedResult:
        statement = Header(context=peer.contexts[-1].digest, site=peer.site, body=body)
        return header.model_copy(update={"upload": sign(statement, peer.agent.secure.credentials().key)})

    return pack(signed, change(tensors))


def _short(peer: Tampering, reply: Message, _: Message) -> Any:
    return _resigned(peer, reply, lambda tensors: {**tensors, UPDATE: tensors[UPDATE][:-1]})


def _wide(peer: Tampering, reply: Message, _: Message) -> Any:
    return _resigned(peer, reply, lambda tensors: {**tensors, UPDATE: tensors[UPDATE].astype(np.uint64)})


def _stowaway(peer: Tampering, reply: Message, _: Message) -> Any:
    return _resigned(peer, reply, lambda tensors: {**tensors, "stowaway": np.zeros(1, np.float32)})


def _replayed(_: Tampering, __: Message, before: Message) -> Any:
    return before.content


def _of_another_site(peer: Tampering, reply: Message, _: Message) -> Any:
    header, tensors = _taken_apart(reply)
    statement = Header(context=peer.contexts[-1].digest, site="a", body=body_of(reply.content))
    return pack(header.model_copy(update={"upload": sign(statement, peer.agent.secure.credentials().key)}), tensors)


def _tells_its_loss(_: Tampering, reply: Message, __: Message) -> Any:
    header, tensors = _taken_apart(reply)
    return pack(header.model_copy(update={"loss": 0.5}), tensors)


def _tells_its_cases(_: Tampering, reply: Message, __: Message) -> Any:
    header, tensors = _taken_apart(reply)
    return pack(header.model_copy(update={"cases": 8}), tensors)


def _tells_its_metrics(peer: Tampering, reply: Message, _: Message) -> Any:
    return _resigned(peer, reply, lambda tensors: {**tensors, f"{TOLD}accuracy": np.zeros(4)})


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (_signed_by_another, "is not signed by the key expected"),
        (_unsigned, "envelope"),
        (_other_body, "its tensors are not those that it has signed"),
        (_short, "its tensors are not those of an upload to this sum"),
        (_wide, "its tensors are not those of an upload to this sum"),
        (_stowaway, "its tensors are not those of an upload to this sum"),
        (_replayed, "the upload of d is of another sum"),
        (_of_another_site, "the upload of d is of another sum"),
        (_tells_its_loss, "it tells more of itself than the plan releases"),
        (_tells_its_cases, "it tells more of itself than the plan releases"),
        (_tells_its_metrics, "it tells metrics that the plan does not release"),
    ],
)
def test_an_upload_that_is_not_one_costs_its_site_the_round_and_nobody_else(
    tmp_path: Path, tamper: Tamper, told: str
) -> None:
    finished = run_secure(of(rounds=2), [*honest(3), Tampering("d", tamper)], tmp_path)
    first, second = finished.history
    assert first.sites == ("a", "b", "c", "d")
    assert second.sites == ("a", "b", "c")
    assert told in second.excluded["d"]


class Oversized(SecurePeer):
    """Gives, with honest keys and past its own gate, an update whose norm is beyond the plan's bound."""

    def join(self, folder: Path, federation: Federation) -> None:
        super().join(folder, federation)
        honest = self.agent.secure
        self.agent.secure = _Oversizing(honest.folder, honest.credentials, honest.now, honest.rounding)


class _Oversizing(SecureSite):
    def give(self, *about: Any, **what: Any) -> Any:
        given = what.pop("given")
        large = {name: np.full_like(tensor, 40.0) for name, tensor in given.update.items()}
        return super().give(*about, **what, given=replace(given, update=large))


def test_a_sum_that_no_honest_updates_can_have_is_void_and_nothing_of_it_is_committed(tmp_path: Path) -> None:
    plan = of(participation={"quorum": 3, "attempts": 2, "weighting": "equal"})
    with pytest.raises(RunError, match="the sum failed its check: its norm is"):
        run_secure(plan, [*honest(3), Oversized("d")], tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000000"]
    voids = events_of(tmp_path, "void")
    assert [event["attempt"] for event in voids] == [1, 2]
    assert all("the sum failed its check" in event["reason"] for event in voids)


def test_an_honest_site_does_not_let_such_an_update_leave(tmp_path: Path) -> None:
    finished = run_secure(of(), [*honest(3), SecurePeer("d", 40.0)], tmp_path)
    assert finished.history[0].sites == ("a", "b", "c")
    assert "checks" in finished.history[0].excluded["d"]


# --- what is told


def test_a_site_tells_of_itself_what_the_plan_has_it_tell_and_no_more(tmp_path: Path) -> None:
    peers = honest(3)
    nothing = run_secure(of(), peers, tmp_path / "nothing")
    assert nothing.test.per_site == {}
    assert set(nothing.test.cases.values()) == {None}
    assert set(nothing.history[0].losses.values()) == {None}
    assert (nothing.history[0].weights, nothing.history[0].train_seconds) == ({}, {})
    told = ["metrics", "training_loss", "case_counts"]
    everything = run_secure(of(release={"per_site": told}), honest(3), tmp_path / "everything")
    assert set(everything.test.per_site) == {"a", "b", "c"}
    assert everything.test.cases == {"a": 7, "b": 14, "c": 21}
    assert everything.history[0].losses == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert everything.history[0].weights == {"a": 7.0, "b": 14.0, "c": 21.0}
    assert everything.test.overall == nothing.test.overall
    assert all(np.array_equal(nothing.model[name], everything.model[name]) for name in nothing.model)


def _numbers_by_site(value: Any, sites: tuple[str, ...], *, at_site: bool = False) -> Iterator[Any]:
    """Every number that stands under a site's name, or beside it."""
    if isinstance(value, Mapping):
        of_site = at_site or value.get("site") in sites
        for key, inner in value.items():
            if key not in {"at", "round", "attempt"}:
                yield from _numbers_by_site(inner, sites, at_site=of_site or key in sites)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers_by_site(inner, sites, at_site=at_site)
    elif at_site and isinstance(value, float | int) and not isinstance(value, bool):
        yield value


def test_records_and_events_hold_no_number_of_a_single_site(tmp_path: Path) -> None:
    class Marked(SecurePeer):
        """Its number of cases and its loss are found wherever they are written."""

        def loss(self, _round_number: int) -> float:
            return float(f"0.{self.cases}")

    cases = {"a": 70_111, "b": 70_333, "c": 70_777}
    peers = [Marked(name, 0.1, n) for name, n in cases.items()]
    run_secure(of(rounds=2, admission={**BOUNDS, "weight_cap": 1e6}), peers, tmp_path)
    texts = [(tmp_path / "events.jsonl").read_text()]
    texts += [path.read_text() for path in (tmp_path / "checkpoints").rglob("*.json")]
    assert len(texts) >= 5
    values = [json.loads(line) for line in texts[0].splitlines()] + [json.loads(text) for text in texts[1:]]
    assert list(_numbers_by_site(values, tuple(cases))) == []
    assert [n for n in cases.values() if any(str(n) in text for text in texts)] == []
    assert any(str(sum(cases.values())) in text for text in texts)


# --- a run that was stopped


def test_a_run_that_was_stopped_sets_up_anew_and_gives_the_same_model_to_the_bit(tmp_path: Path) -> None:
    class StoppedError(RuntimeError):
        pass

    class Stopping(SecurePeer):
        def train(self, message: Message, bundle: bytes) -> Message:
            if self.contexts[-1].round == 3:
                raise StoppedError
            return super().train(message, bundle)

    plan = of(rounds=4)
    whole = run_secure(plan, honest(3), tmp_path / "whole")
    with pytest.raises(StoppedError):
        run_secure(plan, [*honest(2), Stopping("c", 0.15, 21)], tmp_path / "cut")
    peers = honest(3)
    resumed = run_secure(plan, peers, tmp_path / "cut")
    assert peers[0].trained == [(3, 1), (4, 1)]
    assert all(np.array_equal(whole.model[name], resumed.model[name]) for name in whole.model)
    assert [record.round for record in resumed.history] == [1, 2, 3, 4]
    assert len({event["roster"] for event in events_of(tmp_path / "cut", "keys")}) == 2
    assert whole.test == resumed.test
