"""What is logged of one run.

Rules:
  * The entry of a round is put on the disk with the round (:mod:`locum.server.checkpoints`) and then into the log.
    Whoever goes on with the run first writes what a crash left out between the two: each committed round stands there
    once. So it is with the end.
  * What counts for nothing is written as that. An entry of metrics or of an end follows what it is of, never goes
    before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from locum.common.canonical import digest
from locum.common.identity import is_site_name
from locum.common.log.entries import (
    EndEntry,
    Entry,
    Fold,
    MetricsEntry,
    ReadinessEntry,
    RosterEntry,
    RoundEntry,
    RunEntry,
    SecureSumFields,
    VoidEntry,
    read_entry,
)
from locum.server.admission import Refused
from locum.server.log import FederationLog, now
from locum.server.records import Evaluated, RoundRecord
from locum.server.spending import envelopes

if TYPE_CHECKING:
    from locum.server.asking import Gathered, Measured, Roster

Event = Literal["started", "resumed", "paused", "stopped", "failed"]


@dataclass
class RunLog:
    """The log, as one run writes it.

    Attributes:
        log: the federation's.
        run: the run's name.
        plan: the plan's digest.
    """

    log: FederationLog
    run: str
    plan: str
    _begun: bool = field(default=False, init=False)

    # --- writing

    def append(self, *entries: Entry) -> None:
        """Appends entries; raises NotLoggedError."""
        self.log.append(*entries)

    def append_once(self, left: Iterable[bytes]) -> None:
        """Appends those of these entries that are not there yet; raises NotLoggedError."""
        self.log.append_once(*map(read_entry, left))

    def seal(self) -> None:
        """Signs a checkpoint of what is written; raises NotLoggedError."""
        self.log.seal()

    def begin(self, left: Iterable[bytes]) -> None:
        """Says that the run has started or goes on, once a process, after what the process before has `left` out."""
        self.append_once(left)
        if not self._begun:
            self.append(self.said("resumed" if self.log.last_of(self.run) else "started"))
            self._begun = True

    # --- the entries

    def said(self, event: Event) -> RunEntry:
        """Something became of the run."""
        return RunEntry(**self._of_run(), event=event)

    def readiness(self, statements: Mapping[str, str]) -> list[ReadinessEntry]:
        """What each site that was asked said of its data, by site its signed statement."""
        return [ReadinessEntry(**self._of_run(), site=site, statement=said) for site, said in statements.items()]

    def roster(self, roster: Roster, configuration: Mapping[str, str], *, number: int, model: str) -> RosterEntry:
        """Who takes part from here on, at the model of round `number` whose file has the SHA-256 `model`."""
        return RosterEntry(
            **self._of_run(),
            round=number,
            model=model,
            sites=tuple(roster.nodes),
            configuration=digest(dict(configuration)),
            policies=dict(sorted(roster.policies.items())),
            excluded=words(roster.excluded),
        )

    def round(self, record: RoundRecord, found: Gathered, *, start: str, model: str) -> RoundEntry:
        """A round that is being committed; `start` and `model` are the SHA-256 of the files before and after it."""
        fields = (
            None if record.secured is None else record.secured.model_dump(include=set(SecureSumFields.model_fields))
        )
        return RoundEntry(
            **self._of_run(),
            round=record.round,
            attempt=record.attempt,
            start=start,
            model=model,
            sites=tuple(sorted(record.sites)),
            secured=None if fields is None else SecureSumFields.model_validate(fields),
            refused=words(found.refused),
            spent=envelopes({site: told.spent for site, told in found.told.items()}),
        )

    def void(self, number: int, attempt: int, fold: Fold, refused: Mapping[str, Refused]) -> VoidEntry:
        """An attempt that counts for nothing."""
        return VoidEntry(**self._of_run(), round=number, attempt=attempt, fold=fold, refused=words(refused))

    def metrics(self, measured: Evaluated, found: Measured, *, model: str) -> MetricsEntry:
        """What was released of a fold, for the model whose file has the SHA-256 `model`."""
        return MetricsEntry.model_validate(
            {
                **self._of_run(),
                "round": measured.round,
                "fold": measured.fold,
                "model": model,
                "sites": sorted(found.cases),
                "cases": found.total,
                "overall": measured.overall,
                "per_site": measured.per_site,
                "refused": words(found.excluded),
                "spent": envelopes(found.spent),
            }
        )

    def end(self, status: Literal["completed", "completed with losses"], number: int, model: str) -> EndEntry:
        """The run has reached its end."""
        return EndEntry(**self._of_run(), status=status, round=number, model=model)

    def _of_run(self) -> dict[str, Any]:
        return {"at": now(), "run": self.run, "plan": self.plan}


def voided(entry: MetricsEntry) -> VoidEntry:
    """What the log is told of metrics that do not count."""
    return VoidEntry(**entry.model_dump(include={"at", "run", "plan", "round", "fold", "refused"}), attempt=1)


def words(refused: Mapping[str, Refused]) -> dict[str, str]:
    """Why sites are missing, a word each; a node that never said its name is no site."""
    return {site: found.word for site, found in sorted(refused.items()) if is_site_name(site)}
