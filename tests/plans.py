"""Plans for tests: small, valid, and easy to change by key."""

from __future__ import annotations

import copy
import json
from typing import Any

from locum.common import build
from locum.common.build import Model
from locum.common.plan import Plan, parse_plan

CLASSIFY: dict[str, Any] = {
    "name": "test",
    "purpose": "a small plan for tests",
    "contract": {"task": "classification", "modality": ["CT"], "classes": ["no_lesion", "lesion"]},
    "transforms": {
        "prepare": [
            {"name": "ScaleIntensityRanged", "a_min": -150, "a_max": 250, "b_min": 0.0, "b_max": 1.0, "clip": True},
            {"name": "Resized", "spatial_size": [16, 16, 8]},
        ],
        "augment": [{"name": "RandFlipd", "prob": 0.5, "spatial_axis": 0}],
    },
    "network": {"name": "Classifier", "channels": [4, 8]},
    "loss": {"name": "CrossEntropyLoss"},
    "optimiser": {"name": "SGD", "lr": 0.05},
    "training": {"input_size": [16, 16, 8], "batch_size": 4, "local_steps": 2},
    "rounds": 2,
    "participation": {"quorum": 2, "deadline": "60 s"},
    "protection": {"secure_aggregation": "off"},
    "evaluation": {"metrics": ["AUC", "accuracy"]},
}


def with_changes(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a plan's mapping; a key `a__b` changes `b` within `a`, None removes a key."""
    content = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = content
        for name in parents:
            section = section.setdefault(name, {})
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
    return content


def plan(**changes: Any) -> Plan:
    """The classification plan with changes."""
    return parse_plan(json.dumps(with_changes(CLASSIFY, **changes)).encode())


def secured(**changes: Any) -> Plan:
    """The classification plan with secure aggregation."""
    return plan(**{"protection__secure_aggregation": "required", "participation__quorum": 3, **changes})


def initial(of: Plan) -> Model:
    """The model that a coordinator sends in round 1."""
    return build.shared_tensors(*build.initial_state(of))
