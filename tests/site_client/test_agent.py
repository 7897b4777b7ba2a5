from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from locum.common import build
from locum.common.errors import Code
from locum.common.fab import build_bundle
from locum.common.messages import DESCRIBE, EVALUATE, TRAIN, DescribeTask, EvaluateTask, TrainTask, pack
from locum.simulations.preparation import Prepared
from locum.site_client.agent import Agent
from tests.plans import initial
from tests.site_client.asking import (
    Picture,
    batch_norm_plan,
    describe,
    evaluate,
    failure,
    message,
    nifti_store,
    plan,
    send,
    send_training,
    train,
    training,
)

_NAME = "Mustermann^Erika"


def _log(agent: Agent) -> str:
    (handler,) = agent.log.handlers
    return Path(handler.baseFilename).read_text()  # type: ignore[attr-defined]


def test_a_description_agrees_with_the_coordinators_own_resolution_of_the_plan(agent: Agent) -> None:
    of = plan()
    found = describe(agent, of)
    assert found.site == "north"
    assert found.able
    assert found.reason == ""
    assert found.cases == {"train": 7, "validation": 3, "test": 3}
    assert found.configuration == build.configuration(of, initial(of))


def test_an_update_is_the_change_to_every_shared_tensor(agent: Agent) -> None:
    of = plan(training__local_steps=3)
    model = initial(of)
    header, update = train(agent, of, model, 2)
    assert (header.round, header.steps, header.weight) == (2, 3, 7.0)
    assert header.loss is not None
    assert 0 < header.loss < 10
    assert {name: (array.shape, array.dtype) for name, array in update.items()} == {
        name: (array.shape, array.dtype) for name, array in model.items()
    }
    assert 0 < max(np.abs(array).max() for array in update.values()) < 1


def test_the_sums_of_an_evaluation_count_the_cases_of_the_fold(agent: Agent) -> None:
    of = plan(evaluation__metrics=["AUC", "accuracy", "confusion"])
    header, sums = evaluate(agent, of, initial(of))
    assert header.cases == 3
    assert sums["confusion"].sum() == 3
    assert sums["confusion"].reshape(2, 2).sum(axis=1).tolist() == [2, 1]
    assert build.metric_of("accuracy").value(sums["accuracy"], 2) in {0.0, 1 / 3, 2 / 3, 1.0}


def test_only_released_metrics_leave_an_agent(agent: Agent) -> None:
    of = plan(release={"metrics": ["accuracy"], "case_counts": False}, participation__weighting="equal")
    header, sums = evaluate(agent, of, initial(of))
    assert header.cases is None
    assert set(sums) == {"accuracy"}


def test_a_message_of_another_plan_than_the_bundles_is_refused(agent: Agent) -> None:
    of, other = plan(), plan(seed=1)
    model = initial(of)
    contents = {
        DESCRIBE: pack(DescribeTask(plan_digest=other.digest)),
        TRAIN: training(other, model),
        EVALUATE: pack(EvaluateTask(plan_digest=other.digest, round=0, fold="test"), model),
    }
    for kind, content in contents.items():
        assert failure(send(agent, of, content, kind)) == (Code.PLAN_MISMATCH, "PLAN_MISMATCH")


def test_a_round_that_the_plan_does_not_have_is_refused(agent: Agent) -> None:
    of = plan(rounds=2)
    model = initial(of)
    beyond = {
        TRAIN: training(of, model, 3),
        EVALUATE: pack(EvaluateTask(plan_digest=of.digest, round=3, fold="test"), model),
    }
    for kind, content in beyond.items():
        assert failure(send(agent, of, content, kind)) == (Code.PLAN_MISMATCH, "PLAN_MISMATCH")
    assert not send(agent, of, training(of, model, 2), TRAIN).has_error()


def _garbled() -> list[RecordDict]:
    digest = plan().digest
    return [
        RecordDict({}),
        RecordDict({"locum": ConfigRecord({"json": b"\x80\x04."})}),
        RecordDict({"locum": ConfigRecord({"json": "text"})}),
        RecordDict({"locum": ArrayRecord({})}),
        pack(DescribeTask(plan_digest=digest)),
        pack(EvaluateTask(plan_digest=digest, round=1, fold="test")),
        pack(TrainTask(plan_digest=digest, round=1)),
        pack(TrainTask(plan_digest=digest, round=1), {"weight": np.zeros(3, np.float32)}),
        pack(TrainTask(plan_digest=digest, round=1), {n: a[..., None] for n, a in initial(plan()).items()}),
    ]


@pytest.mark.parametrize("number", range(9))
def test_a_garbled_message_is_unreadable_and_the_agent_goes_on(number: int, agent: Agent) -> None:
    of = plan()
    reply = send(agent, of, _garbled()[number], TRAIN)
    assert failure(reply) == (Code.MESSAGE_UNREADABLE, "MESSAGE_UNREADABLE")
    assert describe(agent, of).able


@pytest.mark.parametrize(
    "kind", ["query", "query.pictures", "query.outcomes", "query.unmasked", "train.fit_alone", "evaluate.outcomes"]
)
def test_no_message_type_but_those_of_the_protocol_leads_anywhere(kind: str, employ: Callable[..., Agent]) -> None:
    agent, of = employ(), plan()
    agent.worker.stop()
    assert failure(send(agent, of, training(of, initial(of)), kind))[0] == Code.MESSAGE_UNREADABLE
    assert agent.worker.pid is None


@pytest.mark.parametrize("bundle", [b"", b"no zip", b"PK\x05\x06" + bytes(18), b"\x80\x04]."])
def test_a_bundle_that_holds_no_plan_is_refused(bundle: bytes, agent: Agent) -> None:
    of = plan()
    reply = agent.handle(message(training(of, initial(of)), TRAIN), bundle)
    assert failure(reply) == (Code.PLAN_UNREADABLE, "PLAN_UNREADABLE")


def test_a_bundle_whose_plan_names_code_is_refused(agent: Agent) -> None:
    of = plan()
    evil = build_bundle(of.model_copy(update={"network": of.network.model_copy(update={"name": "os.system"})}))
    reply = agent.handle(message(training(of, initial(of)), TRAIN), evil)
    assert failure(reply) == (Code.PLAN_UNREADABLE, "PLAN_UNREADABLE")


def test_a_plan_whose_parts_cannot_be_built_is_said_before_the_first_round(agent: Agent) -> None:
    for changes in (
        {"network": {"name": "Classifier", "channels": [4, 6]}},
        {"network": {"name": "ResNet10", "norm": "nosuch"}},
        {"optimiser": {"name": "SGD", "rate": 1}},
        {"loss": {"name": "CrossEntropyLoss", "nosuch": 1}},
        {"transforms__augment": [{"name": "RandFlipd", "probability": 1}]},
    ):
        of = plan(**changes)
        reply = send(agent, of, pack(DescribeTask(plan_digest=of.digest)), DESCRIBE)
        assert failure(reply) == (Code.PLAN_UNBUILDABLE, "PLAN_UNBUILDABLE"), changes


def test_a_path_with_a_patients_name_stays_in_the_sites_own_log(
    hospitals: dict[str, Prepared], employ: Callable[..., Agent], tmp_path: Path
) -> None:
    store = shutil.copytree(hospitals["north"].store, tmp_path / "store")
    for image in (store / "volumes").iterdir():
        image.write_bytes(b"")
    agent, of = employ(store=store, folder=_NAME), plan()
    reply = send_training(agent, of)
    assert failure(reply) == (Code.DATA_UNREADABLE, "DATA_UNREADABLE")
    assert _NAME not in repr(vars(reply)) + repr(vars(reply.metadata))
    assert _NAME in _log(agent)


def test_a_label_with_a_patients_name_stays_in_the_sites_own_log(employ: Callable[..., Agent], tmp_path: Path) -> None:
    volume = np.zeros((16, 16, 8), np.int16)
    labels = ["lesion", "no_lesion", _NAME]
    store = nifti_store(tmp_path / "site", [Picture(f"i{n}", volume + n, label) for n, label in enumerate(labels)])
    agent, of = employ(store=store), plan(contract__modality=None)
    reply = send_training(agent, of)
    assert failure(reply) == (Code.DATA_UNREADABLE, "DATA_UNREADABLE")
    assert _NAME not in repr(vars(reply)) + repr(vars(reply.metadata))
    assert _NAME in _log(agent)
    found = describe(agent, of)
    assert not found.able
    assert found.reason == "the contract is not met: classes"
    assert _NAME not in found.model_dump_json()


def test_an_error_nobody_foresaw_leaves_as_a_code_and_stays_as_a_traceback(employ: Callable[..., Agent]) -> None:
    agent, of = employ(folder=_NAME), batch_norm_plan()
    run_dir = agent.worker.settings.run_dir
    run_dir.mkdir(exist_ok=True)
    (run_dir / of.digest[:16]).write_text("a file where the folder of local tensors should be")
    reply = send_training(agent, of)
    assert failure(reply) == (Code.INTERNAL, "INTERNAL")
    assert _NAME not in repr(vars(reply)) + repr(vars(reply.metadata))
    assert "Traceback" in _log(agent)
    assert _NAME in _log(agent)


def test_a_site_without_a_catalog_says_that_its_data_cannot_be_read(
    employ: Callable[..., Agent], tmp_path: Path
) -> None:
    agent, of = employ(store=tmp_path / "nowhere"), plan()
    assert failure(send_training(agent, of))[0] == Code.DATA_UNREADABLE
    assert "holds no catalog" in _log(agent)


def test_a_site_without_a_fitting_case_is_not_able_and_says_which_clauses_it_does_not_meet(agent: Agent) -> None:
    of = plan(contract__modality=["MR"], contract__least_patients=3)
    found = describe(agent, of)
    assert not found.able
    assert (found.cases, found.reason) == (None, "the contract is not met: modality, dimensions, least_patients")
    assert failure(send_training(agent, of)) == (Code.NO_DATA, "NO_DATA")


def test_a_step_to_infinity_never_leaves(agent: Agent) -> None:
    for changes in (
        {"optimiser": {"name": "SGD", "lr": 3e38, "weight_decay": 1e3}, "training__local_steps": 1},
        {"admission__norm_bound": 1e-9},
    ):
        of = plan(**changes)
        assert failure(send_training(agent, of)) == (Code.UPDATE_REFUSED, "UPDATE_REFUSED")


def test_a_loss_that_is_not_finite_is_named_for_what_it_is(agent: Agent) -> None:
    of = plan(optimiser={"name": "SGD", "lr": 1e30}, training__local_steps=4)
    assert failure(send_training(agent, of)) == (Code.LOSS_NOT_FINITE, "LOSS_NOT_FINITE")
    assert describe(agent, of).able
