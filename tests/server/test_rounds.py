from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from locum.common.errors import Code, RunError
from locum.common.messages import (
    Description,
    EvaluateResult,
    EvaluateTask,
    Tensors,
    TrainResult,
    TrainTask,
    pack,
    unpack,
)
from locum.common.plan import Plan
from locum.server.admission import reasons
from locum.server.rounds import Finished
from tests.peers import Answer, Failing, Mute, Peer, Spoiler, run_peers
from tests.plans import initial, plan


def _moved(finished: Finished, of: Plan) -> set[float]:
    return {round(float(x), 4) for name, start in initial(of).items() for x in (finished.model[name] - start).ravel()}


def _events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_the_model_moves_by_the_weighted_mean_of_the_updates(tmp_path: Path) -> None:
    of = plan(rounds=1)
    finished = run_peers(of, [Peer("a", 1.0, weight=1.0), Peer("b", 5.0, weight=3.0)], tmp_path)
    assert _moved(finished, of) == {4.0}
    assert finished.status == "completed"
    record = finished.history[0]
    assert (record.sites, record.weight, record.weights) == (("a", "b"), 4.0, {"a": 1.0, "b": 3.0})
    assert record.secured is None


def test_metrics_are_of_the_sums_over_sites(tmp_path: Path) -> None:
    finished = run_peers(plan(rounds=1), [Peer("a"), Peer("b")], tmp_path)
    assert finished.test.overall == {"AUC": 1.0, "accuracy": 1.0}
    assert finished.test.per_site["b"] == {"AUC": 1.0, "accuracy": 1.0}
    assert finished.test.fold == "test"
    assert [record.evaluation is not None for record in finished.history] == [True]


def _nan(update: Tensors) -> Tensors:
    first = next(iter(update))
    return {**update, first: np.full_like(update[first], np.nan)}


def _wrong_shape(update: Tensors) -> Tensors:
    first = next(iter(update))
    return {**update, first: np.zeros((3, 3), np.float32)}


def _broadcastable(update: Tensors) -> Tensors:
    first = next(iter(update))
    return {**update, first: np.ones([1] * update[first].ndim, np.float32)}


def _missing(update: Tensors) -> Tensors:
    return dict(list(update.items())[1:])


def _extra(update: Tensors) -> Tensors:
    return {**update, "stowaway": np.zeros(1, np.float32)}


def _wrong_dtype(update: Tensors) -> Tensors:
    return {name: tensor.astype(np.float64) for name, tensor in update.items()}


def _huge(update: Tensors) -> Tensors:
    return {name: tensor * 1e6 for name, tensor in update.items()}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_nan, "not finite"),
        (_wrong_shape, "has shape"),
        (_broadcastable, "has shape"),
        (_missing, "missing"),
        (_extra, "do not belong"),
        (_wrong_dtype, "dtype"),
        (_huge, "above the bound"),
    ],
)
def test_an_update_that_is_not_one_costs_its_site_the_round_and_nobody_else(
    spoil: Callable[[Tensors], Tensors], told: str, tmp_path: Path
) -> None:
    of = plan(rounds=2)
    finished = run_peers(of, [Peer("a"), Peer("b"), Spoiler("c", spoil)], tmp_path)
    assert _moved(finished, of) == {2.0}
    assert all(told in record.excluded["c"] for record in finished.history)
    assert finished.status == "completed with losses"
    assert finished.losses == {"c": [1, 2]}


class _Liar(Peer):
    def __init__(self, site: str, **claims: object) -> None:
        super().__init__(site)
        self.claims = claims

    def header(self, plan: Plan, task: TrainTask) -> TrainResult:
        return super().header(plan, task).model_copy(update=self.claims)


@pytest.mark.parametrize(
    ("claims", "told"),
    [
        ({"weight": 1e9}, "its weight"),
        ({"weight": 0.0}, "its weight"),
        ({"weight": float("inf")}, "unreadable|its weight"),
        ({"weight": -1.0}, "unreadable"),
        ({"round": 7}, "of round 7"),
        ({"plan_digest": "0" * 64}, "another plan"),
    ],
)
def test_a_header_that_lies_is_refused(claims: dict[str, object], told: str, tmp_path: Path) -> None:
    finished = run_peers(plan(rounds=1), [Peer("a"), Peer("b"), _Liar("c", **claims)], tmp_path)
    (reason,) = finished.history[0].excluded.values()
    assert any(word in reason for word in told.split("|"))


class _Garbled(Peer):
    def train(self, plan: Plan, content: RecordDict) -> Answer:
        return RecordDict({"locum": ConfigRecord({"json": b"\x80\x04."})})


def test_a_reply_that_is_no_message_is_refused(tmp_path: Path) -> None:
    finished = run_peers(plan(rounds=1), [Peer("a"), Peer("b"), _Garbled("c")], tmp_path)
    assert "unreadable reply" in finished.history[0].excluded["c"]


def test_a_failure_reaches_the_record_as_our_words_and_never_as_the_sites(tmp_path: Path) -> None:
    leak = Failing("c", int(Code.LOSS_NOT_FINITE), "LOSS_NOT_FINITE in /data/Mustermann^Max.dcm")
    finished = run_peers(plan(rounds=1), [Peer("a"), Peer("b"), leak], tmp_path)
    assert finished.history[0].excluded == {"c": "the loss became NaN or infinite"}
    unknown = Failing("c", 4711, "Mustermann")
    finished = run_peers(plan(rounds=1), [Peer("a"), Peer("b"), unknown], tmp_path / "second")
    assert finished.history[0].excluded == {"c": "the site failed with code 4711"}
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"Mustermann" not in everything


def test_a_late_site_costs_one_contribution_and_is_back_in_the_next_round(tmp_path: Path) -> None:
    of = plan(rounds=2, participation={"quorum": 2, "deadline": "1 s"})
    finished = run_peers(of, [Peer("a"), Peer("b"), Mute("c", 1.6, rounds=(1,))], tmp_path)
    assert finished.history[0].excluded == {"c": "no answer by the deadline"}
    assert finished.history[1].excluded == {}
    assert finished.losses == {"c": [1]}


def test_a_round_below_quorum_commits_nothing_and_says_why(tmp_path: Path) -> None:
    of = plan(participation={"quorum": 2, "deadline": "30 s", "attempts": 2})
    peers = [Peer("a"), Failing("b", int(Code.LOSS_NOT_FINITE), "")]
    with pytest.raises(RunError, match="b: the loss became NaN") as caught:
        run_peers(of, peers, tmp_path)
    assert "lower the learning rate" in caught.value.remedy
    assert [event["attempt"] for event in _events(tmp_path, "void")] == [1, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000000"]
    assert peers[0].trained == [1, 1]


def test_a_run_goes_on_from_its_last_committed_round_bit_by_bit(tmp_path: Path) -> None:
    whole = run_peers(plan(rounds=4), [Peer("a", 0.1), Peer("b", 0.7, 3.0)], tmp_path / "whole")

    class Dying(Peer):
        def train(self, plan: Plan, content: RecordDict) -> Answer:
            if self.trained == [1, 2]:
                raise SystemExit
            return super().train(plan, content)

    with pytest.raises(SystemExit):
        run_peers(plan(rounds=4), [Peer("a", 0.1), Dying("b", 0.7, 3.0)], tmp_path / "cut")
    b = Peer("b", 0.7, 3.0)
    resumed = run_peers(plan(rounds=4), [Peer("a", 0.1), b], tmp_path / "cut")
    assert b.trained == [3, 4]
    assert all(np.array_equal(whole.model[name], resumed.model[name]) for name in whole.model)
    assert [record.round for record in resumed.history] == [1, 2, 3, 4]


def test_sites_that_disagree_on_the_configuration_stop_the_run_before_round_one(tmp_path: Path) -> None:
    class Old(Peer):
        def description(self, plan: Plan) -> Description:
            found = super().description(plan)
            return found.model_copy(update={"configuration": {**found.configuration, "torch": "2.11.0"}, "cases": None})

    peers = [Peer("a"), Old("b")]
    with pytest.raises(RunError, match=r"b: torch is '2\.11\.0', here it is") as caught:
        run_peers(plan(), peers, tmp_path)
    assert "same versions" in caught.value.remedy
    assert peers[0].trained == []


def test_two_agents_of_one_name_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="call themselves 'a'"):
        run_peers(plan(), [Peer("a"), Peer("a")], tmp_path)


def test_a_site_that_is_not_able_is_left_out_with_its_reason(tmp_path: Path) -> None:
    class Empty(Peer):
        def description(self, plan: Plan) -> Description:
            empty = {"cases": {"train": 0}, "able": False, "reason": "no case"}
            return super().description(plan).model_copy(update=empty)

    finished = run_peers(plan(rounds=1), [Peer("a"), Peer("b"), Empty("c")], tmp_path)
    assert finished.status == "completed with losses"
    assert reasons(finished.roster.excluded) == {"c": "no case"}
    with pytest.raises(RunError, match="quorum is 2"):
        run_peers(plan(), [Peer("a"), Empty("b")], tmp_path / "second")


def test_a_site_that_tells_neither_counts_nor_steps_nor_loss_takes_part(tmp_path: Path) -> None:
    class Silent(Peer):
        def description(self, plan: Plan) -> Description:
            return super().description(plan).model_copy(update={"cases": None})

        def header(self, plan: Plan, task: TrainTask) -> TrainResult:
            return super().header(plan, task).model_copy(update={"steps": None, "loss": None})

    of = plan(rounds=1)
    finished = run_peers(of, [Peer("a"), Silent("b", 3.0)], tmp_path)
    assert finished.status == "completed"
    assert _moved(finished, of) == {2.0}


def test_a_resumed_run_refuses_to_lose_a_site_in_silence(tmp_path: Path) -> None:
    run_peers(plan(rounds=1), [Peer("a"), Peer("b"), Peer("c")], tmp_path)
    with pytest.raises(RunError, match="missing now: c"):
        run_peers(plan(rounds=1), [Peer("a"), Peer("b")], tmp_path)


def test_a_site_that_comes_after_the_run_began_stays_outside_when_it_is_resumed(tmp_path: Path) -> None:
    run_peers(plan(rounds=2), [Peer("a"), Peer("b")], tmp_path)
    late = Peer("c")
    resumed = run_peers(plan(rounds=2), [Peer("a"), Peer("b"), late], tmp_path)
    assert reasons(resumed.roster.excluded) == {"c": "was not there when the run began"}
    assert late.trained == []


def test_a_sum_that_is_not_finite_voids_the_round_and_says_so(tmp_path: Path) -> None:
    once = {"quorum": 2, "deadline": "30 s", "attempts": 1}
    of = plan(rounds=2, participation=once, admission={"norm_bound": 1e300})
    large = [Spoiler(site, lambda update: {n: np.full_like(t, 3e38) for n, t in update.items()}) for site in "ab"]
    with pytest.raises(RunError, match="the sum is not finite"):
        run_peers(of, list(large), tmp_path)
    assert [event["admitted"] for event in _events(tmp_path, "void")] == [0]


class _Learner(Peer):
    """A peer whose measured AUC is best after round 2."""

    def sums(self, plan: Plan, task: EvaluateTask) -> Tensors:
        histogram = np.zeros((2, 2, 1024))
        histogram[1, 0, 300], histogram[1, 1, 400 if task.round == 2 else 200] = 1, 1
        return {**super().sums(plan, task), "AUC": histogram.ravel()}


def test_the_best_round_on_validation_is_the_result_when_the_plan_says_so(tmp_path: Path) -> None:
    of = plan(rounds=6, evaluation={"metrics": ["AUC", "accuracy"], "select": "best"})
    finished = run_peers(of, [_Learner("a", 0.1), _Learner("b", 0.1)], tmp_path)
    assert finished.round == 2
    assert _moved(finished, of) == {0.2}
    last = run_peers(plan(rounds=6), [_Learner("a", 0.1), _Learner("b", 0.1)], tmp_path / "last")
    assert last.round == 6


@pytest.mark.parametrize("length", [0, 1, 4095, 4097])
def test_metric_sums_of_another_length_cost_the_site_its_evaluation(tmp_path: Path, length: int) -> None:
    class Long(Peer):
        def sums(self, plan: Plan, task: EvaluateTask) -> Tensors:
            return {**super().sums(plan, task), "AUC": np.zeros(length)}

    finished = run_peers(plan(rounds=1), [Peer("a"), Long("b")], tmp_path)
    assert finished.test.excluded == {"b": "a metric's sums have another length"}
    assert finished.test.overall["AUC"] == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e13])
def test_metric_sums_that_are_no_sums_cost_the_site_its_evaluation(tmp_path: Path, value: float) -> None:
    class Odd(Peer):
        def sums(self, plan: Plan, task: EvaluateTask) -> Tensors:
            return {**super().sums(plan, task), "AUC": np.full(4096, value)}

    finished = run_peers(plan(rounds=1), [Peer("a"), Odd("b")], tmp_path)
    assert "b" in finished.test.excluded
    assert finished.test.overall["accuracy"] == 1.0
    assert finished.status == "completed with losses"


def test_metrics_of_another_round_cost_the_site_its_evaluation(tmp_path: Path) -> None:
    class Late(Peer):
        def evaluate(self, plan: Plan, content: RecordDict) -> Answer:
            task, _ = unpack(content, EvaluateTask)
            header = EvaluateResult(plan_digest=plan.digest, round=task.round - 1, fold=task.fold, cases=1)
            return pack(header, self.sums(plan, task))

    finished = run_peers(plan(rounds=1), [Peer("a"), Late("b")], tmp_path)
    assert finished.test.excluded == {"b": "metrics of the test fold in round 0"}


def test_a_final_test_that_too_few_sites_answer_does_not_pass_for_the_end(tmp_path: Path) -> None:
    class Gone(Peer):
        def evaluate(self, plan: Plan, content: RecordDict) -> Answer:
            task, _ = unpack(content, EvaluateTask)
            time.sleep(2 if task.fold == "test" else 0)
            return super().evaluate(plan, content)

    of = plan(rounds=1, participation={"quorum": 2, "deadline": "1 s"})
    with pytest.raises(RunError, match="fewer sites than the quorum of 2 answer in the final test"):
        run_peers(of, [Peer("a"), Gone("b")], tmp_path)
    resumed = run_peers(of, [Peer("a"), Peer("b")], tmp_path)
    assert resumed.status == "completed"
    assert resumed.test.overall == {"AUC": 1.0, "accuracy": 1.0}
