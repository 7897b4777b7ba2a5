"""What a private plan may use of a site's patients, and what its agent does and says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from locum.common.envelope import EnvelopeError, Spent, open_spent
from locum.common.errors import Code, SiteFailure
from locum.common.identity import certified_key, new_key
from locum.common.messages import (
    EVALUATE,
    TRAIN,
    EvaluateResult,
    EvaluateTask,
    MaskedResult,
    TrainResult,
    TrainTask,
    unpack,
)
from locum.common.plan import Fold, Plan
from locum.site_client.gate import Policy
from locum.site_client.privacy.accountant import epsilon
from locum.site_client.privacy.budget import Budget, Reserved, Signer, drawing, one_release, releases, whole_run
from locum.site_client.privacy.ledger import Ledger
from tests.plans import plan
from tests.site_client.asking import failure
from tests.site_client.circle import RUN, Circle, answered
from tests.site_client.privacy.private_plans import private

_KEY = new_key()
_NOW = datetime(2026, 11, 26, tzinfo=UTC)


def _budget(folder: Path, **policy: Any) -> Budget:
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.begin()
    return Budget(ledger, "patients", Policy.model_validate(policy), lambda: Signer("north", _KEY), lambda: _NOW)


def _reserve(
    budget: Budget, of: Plan, *, run: str = RUN, round_number: int = 1, purpose: Fold = "train", patients: int = 40
) -> Reserved:
    return budget.reserve(of, run=run, round_number=round_number, purpose=purpose, patients=patients)


def _refusal(budget: Budget, of: Plan, **how: Any) -> SiteFailure:
    with pytest.raises(SiteFailure) as found:
        _reserve(budget, of, **how)
    return found.value


# --- how much noise, how often


def test_the_releases_of_a_fold_are_those_that_the_plan_makes_and_the_spare_ones() -> None:
    of = private(rounds=7, evaluation__every_rounds=3, spare_rounds=2)
    assert {fold: releases(of, fold) for fold in ("train", "validation", "test")} == {  # type: ignore[arg-type]
        "train": 9,
        "validation": 4 + 2,  # after the rounds 1, 3, 6 and 7
        "test": 3,
    }
    untold = private(release={"training_loss": False, "metrics": []}, metrics_epsilon=None)
    assert [releases(untold, "validation"), releases(untold, "test")] == [0, 0]


def test_patients_are_drawn_at_the_rate_of_the_batch_and_an_epoch_draws_each_once() -> None:
    assert drawing(private(), 40) == (0.1, 2)
    assert drawing(private(), 3) == (1.0, 2)
    epochs = private(training__local_steps=None, training__local_epochs=3)
    assert drawing(epochs, 41) == (4 / 41, 3 * 11)


@pytest.mark.parametrize("purpose", ["train", "validation", "test"])
def test_all_releases_of_a_run_come_to_the_plans_epsilon_and_not_beyond(purpose: Fold) -> None:
    of = private()
    one, limit = one_release(of, purpose, 40)
    asked = 2.0 if purpose == "train" else 1.0
    assert (limit.epsilon, limit.delta) == (asked, 1e-3)
    whole = epsilon([replace(one, steps=one.steps * releases(of, purpose))], limit.delta)
    assert 0.97 * asked < whole <= asked


def test_a_run_may_use_what_all_its_folds_come_to() -> None:
    of = private()
    found = whole_run(of, {"train": 40, "validation": 0, "test": 10})
    assert [one.steps for one in found] == [2 * 3, 2]


def test_delta_is_the_plans_or_a_tenth_of_one_in_the_number_of_patients() -> None:
    assert one_release(private(delta=1e-3), "train", 40)[1].delta == 1e-3
    assert one_release(private(delta=2e-2), "train", 40)[1].delta == 1 / 400


def test_a_delta_above_one_in_the_number_of_patients_is_refused_with_the_numbers(tmp_path: Path) -> None:
    budget = _budget(tmp_path)
    refused = _refusal(budget, private(delta=0.03))
    assert refused.code is Code.PRIVACY_REFUSED
    assert (
        refused.detail
        == "the plan's delta 0.03 is above 1/N = 0.025 of the 40 patients of the train fold; 0.0025 would do"
    )
    assert len(budget.ledger.rows()) == 1
    own = _refusal(_budget(tmp_path, ledger_delta=0.05), private())
    assert (own.code, "the policy's ledger_delta 0.05" in own.detail) == (Code.PRIVACY_REFUSED, True)


def test_a_fold_without_a_patient_reserves_nothing(tmp_path: Path) -> None:
    budget = _budget(tmp_path)
    assert _refusal(budget, private(), purpose="test", patients=0).code is Code.NO_DATA
    assert len(budget.ledger.rows()) == 1


# --- limits


def test_a_run_has_its_rounds_and_its_spare_ones_and_no_more(tmp_path: Path) -> None:
    budget, of = _budget(tmp_path), private(spare_rounds=1)
    for number in (1, 2, 2):
        _reserve(budget, of, round_number=number)
    refused = _refusal(budget, of, round_number=2)
    assert (refused.code, "the train fold in this run" in refused.detail) == (Code.BUDGET_SPENT, True)
    _reserve(budget, of, purpose="validation", patients=10)


def test_a_second_run_of_a_plan_has_a_budget_of_its_own_until_the_lifetime_is_spent(tmp_path: Path) -> None:
    budget, of = _budget(tmp_path, lifetime_epsilon=2.2, ledger_delta=1e-3), private(rounds=1, spare_rounds=0)
    first = _reserve(budget, of)
    assert first.reservation.of_lifetime == first.reservation.of_run <= 2.0
    refused = _refusal(budget, of, run="run-2")
    assert (refused.code, "all that the population 'patients' has spent" in refused.detail) == (Code.BUDGET_SPENT, True)


def test_a_damaged_ledger_refuses_every_private_step(tmp_path: Path) -> None:
    budget, of = _budget(tmp_path), private()
    kept = _reserve(budget, of)
    budget.ledger.close()
    budget.ledger.path.write_bytes(b"SQLite format 3\0" + bytes(5000))
    assert _refusal(budget, of).code is Code.PRIVACY_REFUSED
    assert "restore it from a backup" in _refusal(budget, of).detail
    with pytest.raises(SiteFailure, match="PRIVACY_REFUSED"):
        budget.commit(kept)


# --- the statement


def test_the_statement_says_what_the_run_has_spent_and_is_the_sites(tmp_path: Path) -> None:
    budget, of = _budget(tmp_path), private()
    _reserve(budget, of)
    second = _reserve(budget, of, round_number=2)
    statement = budget.commit(second).encode()
    assert open_spent(statement, _KEY.public_key()) == Spent(
        site="north",
        run=RUN,
        plan=of.digest,
        round=2,
        purpose="train",
        at=_NOW.timestamp(),
        epsilon=epsilon([replace(second.mechanism, steps=4)], 1e-3),
        delta=1e-3,
    )
    with pytest.raises(EnvelopeError):
        open_spent(statement, new_key().public_key())
    assert [row.kind for row in budget.ledger.rows()] == ["opened", "reserve", "reserve", "commit"]


# --- the agent


def _circle(tmp_path: Path, of: Plan, **policy: Any) -> Circle:
    return Circle(tmp_path, of, policies={"north": policy})


def _trained(circle: Circle, number: int = 1) -> Message:
    return circle.ask("north", TRAIN, TrainTask(plan_digest=circle.of.digest, round=number), circle.model)


def _measured(circle: Circle, fold: str = "test") -> Message:
    task = EvaluateTask.model_validate({"plan_digest": circle.of.digest, "round": 1, "fold": fold})
    return circle.ask("north", EVALUATE, task, circle.model)


def _rows(circle: Circle) -> list[tuple[str, str | None, int | None]]:
    return [(row.kind, row.purpose, row.round) for row in Ledger(circle.folder / "north" / "ledger.sqlite").rows()][1:]


def test_an_agent_reserves_trains_with_that_noise_commits_and_says_what_was_spent(tmp_path: Path) -> None:
    circle = _circle(tmp_path, private())
    header, _ = unpack(answered(_trained(circle)), TrainResult)
    one, limit = one_release(circle.of, "train", 40)
    assert circle.hands["north"].private == [{"noise": one.noise, "rate": 0.1}]
    assert _rows(circle) == [("reserve", "train", 1), ("commit", "train", 1)]
    key = certified_key(circle.credentials["north"].certificate)
    spent = open_spent((header.spent or "").encode(), key)
    assert (spent.run, spent.round, spent.purpose, spent.delta) == (RUN, 1, "train", limit.delta)
    assert spent.epsilon == epsilon([one], limit.delta)


def test_of_a_private_plan_no_loss_and_no_number_of_images_leaves(tmp_path: Path) -> None:
    circle = _circle(tmp_path, private())
    header, _ = unpack(answered(_trained(circle)), TrainResult)
    assert (header.loss, header.weight) == (None, 40.0)  # of 10 images the worker told: patients are not protected
    measured, _ = unpack(answered(_measured(circle)), EvaluateResult)
    assert measured.cases == 10


def test_metrics_are_reserved_by_fold_with_a_noise_of_their_own(tmp_path: Path) -> None:
    circle = _circle(tmp_path, private())
    for fold in ("validation", "test"):
        header, _ = unpack(answered(_measured(circle, fold)), EvaluateResult)
        key = certified_key(circle.credentials["north"].certificate)
        assert open_spent((header.spent or "").encode(), key).purpose == fold
    noises = [one_release(circle.of, fold, 10)[0].noise for fold in ("validation", "test")]  # type: ignore[arg-type]
    assert circle.hands["north"].private == [{"noise": noise} for noise in noises]


def test_a_plan_that_releases_no_metric_spends_nothing_when_it_measures(tmp_path: Path) -> None:
    of = private(release={"training_loss": False, "metrics": []}, metrics_epsilon=None)
    circle = _circle(tmp_path, of)
    header, sums = unpack(answered(_measured(circle)), EvaluateResult)
    assert (header.spent, sums, _rows(circle)) == (None, {}, [])


def test_what_the_worker_failed_at_stays_reserved_and_the_next_try_reserves_anew(tmp_path: Path) -> None:
    circle = _circle(tmp_path, private())
    circle.hands["north"].value = float("nan")
    assert failure(_trained(circle))[0] == Code.UPDATE_REFUSED
    circle.hands["north"].value = 0.01
    answered(_trained(circle))
    assert _rows(circle) == [("reserve", "train", 1), ("reserve", "train", 1), ("commit", "train", 1)]


def test_more_steps_than_were_reserved_do_not_leave(tmp_path: Path) -> None:
    circle = _circle(tmp_path, private())
    circle.hands["north"].done["steps"] = 3
    assert failure(_trained(circle))[0] == Code.INTERNAL
    assert "3 steps, 2 were reserved" in circle.log_of("north")


def test_a_round_asked_for_too_often_is_refused_before_the_worker_trains(tmp_path: Path) -> None:
    circle = _circle(tmp_path, private(rounds=1, spare_rounds=0))
    answered(_trained(circle))
    assert failure(_trained(circle)) == (Code.BUDGET_SPENT, "BUDGET_SPENT")
    assert circle.hands["north"].asked.count("train") == 1
    assert "the train fold in this run would come to epsilon" in circle.log_of("north")


def test_an_agent_without_a_ledger_refuses_private_plans_and_no_other(tmp_path: Path) -> None:
    for of, expected in ((private(), Code.PRIVACY_REFUSED), (plan(), None)):
        circle = _circle(tmp_path, of)
        circle.agents["north"].budget = None
        reply = _trained(circle)
        assert (failure(reply)[0] if reply.has_error() else None) == expected


def test_with_a_damaged_ledger_private_plans_are_refused_and_others_go_on_and_the_log_says_so(tmp_path: Path) -> None:
    for of, expected in ((private(), Code.PRIVACY_REFUSED), (plan(), None)):
        circle = _circle(tmp_path, of)
        (tmp_path / "north" / "ledger.sqlite").write_bytes(b"no ledger at all" * 400)
        reply = _trained(circle)
        assert (failure(reply)[0] if reply.has_error() else None) == expected
    assert "the ledger does not know of this run" in circle.log_of("north")


def test_a_run_without_differential_privacy_is_noted_once_and_makes_no_statement(tmp_path: Path) -> None:
    circle = _circle(tmp_path, plan())
    assert unpack(answered(_trained(circle)), TrainResult)[0].spent is None
    answered(_trained(circle, 2))
    answered(_measured(circle))
    assert _rows(circle) == [("unprotected", "train", 1)]


def test_the_log_warns_from_the_policys_epsilon_on(tmp_path: Path) -> None:
    circle = _circle(tmp_path, private(), warn_epsilon=0.1)
    answered(_trained(circle))
    assert "the ledger stands at epsilon" in circle.log_of("north")
    quiet = _circle(tmp_path / "quiet", private())
    answered(_trained(quiet))
    assert not (tmp_path / "quiet" / "north" / "site.log").exists()


# --- within a secure sum


def test_a_masked_update_comes_with_the_statement_and_without_a_loss(tmp_path: Path) -> None:
    circle = Circle(tmp_path, private(secure=True)).set_up()
    header, _ = unpack(answered(circle.give("north", circle.context())), MaskedResult)
    key = certified_key(circle.credentials["north"].certificate)
    assert open_spent((header.spent or "").encode(), key).purpose == "train"
    assert header.loss is None
    assert _rows(circle) == [("reserve", "train", 1), ("commit", "train", 1)]


def test_masked_metrics_come_with_the_statement_of_their_fold(tmp_path: Path) -> None:
    circle = Circle(tmp_path, private(secure=True)).set_up()
    header, _ = unpack(answered(circle.give("north", circle.context(purpose="validation"))), MaskedResult)
    key = certified_key(circle.credentials["north"].certificate)
    assert open_spent((header.spent or "").encode(), key).purpose == "validation"


def test_a_site_without_a_patient_of_the_fold_gives_zeros_and_says_as_others_do_what_it_has_spent_which_is_nothing(
    tmp_path: Path,
) -> None:
    circle = Circle(tmp_path, private(secure=True)).set_up()
    circle.hands["north"].patients = {"train": 40, "validation": 0, "test": 0}
    header, _ = unpack(answered(circle.give("north", circle.context(purpose="test"))), MaskedResult)
    spent = json.loads(header.spent or "{}")["body"]
    assert (spent["purpose"], spent["epsilon"], _rows(circle)) == ("test", 0, [])
