"""What there is of a run: its end, or its last committed round; and `pull`, which puts that into a folder.

Rules:
  * A run that goes on is only read: nothing here touches its folder. A round that it forgets meanwhile is no error.
  * A model leaves only when its file has the digest that was committed with it.
  * Results so far are never called results: every file says whether the run has ended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from locum.common.build import metric_of
from locum.common.durable import flush, replace_file
from locum.common.errors import RunError
from locum.common.plan import Plan
from locum.server.event_file import Event, read_events
from locum.server.model_card import MODEL_FILE
from locum.server.records import Evaluated, RoundRecord, RunSummary
from locum.server.runs import Run, Status
from locum.server.statement import FILE as STATEMENT_FILE

METRICS_FILE, PLAN_FILE = "metrics.json", "plan.yaml"
_CHUNK = 1 << 20
_TRIES = 20


class _Committed(BaseModel):
    """What is read of a round's `state.json`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    round: int
    plan_digest: str
    model_sha256: str
    roster: tuple[str, ...]
    history: tuple[RoundRecord, ...]


@dataclass(frozen=True)
class Outcome:
    """A run as far as it came.

    Attributes:
        status: of the run when it was read.
        summary: its end; of a run that has not ended by itself the same of the last committed round, without a test.
        final: whether it is the end.
        events: all that were told.
        model_sha256: of the model's file, as committed.
    """

    run: Run
    status: Status
    summary: RunSummary
    final: bool
    events: tuple[Event, ...]
    model_sha256: str

    @property
    def plan(self) -> Plan:
        """The run's plan."""
        return self.run.plan

    @property
    def measured(self) -> Evaluated | None:
        """The final test, or the last validation before it; None if nothing was measured yet."""
        if self.final:
            return self.summary.test
        found = [record.evaluation for record in self.summary.history if record.evaluation is not None]
        return found[-1] if found else None


def outcome_of(run: Run) -> Outcome:
    """What there is of a run; raises RunError if no round is committed yet, or if its files cannot be read."""
    for _ in range(_TRIES):
        status = run.status()
        number = read_summary(run).round if run.summary.exists() else run.committed()
        if number < 1:
            raise RunError(f"the run {run.id} has not committed a round yet", f"see it go on: locum watch {run.id}")
        with suppress(FileNotFoundError):  # the engine forgets a round when it has committed two newer ones
            return _outcome(run, status, run.checkpoints / f"round-{number:06d}")
    raise RunError(f"round {number} of {run.id} is not there", f"restore {run.checkpoints}")


def _outcome(run: Run, status: Status, folder: Path) -> Outcome:
    committed = _committed(folder)
    if committed.plan_digest != run.plan.digest:
        raise RunError(f"{folder} belongs to another plan", "restore the run's folder from a backup")
    events = tuple(read_events(run.events))
    final = run.summary.exists()
    summary = read_summary(run) if final else _so_far(committed, status, events)
    return Outcome(run, status, summary, final, events, committed.model_sha256)


def read_summary(run: Run) -> RunSummary:
    """The end of a run; raises RunError."""
    try:
        return RunSummary.model_validate_json(run.summary.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(f"{run.summary} cannot be read", f"remove it, then `locum resume {run.id}`") from error


def _committed(folder: Path) -> _Committed:
    """A committed round's state with its evaluation; raises FileNotFoundError if it was forgotten."""
    try:
        state = _Committed.model_validate_json((folder / "state.json").read_bytes())
        evaluation = folder / "evaluation.json"
        if not evaluation.exists() or not state.history:
            return state
        evaluated = Evaluated.model_validate_json(evaluation.read_bytes())
    except ValidationError as error:
        raise RunError(f"the checkpoint {folder} cannot be read", "resume the run, which tells what to do") from error
    last = state.history[-1].model_copy(update={"evaluation": evaluated})
    return state.model_copy(update={"history": (*state.history[:-1], last)})


def _so_far(committed: _Committed, status: Status, events: Sequence[Event]) -> RunSummary:
    rosters = [event for event in events if event["event"] == "roster"]
    missed = {site: [r.round for r in committed.history if site not in r.sites] for site in committed.roster}
    return RunSummary(
        status=status.state,
        round=committed.round,
        sites=committed.roster,
        excluded=rosters[-1]["excluded"] if rosters else {},
        lost={site: rounds for site, rounds in missed.items() if rounds},
        test=Evaluated(round=committed.round, fold="test", overall={}, per_site={}, cases={}),
        history=committed.history,
    )


# --- numbers


def metrics_of(outcome: Outcome) -> dict[str, Any]:
    """The content of `metrics.json`: as a simulation's, with intervals from sums, and the history of the rounds."""
    summary, history = outcome.summary, outcome.summary.history
    return {
        "run": outcome.run.id,
        "plan": outcome.plan.name,
        "plan_digest": outcome.plan.digest,
        "status": outcome.status.state,
        "final": outcome.final,
        "round": summary.round,
        "rounds": outcome.plan.rounds,
        "sites": list(summary.sites),
        "excluded": summary.excluded,
        "lost": summary.lost,
        "model": {"file": MODEL_FILE, "sha256": outcome.model_sha256, "round": summary.round},
        "seconds_total": seconds_total(outcome),
        "seconds_per_round": sum(r.seconds for r in history) / len(history),
        "test": {"federated": entry_of(summary.test)} if outcome.final else None,
        "worst": worst_of(summary.test),
        "validation": _validation(history),
        "history": [record.model_dump(mode="json") for record in history],
    }


def entry_of(measured: Evaluated) -> dict[str, Any]:
    """One measurement in the form of `metrics.json`."""
    return {
        "all": measured.overall,
        "per_site": measured.per_site,
        "intervals": {"all": measured.intervals, "per_site": measured.site_intervals},
        "subgroups": [cell.model_dump(mode="json") for cell in measured.cells],
        "sites": list(measured.sites),
        "cases": measured.cases,
        "total": measured.total,
    }


def worst_of(measured: Evaluated) -> dict[str, dict[str, Any]]:
    """The worst site of every metric that at least two sites have, with its value."""
    found = {}
    for name in measured.overall:
        better = metric_of(name).better
        values = {site: value for site, told in measured.per_site.items() if isinstance(value := told.get(name), float)}
        if len(values) > 1:
            site = min(sorted(values), key=lambda each: better * values[each])
            found[name] = {"site": site, "value": values[site]}
    return found


def _validation(history: Sequence[RoundRecord]) -> dict[str, Any] | None:
    found = [record.evaluation for record in history if record.evaluation is not None]
    return {"round": found[-1].round, **entry_of(found[-1])} if found else None


def seconds_total(outcome: Outcome) -> float:
    """From the making of the run to the last that was heard of it, pauses included."""
    began = outcome.run.created.created_at
    return max(0.0, (outcome.events[-1]["at"] if outcome.events else began) - began)


# --- into a folder


def pull(run: Run, out: Path) -> Outcome:
    """Puts a run's model, metrics, plan, report, model card and statement into `out`; returns what they are of.

    Raises:
        RunError: no round is committed, the model is damaged, or `out` holds something else or cannot be written.
    """
    from locum.server import report

    outcome = outcome_of(run)
    try:
        _check_free(out, run.id)
        out.mkdir(parents=True, exist_ok=True)
        outcome = _with_model(outcome, out / MODEL_FILE)
        replace_file(out / PLAN_FILE, outcome.plan.to_yaml().encode())
        report.write(out, outcome)
        if outcome.final and (statement := run.folder / STATEMENT_FILE).exists():
            replace_file(out / STATEMENT_FILE, statement.read_bytes())
        replace_file(out / METRICS_FILE, json.dumps(metrics_of(outcome), indent=1).encode())
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}", "choose another --out") from error
    return outcome


def _check_free(out: Path, run: str) -> None:
    if not out.exists() or not any(out.iterdir()):
        return
    held = None
    with suppress(OSError, ValueError, LookupError, TypeError):
        held = json.loads((out / METRICS_FILE).read_bytes())["run"]
    if held != run:
        what = f"the results of {held}" if held else "something else"
        raise RunError(f"{out} holds {what}", "choose another --out")


def _with_model(outcome: Outcome, target: Path) -> Outcome:
    """Copies the model, of a newer round if this one was forgotten meanwhile; returns the outcome it belongs to."""
    for _ in range(_TRIES):
        source = outcome.run.checkpoints / f"round-{outcome.summary.round:06d}" / MODEL_FILE
        with suppress(FileNotFoundError):
            _copy(source, target, outcome.model_sha256)
            return outcome
        outcome = outcome_of(outcome.run)
    raise RunError(f"{source} is not there", f"restore {outcome.run.checkpoints}")


def _copy(source: Path, target: Path, sha256: str) -> None:
    """Copies a file of any size, durably, if it has the digest; raises RunError if it has not, and then no file."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reading, beside.open("wb") as writing:
            while chunk := reading.read(_CHUNK):
                digest.update(chunk)
                writing.write(chunk)
            writing.flush()
            os.fsync(writing.fileno())
        if digest.hexdigest() != sha256:
            raise RunError(f"{source} is damaged: its digest is not the committed one", "restore it from a backup")
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    flush(target.parent)
