"""A model that collapses on validation is left behind where the plan says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from locum.common.messages import EvaluateTask, Tensors
from locum.common.plan import Plan
from locum.server.rounds import Finished
from tests.peers import Peer, run_peers
from tests.plans import initial, plan

#: Accuracy on validation after each round, of 100 cases.
_COURSE = {1: 70, 2: 90, 3: 20, 4: 85, 5: 88, 6: 95}


class _Fickle(Peer):
    """A peer whose accuracy takes a course."""

    def __init__(self, site: str, course: dict[int, int]) -> None:
        super().__init__(site)
        self.course = course

    def sums(self, plan: Plan, task: EvaluateTask) -> Tensors:
        right = self.course[task.round]
        return {"accuracy": np.array([right, 100 - right, 0, 0], np.float64)}


def _run(folder: Path, course: dict[int, int], rounds: int, **evaluation: object) -> Finished:
    changes = {f"evaluation__{key}": value for key, value in evaluation.items()}
    of = plan(rounds=rounds, evaluation__metrics=["accuracy"], **changes)
    return run_peers(of, [_Fickle("a", course), _Fickle("b", course)], folder)


def _steps(finished: Finished) -> float:
    """How many rounds' updates, of 1 everywhere, the model has moved by."""
    start = initial(plan(evaluation__metrics=["accuracy"]))
    moves = {round(float(x), 3) for name in start for x in (finished.model[name] - start[name]).ravel()}
    assert len(moves) == 1
    return moves.pop()


def test_the_round_after_a_collapse_starts_from_the_best_model(tmp_path: Path) -> None:
    finished = _run(tmp_path, _COURSE, 4, rollback=0.3)
    assert [record.start for record in finished.history] == [None, None, None, 2]
    assert _steps(finished) == 3
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["round"], event["to"]) for event in told if event["event"] == "rolled back"] == [(3, 2)]


def test_a_smaller_loss_of_quality_is_not_a_collapse(tmp_path: Path) -> None:
    finished = _run(tmp_path, _COURSE, 4, rollback=0.8)
    assert [record.start for record in finished.history] == [None] * 4
    assert _steps(finished) == 4


def test_without_the_option_nothing_is_rolled_back(tmp_path: Path) -> None:
    assert _steps(_run(tmp_path, _COURSE, 4)) == 4


def test_a_run_that_ends_in_a_collapse_gives_the_best_model(tmp_path: Path) -> None:
    finished = _run(tmp_path, _COURSE, 3, rollback=0.3)
    assert finished.round == 2
    assert _steps(finished) == 2


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_run_rolls_back_as_an_uninterrupted_one_does(tmp_path: Path, every: int) -> None:
    """The collapse is in what is committed, so that whoever goes on from there sees it."""
    course = {1: 70, 2: 90, 3: 88, 4: 20, 5: 85, 6: 95}
    whole = _run(tmp_path / "whole", course, 6, rollback=0.3, every_rounds=every)
    part = tmp_path / "part"
    with pytest.raises(RuntimeError, match="dies here"):
        _die_after(part, course, every)
    resumed = _run(part, course, 6, rollback=0.3, every_rounds=every)
    assert [record.start for record in resumed.history] == [record.start for record in whole.history]
    assert all(np.array_equal(resumed.model[name], whole.model[name]) for name in whole.model)
    assert [record.start for record in whole.history][4] == 2


def _die_after(folder: Path, course: dict[int, int], every: int) -> None:
    """Runs until the evaluation of round 4 is written, and dies."""
    from locum.server.records import Events

    emit = Events.emit

    class _Deadly(Events):
        def emit(self, kind: str, **fields: object) -> None:
            emit(self, kind, **fields)
            if kind == "evaluated" and fields["round"] == 4:
                raise RuntimeError("the process dies here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.peers.Events", _Deadly)
        _run(folder, course, 6, rollback=0.3, every_rounds=every)
