from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from locum.common.errors import Code, SiteFailure
from locum.common.identity import new_key
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
from locum.common.names import METRICS
from locum.site_client import gate
from locum.site_client.agent import Agent
from locum.site_client.gate import Made, Policy, PolicyRefusal
from tests.readiness import ready
from tests.site_client.asking import failure, plan, segmentation_plan, send_training

_FOUND = {
    "configuration": {"torch": "2"},
    "cases": {"train": 7, "validation": 3, "test": 3},
    "missing_classes": ["lesion"],
    "able": False,
    "reason": "7 training patients fit the contract, which asks for 10",
    "patients": ["Mustermann"],
}
_DONE = {"loss": 0.5, "steps": 2, "cases": 7, "seconds": 1.0, "host": "pacs.hospital"}


@pytest.mark.parametrize(
    ("clause", "policy", "changes"),
    [
        ("tasks", {"tasks": ["segmentation"]}, {}),
        ("networks", {"networks": ["DenseNet121"]}, {}),
        ("metrics", {"metrics": ["AUC"]}, {}),
        ("most_rounds", {"most_rounds": 1}, {}),
        ("release_case_counts", {"release_case_counts": False}, {"participation__weighting": "cases"}),
        ("release_case_counts", {"release_case_counts": False}, {"participation__weighting": "equal"}),
    ],
)
def test_each_clause_of_the_policy_refuses_and_tells_its_name_alone(
    clause: str, policy: dict[str, Any], changes: dict[str, Any], employ: Callable[..., Agent]
) -> None:
    of = plan(**changes)
    code, reason = failure(send_training(employ(**policy), of))
    assert (code, reason) == (Code.POLICY_REFUSED, f"POLICY_REFUSED {clause}")


def test_a_refused_plan_never_reaches_the_worker(employ: Callable[..., Agent]) -> None:
    agent, of = employ(most_rounds=1), plan()
    agent.worker.stop()
    send_training(agent, of)
    assert agent.worker.pid is None


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"tasks": ["classification"], "networks": ["Classifier", "UNet"], "metrics": ["AUC", "accuracy"]},
        {"most_rounds": 2},
    ],
)
def test_a_plan_within_the_policy_is_admitted(policy: dict[str, Any]) -> None:
    gate.admit_plan(Policy.model_validate(policy), plan())


@pytest.mark.parametrize("name", METRICS)
def test_a_policy_that_keeps_numbers_of_cases_refuses_every_metric_for_its_sums_tell_them(name: str) -> None:
    base = plan if "classification" in METRICS[name].tasks else segmentation_plan
    of = base(participation__weighting="equal", evaluation={"metrics": [name]})
    silent = base(participation__weighting="equal", evaluation={"metrics": [name]}, release={"metrics": []})
    with pytest.raises(PolicyRefusal, match=f"the sums of {name} would tell the number of cases"):
        gate.admit_plan(Policy(release_case_counts=False), of)
    gate.admit_plan(Policy(release_case_counts=False), silent)


def test_a_policy_names_the_first_clause_that_a_plan_breaks() -> None:
    with pytest.raises(PolicyRefusal) as refused:
        gate.admit_plan(Policy(tasks=("classification",), most_rounds=1), segmentation_plan())
    assert refused.value.clause == "tasks"


@pytest.mark.parametrize("key", ["most_round", "allow_everything", "Tasks"])
def test_an_unknown_key_in_a_policy_is_fatal(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        Policy.model_validate({key: 1})


def test_a_description_is_copied_field_by_field() -> None:
    released = pack(*gate.release_description(Policy(), plan(), "north", _FOUND))
    found, tensors = unpack(released, Description)
    assert found.cases == _FOUND["cases"]
    assert found.missing_classes == ("lesion",)
    assert tensors == {}
    assert b"Mustermann" not in released["locum"]["json"]  # type: ignore[index,operator]


def test_a_description_of_data_that_are_not_ready_has_no_number() -> None:
    of = plan()
    said = ready(of, "north", new_key(), "run", ("least_patients",))
    found, _ = unpack(pack(*gate.release_description(Policy(), of, "north", _FOUND, said)), Description)
    assert (found.able, found.cases, found.missing_classes) == (False, None, ())
    assert found.reason == "the contract is not met: least_patients"


_no_counts = pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ({"release_case_counts": False}, {"release": {"metrics": []}}),
        ({}, {"release": {"metrics": [], "case_counts": False}}),
    ],
)


@_no_counts
def test_counts_and_all_that_tells_them_stay_when_policy_or_plan_says_so(
    policy: dict[str, Any], changes: dict[str, Any]
) -> None:
    of = plan(participation__weighting="equal", **changes)
    allowed = Policy.model_validate(policy)
    gate.admit_plan(allowed, of)
    told, _ = unpack(pack(*gate.release_description(allowed, of, "north", _FOUND)), Description)
    assert (told.cases, told.missing_classes, told.reason) == (None, (), "the contract is not met")
    task = EvaluateTask(plan_digest=of.digest, round=1, fold="test")
    sums = {"AUC": np.zeros(4), "accuracy": np.zeros(4)}
    measured = pack(*gate.release_metrics(allowed, of, task, Made(sums, {"cases": 3})))
    assert unpack(measured, EvaluateResult)[0].cases is None
    assert _update(of, allowed, np.ones(3, np.float32)).weight == 1.0


@_no_counts
def test_steps_that_tell_the_number_of_cases_stay_with_it(policy: dict[str, Any], changes: dict[str, Any]) -> None:
    epochs = {"training__local_steps": None, "training__local_epochs": 2, "training__batch_size": 1}
    equal: dict[str, Any] = {"participation__weighting": "equal", **changes}
    allowed, update = Policy.model_validate(policy), np.ones(3, np.float32)
    assert _update(plan(**epochs, **equal), allowed, update).steps is None
    assert _update(plan(**equal), allowed, update).steps == 2
    assert _update(plan(**epochs), Policy(), update).steps == 2


@pytest.mark.parametrize(
    ("policy", "changes"), [({"release_training_loss": False}, {}), ({}, {"release": {"training_loss": False}})]
)
def test_the_loss_stays_when_policy_or_plan_says_so(policy: dict[str, Any], changes: dict[str, Any]) -> None:
    assert _update(plan(), Policy(), np.ones(3, np.float32)).loss == 0.5
    assert _update(plan(**changes), Policy.model_validate(policy), np.ones(3, np.float32)).loss is None


def test_only_the_metrics_that_the_plan_releases_leave() -> None:
    of = plan(release={"metrics": ["accuracy"]})
    task = EvaluateTask(plan_digest=of.digest, round=1, fold="test")
    sums = {"AUC": np.ones(4), "accuracy": np.zeros(4), "ages": np.ones(4)}
    _, left = unpack(pack(*gate.release_metrics(Policy(), of, task, Made(sums, {"cases": 3}))), EvaluateResult)
    assert set(left) == {"accuracy"}


def test_a_weight_is_the_number_of_cases_up_to_the_cap_or_one() -> None:
    assert _update(plan(), Policy(), np.ones(3, np.float32)).weight == 7.0
    assert _update(plan(admission__weight_cap=5), Policy(), np.ones(3, np.float32)).weight == 5.0
    assert _update(plan(participation__weighting="equal"), Policy(), np.ones(3, np.float32)).weight == 1.0


@pytest.mark.parametrize(
    "update",
    [
        {"w": np.array([1, np.nan, 0], np.float32)},
        {"w": np.array([np.inf, 0, 0], np.float32)},
        {"w": np.array([1e4, 0, 0], np.float32)},
        {"w": np.zeros(3)},
        {"w": np.zeros((3, 1), np.float32)},
        {"v": np.zeros(3, np.float32)},
        {},
    ],
    ids=["nan", "infinite", "norm", "dtype", "shape", "name", "missing"],
)
def test_an_update_that_no_coordinator_may_fold_does_not_leave(update: Tensors) -> None:
    of = plan()
    task = TrainTask(plan_digest=of.digest, round=1)
    with pytest.raises(SiteFailure) as refused:
        gate.release_update(Policy(), of, task, model={"w": np.zeros(3, np.float32)}, made=Made(update, _DONE))
    assert refused.value.code is Code.UPDATE_REFUSED


def test_a_failure_leaves_as_its_code() -> None:
    error = gate.release_failure(SiteFailure(Code.DATA_UNREADABLE, "/data/Mustermann.dcm"))
    assert (error.code, error.reason) == (105, "DATA_UNREADABLE")


def _update(of: Any, policy: Policy, value: np.ndarray) -> TrainResult:
    task = TrainTask(plan_digest=of.digest, round=1)
    made = Made({"w": value}, _DONE)
    released = gate.release_update(policy, of, task, model={"w": np.zeros(3, np.float32)}, made=made)
    return unpack(pack(*released), TrainResult)[0]
