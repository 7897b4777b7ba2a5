"""What tests of the site share: the coordinator's side of a conversation, plans, and a site of NIfTI files."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from locum.common.build import Model
from locum.common.fab import build_bundle
from locum.common.messages import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    DescribeTask,
    Description,
    EvaluateResult,
    EvaluateTask,
    Tensors,
    TrainResult,
    TrainTask,
    pack,
    unpack,
)
from locum.common.plan import Plan, parse_plan
from locum.site_client.agent import Agent
from locum.site_client.imaging.ingest import ingest
from locum.site_client.imaging.keys import Keys
from locum.site_client.imaging.sources import load_site
from tests.plans import CLASSIFY, initial, with_changes

SEGMENT: dict[str, Any] = with_changes(
    CLASSIFY,
    contract={"task": "segmentation", "modality": ["CT"], "classes": ["background", "lesion"]},
    network={"name": "UNet", "channels": [4, 8], "strides": [2]},
    loss={"name": "DiceCELoss"},
    evaluation={"metrics": ["Dice", "surface_distance"]},
)
_SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}


def plan(**changes: Any) -> Plan:
    """The classification plan with changes; every fold of the small hospitals has cases of both classes."""
    return _plan(CLASSIFY, **changes)


def segmentation_plan(**changes: Any) -> Plan:
    """The segmentation plan with changes."""
    return _plan(SEGMENT, **changes)


def batch_norm_plan(**changes: Any) -> Plan:
    """A plan whose network has batch normalisation; its running statistics stay at the site."""
    network = {"name": "ResNet10", "widen_factor": 0.0625, "norm": "batch"}
    return plan(**{"contract__modality": None, "network": network, **changes})


def _plan(base: dict[str, Any], **changes: Any) -> Plan:
    content = with_changes(base, **{"contract__split": _SPLIT, **changes})
    return parse_plan(json.dumps(content).encode())


def moved(model: Model, update: Model) -> Model:
    """The model after an update."""
    return {name: model[name] + update[name] for name in model}


def equal(a: Tensors, b: Tensors) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def message(content: RecordDict, kind: str) -> Message:
    """A message as a grid delivers it."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    made = Message(content, 2, kind, group_id="1")
    made.metadata.__dict__["_message_id"] = "m1"
    return made


def send(agent: Agent, of: Plan, content: RecordDict, kind: str) -> Message:
    """The agent's reply to a message of the plan's run."""
    return agent.handle(message(content, kind), build_bundle(of))


def failure(reply: Message) -> tuple[int, str]:
    """The code and reason of an error reply; there must be nothing else."""
    assert reply.has_error()
    assert not reply.has_content()
    return reply.error.code, reply.error.reason or ""


def describe(agent: Agent, of: Plan) -> Description:
    """The site's description of itself."""
    return unpack(send(agent, of, pack(DescribeTask(plan_digest=of.digest)), DESCRIBE).content, Description)[0]


def training(of: Plan, model: Tensors, number: int = 1) -> RecordDict:
    """The content of a training message."""
    return pack(TrainTask(plan_digest=of.digest, round=number), model)


def send_training(agent: Agent, of: Plan) -> Message:
    """The agent's reply to the first training message of the plan's run."""
    return send(agent, of, training(of, initial(of)), TRAIN)


def train(agent: Agent, of: Plan, model: Tensors, number: int = 1) -> tuple[TrainResult, Tensors]:
    """The site's update in a round."""
    return unpack(send(agent, of, training(of, model, number), TRAIN).content, TrainResult)


def evaluate(agent: Agent, of: Plan, model: Tensors, number: int = 0) -> tuple[EvaluateResult, Tensors]:
    """The site's sums on its test fold."""
    task = EvaluateTask(plan_digest=of.digest, round=number, fold="test")
    return unpack(send(agent, of, pack(task, model), EVALUATE).content, EvaluateResult)


@dataclass(frozen=True)
class Picture:
    """One NIfTI image of a site: its voxels, channels last if there are any, and what the tables say of it."""

    name: str
    array: np.ndarray
    label: str = "lesion"
    fold: str = "train"
    mask: np.ndarray | None = None
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)


def nifti_store(folder: Path, pictures: list[Picture]) -> Path:
    """Writes NIfTI files with their tables, ingests them, and returns the store.

    A table without a validation set would have one cut out of the training set: then the first picture is in both.
    """
    if all(one.fold != "validation" for one in pictures):
        pictures = [*pictures, replace(pictures[0], name="another", fold="validation")]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for one in pictures:
        affine = np.diag([*one.spacing, 1.0])
        nibabel.save(nibabel.Nifti1Image(one.array, affine), folder / "images" / f"{one.name}.nii")
        if one.mask is not None:
            nibabel.save(nibabel.Nifti1Image(one.mask, affine), folder / "masks" / f"{one.name}.nii")
    _write_table(folder / "table.csv", pictures)
    masks = {"masks": "masks"} if any(one.mask is not None for one in pictures) else {}
    site = {
        "name": "by-hand",
        "sources": [{"kind": "nifti", "images": "images", **masks}],
        "labels": {"file": "table.csv", "key": "file", "key_column": "name", "label_column": "label"},
        "table": {"file": "table.csv", "key": "file", "key_column": "name", "fold_column": "fold"},
    }
    counts = ingest(load_site(site, base=folder), folder / "store", keys=Keys.of(bytes(range(32))))
    assert counts.cases == len(pictures), counts
    return folder / "store"


def _write_table(path: Path, pictures: list[Picture]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "label", "fold"])
        rows.writerows([one.name, one.label, one.fold] for one in pictures)
