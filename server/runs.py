"""A run at the coordinator: one folder, and what its files say of its state.

home/runs/ID/
  plan.yaml       the plan, every default written out
  created.json    digest, name, time, and the sites that had approved
  wanted.json     what a person wants of the run: that it goes on, or that it stops
  failure.json    why it cannot go on, and what to do; gone when somebody wants it to go on
  lock            held by the run's process for as long as it lives; the process's number stands inside
  events.jsonl    what a person follows                 checkpoints/  committed rounds
  run.json        the end of the run, with model.safetensors beside it

Rules:
  * A state is derived from these files at every look, and stored nowhere.
  * Every change is one atomic step. Whatever dies between two steps leaves a state that `want` can leave.
  * The kernel lets go of `lock` whatever ends the process; no number of a process is trusted without it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from locum.common.durable import create_folder, replace_file
from locum.common.errors import RunError
from locum.common.plan import Plan, load_plan
from locum.server.event_file import last_event
from locum.server.home import Home

Want = Literal["run", "stop"]
State = Literal[
    "waiting", "running", "paused", "restarting", "stopping", "stopped", "completed", "completed with losses", "failed"
]

#: The states in which nothing more happens until somebody wants it.
ENDED: frozenset[State] = frozenset({"stopped", "completed", "completed with losses", "failed"})

#: What tells one content of the files that end a run from the next.
Stamp = tuple[tuple[int, int, int], ...]

#: The ends that `run.json` names.
_ENDS: dict[str, State] = {"completed": "completed", "completed with losses": "completed with losses"}

#: What the name of a run looks like, here and in the spool.
ID = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")

#: A look at the lock holds it for some microseconds; who wants it waits this long before it is called taken.
_LOCK_SECONDS = 1.0


class Created(BaseModel):
    """`created.json`: what the run was made of. `created_at` is since 1970.

    `sites` had approved the plan then; those `without` which it runs are not asked, whatever they approve.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    name: str
    created_at: float
    sites: tuple[str, ...]
    without: tuple[str, ...] = ()


class Wanted(BaseModel):
    """`wanted.json`: what somebody wanted of the run, who, and when (seconds since 1970)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    want: Want
    at: float
    by: str


class Failure(BaseModel):
    """`failure.json`: why the run cannot go on, the next thing to do, and when it was found (seconds since 1970)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reason: str
    remedy: str
    at: float


@dataclass(frozen=True)
class Status:
    """What a run's files say.

    Attributes:
        round: the last committed round; 0 before the first.
        rounds: of the plan; 0 if the plan cannot be read.
        reason: why it waits, is paused or has failed; empty otherwise.
        remedy: what a person can do about it.
        since: when this state began, seconds since 1970.
    """

    state: State
    round: int
    rounds: int
    reason: str
    remedy: str
    since: float

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.state in ENDED


@dataclass(frozen=True)
class Run:
    """One run, by its folder. Every property reads the files anew, but for what never changes."""

    folder: Path

    # --- what it is

    @property
    def id(self) -> str:
        """Its name: `yyyymmdd-plan-4hex`."""
        return self.folder.name

    @property
    def events(self) -> Path:
        """The file of its events."""
        return self.folder / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of its committed rounds."""
        return self.folder / "checkpoints"

    @property
    def summary(self) -> Path:
        """`run.json`, there once the run has ended by itself."""
        return self.folder / "run.json"

    @cached_property
    def plan(self) -> Plan:
        """Its plan; raises PlanError."""
        return load_plan(self.folder / "plan.yaml")

    @cached_property
    def created(self) -> Created:
        """What it was made of; raises RunError."""
        found = _read(self.folder / "created.json", Created)
        if found is None:
            raise RunError(f"{self.folder} holds no run", "`locum watch --all` lists the runs")
        return found

    # --- what is wanted of it

    @property
    def wanted(self) -> Wanted | None:
        """What somebody wanted last; None if `wanted.json` is missing. Raises RunError if it cannot be read."""
        return _read(self.folder / "wanted.json", Wanted)

    @property
    def failure(self) -> Failure | None:
        """Why the run cannot go on, or None; raises RunError if `failure.json` cannot be read."""
        return _read(self.folder / "failure.json", Failure)

    def want(self, what: Want, *, by: str = "") -> None:
        """Says durably what is wanted of the run; wanting it to run forgets a failure. Raises OSError."""
        if what == "run":
            # First this: killed after it, the run is one that is wanted and has no process, and so goes on.
            (self.folder / "failure.json").unlink(missing_ok=True)
        replace_file(self.folder / "wanted.json", _json(Wanted(want=what, at=time.time(), by=by)))

    def fail(self, reason: str, remedy: str) -> None:
        """Says durably that the run cannot go on before a person has done something; raises OSError."""
        replace_file(self.folder / "failure.json", _json(Failure(reason=reason, remedy=remedy, at=time.time())))

    # --- its process

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Held by the run's process while it lives; raises RunError if another one has it."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _locked(descriptor, fcntl.LOCK_EX, patience=_LOCK_SECONDS):
                raise RunError(f"another process holds the run {self.id}", "let that one go on, or stop the run")
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            try:
                yield
            finally:
                os.ftruncate(descriptor, 0)
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # also where a child process has the descriptor still
        finally:
            os.close(descriptor)

    def alive(self) -> int | None:
        """The number of the process that holds the run, or None; raises RunError if it never says its number."""
        try:
            descriptor = os.open(self.folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return _holder(descriptor, self.id)
        finally:
            os.close(descriptor)

    # --- its state

    def committed(self) -> int:
        """The last committed round, 0 before the first."""
        names = (path.name.removeprefix("round-") for path in self.checkpoints.glob("round-*"))
        return max((int(name) for name in names if name.isdigit()), default=0)

    @property
    def rounds(self) -> int:
        """The plan's number of rounds, read without a check of the plan; 0 if it cannot be read."""
        path = self.folder / "plan.yaml"
        return _rounds(path, _stamp(path))

    def status(self) -> Status:
        """What the run's files say now."""
        process = self.alive()  # first of all: whoever is gone by now has written what it had to write
        try:
            state, reason, remedy, since = self._ended(process) or self._going(process)
        except RunError as error:
            state, reason, remedy = "failed", error.message, error.remedy
            since = self.folder.stat().st_mtime
        return Status(state, self.committed(), self.rounds, reason, remedy, since)

    @property
    def stamp(self) -> Stamp:
        """Another one once somebody has changed what says that the run is at its end."""
        return tuple(_stamp(self.folder / name) for name in ("run.json", "failure.json", "wanted.json"))

    @property
    def goes_on(self) -> bool:
        """Whether the run is not at its end, and wanted; asked by the process that holds it."""
        return self._ended(os.getpid()) is None

    def _ended(self, process: int | None) -> tuple[State, str, str, float] | None:
        if self.summary.exists():
            return _end_of(self.summary, _stamp(self.summary)), "", "", self.summary.stat().st_mtime
        failure = self.failure
        if failure is not None:
            return "failed", failure.reason, failure.remedy, failure.at
        wanted = self._will()
        if wanted.want == "stop":
            if process is not None:
                return "stopping", "", "", wanted.at
            return "stopped", "", f"`locum resume {self.id}` goes on with it", wanted.at
        return None

    def _going(self, process: int | None) -> tuple[State, str, str, float]:
        last = last_event(self.events)
        if process is None:
            state: State = "waiting" if last is None else "restarting"
            since = max(self._will().at, last["at"] if last else 0.0)
            return state, "no process works on it yet", "see that `locum server start` runs", since
        if last is not None and last["event"] == "paused":
            return "paused", _paused(last), f"it goes on by itself; or `locum stop {self.id}`", last["at"]
        return "running", "", "", (self.folder / "lock").stat().st_mtime

    def _will(self) -> Wanted:
        found = self.wanted
        if found is None:
            raise RunError(f"{self.folder / 'wanted.json'} is missing", f"`locum resume {self.id}` writes it anew")
        return found


# --- the runs of a coordinator


def create_run(home: Home, plan: Plan, *, sites: Iterable[str] = (), without: Iterable[str] = (), by: str = "") -> Run:
    """Makes the folder of a new run of `plan` that is wanted to run; `sites` have approved it. Raises OSError."""
    now = time.time()
    created = Created(
        digest=plan.digest, name=plan.name, created_at=now, sites=tuple(sorted(sites)), without=tuple(sorted(without))
    )
    home.runs.mkdir(parents=True, exist_ok=True)
    files = {
        "plan.yaml": plan.to_yaml().encode(),
        "created.json": _json(created),
        "wanted.json": _json(Wanted(want="run", at=now, by=by)),
    }
    with _one_at_a_time(home.runs / ".lock"):
        for unfinished in home.runs.glob(".*.tmp"):  # of somebody who was killed here
            shutil.rmtree(unfinished)
        folder = _free(home.runs, f"{datetime.fromtimestamp(now, UTC):%Y%m%d}-{plan.name}")
        create_folder(folder, files)
    return Run(folder)


def _free(runs: Path, name: str) -> Path:
    while True:
        folder = runs / f"{name}-{secrets.token_hex(2)}"
        if not folder.exists():
            return folder


def all_runs(home: Home) -> tuple[Run, ...]:
    """Every run, the newest first."""
    made = [Run(path.parent) for path in home.runs.glob("*/created.json") if ID.fullmatch(path.parent.name)]
    return tuple(sorted(made, key=lambda run: (_made_at(run), run.id), reverse=True))


def _made_at(run: Run) -> float:
    """When a run was made; one whose `created.json` is damaged counts as the oldest."""
    try:
        return run.created.created_at
    except RunError:
        return 0.0


def find(home: Home, prefix: str) -> Run:
    """The one run whose name begins with `prefix`, or ends with it; raises RunError with the names that come near."""
    runs = {run.id: run for run in all_runs(home)}
    if prefix in runs:
        return runs[prefix]
    for fits in (str.startswith, str.endswith):
        found = [name for name in runs if fits(name, prefix)]
        if len(found) == 1:
            return runs[found[0]]
        if found:
            raise RunError(f"'{prefix}' could be {_some(found)}", "give more of the run's name")
    known = f"the runs are {_some(list(runs))}" if runs else "this coordinator has no run yet: `locum run DIGEST`"
    raise RunError(f"there is no run '{prefix}'", known)


def newest(home: Home) -> Run:
    """The run that was made last; raises RunError if there is none."""
    runs = all_runs(home)
    if not runs:
        raise RunError("this coordinator has no run yet", "start one with `locum run DIGEST`")
    return runs[0]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} or {len(names) - 4} others" if len(names) > 4 else shown


# --- files


M = TypeVar("M", bound=BaseModel)


def _read(path: Path, kind: type[M]) -> M | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RunError(f"{path} cannot be read", f"`locum resume {path.parent.name}` writes it anew") from error


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(indent=1).encode()


def _stamp(path: Path) -> tuple[int, int, int]:
    """What tells one content of a path from the next: files here are replaced whole, never changed."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


# A coordinator looks at all of its runs several times a second, and these files do not change.
@lru_cache(maxsize=4096)
def _end_of(path: Path, _stamp: tuple[int, int, int]) -> State:
    """The status in `run.json`; nothing else of that file is looked at here."""
    try:
        told = json.loads(path.read_bytes())["status"]
        return _ENDS[told]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{path} cannot be read", f"remove it, then `locum resume {path.parent.name}`") from error


@lru_cache(maxsize=4096)
def _rounds(path: Path, _stamp: tuple[int, int, int]) -> int:
    try:
        found: Any = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        return 0
    rounds = found.get("rounds") if isinstance(found, dict) else None
    return rounds if isinstance(rounds, int) else 0


def _paused(event: dict[str, Any]) -> str:
    missing = event.get("missing") or ()
    names = ", ".join(sorted(missing)) if isinstance(missing, list | tuple | dict) else str(missing)
    reason = str(event.get("reason") or "too few sites are there")
    return f"{reason}; missing: {names}" if names else reason


# --- locks


def _locked(descriptor: int, kind: int, *, patience: float = 0.0) -> bool:
    """Whether the lock was taken, within `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)
        else:
            return True


def _holder(descriptor: int, name: str) -> int | None:
    """Who holds the lock. It says its number right after it has taken it, so one that has not yet is asked again."""
    end = time.monotonic() + _LOCK_SECONDS
    while not _locked(descriptor, fcntl.LOCK_SH):
        told = os.pread(descriptor, 20, 0)
        if told.isdigit():
            return int(told)
        if time.monotonic() >= end:
            raise RunError(f"the process of the run {name} does not say its number", "try again")
        time.sleep(0.001)
    return None


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
