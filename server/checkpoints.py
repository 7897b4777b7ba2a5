"""Committed rounds on disk: one folder a round, complete or absent.

`round-000012/` holds `model.safetensors`, `strategy.safetensors`, `state.json` (round, plan digest, SHA-256 of both and
the history), `round.entry` (what the log is told of it) and, once measured, `evaluation.json` and `evaluation.entry`.
Round 0 is the model that the plan's seed gives. A folder is written beside, flushed and renamed, so a crash at any byte
leaves the round before it. The last two and the best one are kept.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from locum.common.blobs import Blob
from locum.common.durable import Write, create_folder, replace_file, write_synced
from locum.common.errors import RunError
from locum.common.messages import Arrays
from locum.common.plan import Plan
from locum.common.tensor_files import Mapped, TensorFileError, map_tensors, write_tensors
from locum.server.records import Evaluated, RoundRecord

_KEPT = 2
_MODEL, _STRATEGY = "model.safetensors", "strategy.safetensors"
_ENTRY, _EVALUATION, _EVALUATION_ENTRY = "round.entry", "evaluation.json", "evaluation.entry"


class DiskFullError(RunError):
    """There is no room for a round or for the result; what is committed is kept."""


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
    """A run after some round: what the next round starts from.

    `start` is the round that model and strategy are of, if that is an earlier one.
    """

    round: int
    model: Arrays
    strategy: Arrays
    roster: tuple[str, ...]
    history: tuple[RoundRecord, ...]
    start: int | None = None

    @property
    def model_sha256(self) -> str:
        """Of the model's file; raises TypeError for a model that is in none."""
        if not isinstance(self.model, Mapped):
            raise TypeError("only a committed model has a file")
        return self.model.sha256


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
        names = (path.name.removeprefix("round-") for path in self._folder.glob("round-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def commit(
        self, committed: Committed, *, keep: int | None = None, entry: Callable[[str], bytes] | None = None
    ) -> Committed:
        """Writes a round durably, then forgets rounds that are neither recent nor `keep`; raises OSError.

        `entry` makes what the log is told of the round, of the SHA-256 of its model's file. Returns the round with its
        tensors mapped from the disk: what is committed takes no memory.
        """
        blobs: dict[str, Blob] = {}

        def tensors(name: str, arrays: Arrays) -> Write:
            return lambda path: blobs.update({name: write_tensors(path, arrays, flush=True)})

        def state(path: Path) -> None:
            write_synced(path, self._state_of(committed, blobs).model_dump_json(indent=1).encode())

        parts = {_MODEL: committed.model, _STRATEGY: committed.strategy}
        files = {name: tensors(name, arrays) for name, arrays in parts.items()} | {"state.json": state}
        if entry is not None:
            files[_ENTRY] = lambda path: write_synced(path, entry(blobs[_MODEL].sha256))
        folder = self._path(committed.round)
        create_folder(folder, files)
        for old in self.rounds()[:-_KEPT]:
            if old != keep:
                shutil.rmtree(self._path(old))
        model, strategy = (map_tensors(folder / name, blobs[name].sha256) for name in parts)
        return replace(committed, model=model, strategy=strategy, history=_named(committed, blobs))

    def _state_of(self, committed: Committed, blobs: Mapping[str, Blob]) -> _State:
        return _State(
            round=committed.round,
            plan_digest=self._plan.digest,
            model_sha256=blobs[_MODEL].sha256,
            strategy_sha256=blobs[_STRATEGY].sha256,
            roster=committed.roster,
            history=_named(committed, blobs),
        )

    def add_evaluation(self, evaluated: Evaluated, entry: bytes) -> None:
        """Adds the metrics of a committed round, and what the log is told of them; raises OSError."""
        folder, content = self._path(evaluated.round), evaluated.model_dump_json(indent=1).encode()
        replace_file(folder / _EVALUATION_ENTRY, entry)
        replace_file(folder / _EVALUATION, content)  # last: from here on they count

    def entries(self, round_number: int) -> list[bytes]:
        """What the log is told of a round on disk, in order; raises OSError."""
        folder = self._path(round_number)
        known = [folder / _ENTRY] + [folder / _EVALUATION_ENTRY] * (folder / _EVALUATION).exists()
        return [path.read_bytes() for path in known if path.exists()]

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
            digests = _sha256_of(folder / _MODEL), _sha256_of(folder / _STRATEGY)
            history = _with_evaluation(folder / _EVALUATION, state.history)
        except (OSError, ValidationError) as error:
            raise RunError(f"the checkpoint {folder} cannot be read", remedy) from error
        if state.plan_digest != self._plan.digest:
            raise RunError(f"{folder} belongs to another plan", "resume with the plan.yaml of that folder")
        if digests != (state.model_sha256, state.strategy_sha256):
            raise RunError(f"the checkpoint {folder} is damaged: a digest does not match", remedy)
        try:
            tensors = map_tensors(folder / _MODEL, digests[0]), map_tensors(folder / _STRATEGY, digests[1])
        except TensorFileError as error:
            raise RunError(f"the checkpoint {folder} cannot be read", remedy) from error
        return Committed(state.round, *tensors, state.roster, history)


def _named(committed: Committed, blobs: Mapping[str, Blob]) -> tuple[RoundRecord, ...]:
    """The history, whose last record names the model that was just written."""
    *before, last = committed.history or (None,)
    if last is None:
        return ()
    return (*before, last.model_copy(update={"model_sha256": blobs[_MODEL].sha256}))


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_evaluation(path: Path, history: tuple[RoundRecord, ...]) -> tuple[RoundRecord, ...]:
    """The history with the metrics of its last round, where they were measured; raises OSError or ValidationError."""
    if not path.exists() or not history:
        return history
    evaluated = Evaluated.model_validate_json(path.read_bytes())
    return (*history[:-1], history[-1].model_copy(update={"evaluation": evaluated}))
