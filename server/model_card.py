"""The model card: what the model is, what it was trained on, how it did, and what nobody should assume of it.

After Mitchell et al., Model Cards for Model Reporting (FAT* 2019). What the plan does not state is listed as not
stated; nothing is filled in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from locum.common import build
from locum.common.plan import Plan
from locum.server.templates import markdown

MODEL_FILE = "model.safetensors"

#: What a plan has no place for, and a person must add before anybody uses the model.
NOT_STATED = (
    "who is responsible for the model, and how to reach them",
    "the licence of the model, and of the data it was trained on",
    "ethical approval or the legal basis of using the images",
    "the patients: age, sex, ethnicity, indication, period of acquisition",
    "how the labels or masks were made, by whom, and how well readers agree",
    "uses that the model was not made for",
    "tests on patients of hospitals that took no part in training",
)


@dataclass(frozen=True)
class ModelFile:
    """What the model's file holds.

    Attributes:
        digest: SHA-256 of the file.
        tensors: number of tensors.
        parameters: numbers in all tensors.
        absent: tensors of the network that are not in the file, because they are local to a site or frozen.
    """

    digest: str
    size: int
    tensors: int
    parameters: int
    absent: tuple[str, ...]


def model_file(path: Path, plan: Plan) -> ModelFile:
    """Reads the header of a model's file and compares it with the plan's network; raises OSError."""
    with safe_open(path, "numpy") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ModelFile(
        digest=digest,
        size=path.stat().st_size,
        tensors=len(shapes),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        absent=tuple(name for name in _tensor_names(plan) if name not in shapes),
    )


def _tensor_names(plan: Plan) -> list[str]:
    """The names of all floating-point tensors of the plan's network."""
    state = build.skeleton(plan).state_dict()
    return [name for name, tensor in state.items() if tensor.is_floating_point()]


def model_card(template: str, context: Mapping[str, Any]) -> bytes:
    """The card from a report's context, by a template that extends `card.md.j2`."""
    return markdown(template, {**context, "not_stated": NOT_STATED})
