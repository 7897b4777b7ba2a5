"""Committed rounds on disk: one folder a round, complete or absent.

`round-000012/` holds `model.safetensors`, `strategy.safetensors`, `state.json` (round, plan digest, SHA-256 of both and
the history) and, once measured, `evaluation.json`. Round 0 is the model that the plan's seed gives. A folder is written
beside, flushed and renamed, so a crash at any byte leaves the round before it. The last two and the best one are kept.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from locum.common.build import Model
from locum.common.canonical import sha256_hex
from locum.common.durable import create_folder, replace_file
from locum.common.errors import RunError
from locum.common.plan import Plan
from locum.server.records import Evaluated, RoundRecord

_KEPT = 2


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    round: int
    plan_digest: str
    model_sha256: str
    strategy_sha256: str
    roster: tuple[str, ...]
    history: tuple[RoundRecord, ...]


@dataclass(frozen=True)
class Committed:
    """A run after some round: what the next round starts from."""

    round: int
    model: Model
    strategy: Model
    roster: tuple[str, ...]
    history: tuple[RoundRecord, ...]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder = folder
        self._plan = plan
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob(".round-*.tmp"):
            shutil.rmtree(unfinished)

    def _path(self, round_number: int) -> Path:
        return self._folder / f"round-{round_number:06d}"

    def rounds(self) -> list[int]:
        """The rounds that are on disk, ascending."""
        return sorted(int(path.name.removeprefix("round-")) for path in self._folder.glob("round-*"))

    def commit(self, committed: Committed, *, keep: int | None = None) -> None:
        """Writes a round durably, then forgets rounds that are neither recent nor `keep`; raises OSError."""
        model, strategy = save(committed.model), save(committed.strategy)
        state = _State(
            round=committed.round,
            plan_digest=self._plan.digest,
            model_sha256=sha256_hex(model),
            strategy_sha256=sha256_hex(strategy),
            roster=committed.roster,
            history=committed.history,
        )
        files = {
            "model.safetensors": model,
            "strategy.safetensors": strategy,
            "state.json": state.model_dump_json(indent=1).encode(),
        }
        create_folder(self._path(committed.round), files)
        for old in self.rounds()[:-_KEPT]:
            if old != keep:
                shutil.rmtree(self._path(old))

    def add_evaluation(self, evaluated: Evaluated) -> None:
        """Adds the metrics of a committed round; raises OSError."""
        content = evaluated.model_dump_json(indent=1).encode()
        replace_file(self._path(evaluated.round) / "evaluation.json", content)

    def latest(self) -> Committed | None:
        """The newest committed round, or None before the first; raises RunError if it is damaged or foreign."""
        rounds = self.rounds()
        return self.load(rounds[-1]) if rounds else None

    def load(self, round_number: int) -> Committed:
        """A committed round, its digests checked; raises RunError."""
        folder = self._path(round_number)
        remedy = f"remove {folder} to go on from the round before it"
        try:
            state = _State.model_validate_json((folder / "state.json").read_bytes())
            model = (folder / "model.safetensors").read_bytes()
            strategy = (folder / "strategy.safetensors").read_bytes()
            history = _with_evaluation(folder / "evaluation.json", state.history)
        except (OSError, ValidationError) as error:
            raise RunError(f"the checkpoint {folder} cannot be read", remedy) from error
        if state.plan_digest != self._plan.digest:
            raise RunError(f"{folder} belongs to another plan", "resume with the plan.yaml of that folder")
        if (sha256_hex(model), sha256_hex(strategy)) != (state.model_sha256, state.strategy_sha256):
            raise RunError(f"the checkpoint {folder} is damaged: a digest does not match", remedy)
        try:
            tensors = load(model), load(strategy)
        except SafetensorError as error:
            raise RunError(f"the checkpoint {folder} cannot be read", remedy) from error
        return Committed(state.round, *tensors, state.roster, history)


def _with_evaluation(path: Path, history: tuple[RoundRecord, ...]) -> tuple[RoundRecord, ...]:
    """The history with the metrics of its last round, where they were measured; raises OSError or ValidationError."""
    if not path.exists() or not history:
        return history
    evaluated = Evaluated.model_validate_json(path.read_bytes())
    return (*history[:-1], history[-1].model_copy(update={"evaluation": evaluated}))
