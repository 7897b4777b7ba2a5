"""The model card: what the model is, what it was trained on, how it did, and what nobody should assume of it.

After Mitchell et al., Model Cards for Model Reporting (FAT* 2019), with the items of CLAIM and TRIPOD+AI that a run can
answer (:mod:`locum.server.guidelines`). What the plan does not state is listed as not stated; nothing is filled in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from locum.common import build
from locum.common.durable import replace_file
from locum.common.log.note import opened
from locum.common.log.store import CHECKPOINTS
from locum.common.plan import Plan
from locum.server.guidelines import NOT_STATED, PARTS
from locum.server.templates import markdown

MODEL_FILE, CARD_FILE, FACTS_FILE = "model.safetensors", "model_card.md", "model_card.json"


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


def write_card(folder: Path, template: str, context: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Writes the card and its facts, by a template that extends `card.md.j2`; raises OSError."""
    items = {name: part.text for name, part in PARTS.items()}
    content = markdown(template, {**context, "card": facts, "items": items, "not_stated": NOT_STATED})
    replace_file(folder / CARD_FILE, content)
    replace_file(folder / FACTS_FILE, json.dumps(facts, indent=1, ensure_ascii=False).encode())


def newest_checkpoint(log: Path) -> dict[str, Any] | None:
    """What the newest signed checkpoint of a log says; None if there is none. The log is only read."""
    path = log / CHECKPOINTS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # what follows the last newline is not whole
    notes = [row["checkpoint"] for row in map(json.loads, lines) if "checkpoint" in row]
    if not notes:
        return None
    checkpoint, _ = opened(notes[-1])
    return {"origin": checkpoint.origin, "size": checkpoint.size, "root": checkpoint.root.hex()}
