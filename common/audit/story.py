"""What a bundle says, put together for a person: who took part, what was agreed, every round, what was spent.

Rules:
  * The facts are those of the log, with the numbers of their entries. Nothing is computed but counts.
  * A bundle that does not hold is told as well, up to where it can be read, and says so first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from locum.common.audit.standing import Standing
from locum.common.audit.verify import Verdict, verify
from locum.common.audit.words import reason
from locum.common.log.entries import (
    ApprovalEntry,
    EndEntry,
    Entry,
    MetricsEntry,
    ProposalEntry,
    ReadinessEntry,
    RosterEntry,
    RoundEntry,
    RunEntry,
    SiteEntry,
    VoidEntry,
)
from locum.common.plan import Plan


@dataclass(frozen=True)
class Decided:
    """A decision of a site on the plan: its entry, when, whether it approves, and the steward's name."""

    entry: int
    at: str
    site: str
    decision: str
    steward: str


@dataclass(frozen=True)
class Happened:
    """Something that became of the run or of a member: its entry, when, and what, in words."""

    entry: int
    at: str
    what: str


@dataclass(frozen=True)
class Left:
    """A site that something was done without: its entry, when, in what, and why."""

    entry: int
    at: str
    site: str
    step: str
    word: str

    @property
    def why(self) -> str:
        """The reason in words."""
        return reason(self.word)


@dataclass(frozen=True)
class Round:
    """A committed round.

    Attributes:
        entry: its number in the log.
        secured: of how many sites the keys were, and how many had to answer; None of a sum in the clear.
        back: whether it starts from an earlier round's model.
        spent: by site, the epsilon that it had spent with it.
    """

    entry: int
    at: str
    round: int
    attempt: int
    sites: tuple[str, ...]
    refused: dict[str, str]
    secured: tuple[int, int] | None
    start: str
    model: str
    back: bool
    spent: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """What was released of a fold."""

    entry: int
    at: str
    round: int
    fold: str
    model: str
    sites: tuple[str, ...]
    cases: int | None
    overall: dict[str, Any]
    per_site: dict[str, dict[str, Any]]


@dataclass
class Site:
    """A site of the federation.

    Attributes:
        events: when it was enrolled, renewed and revoked.
        policy: the digest of the policy with which it took part, if it did.
        readiness: what it said of its data, last: `ready`, and of what it may tell its `patients` and `strata`.
        counted: how many rounds count it.
        spent: by purpose, the epsilon that it said last, with the delta.
        witnessed: when it last cosigned the log, and how many entries that counts.
    """

    name: str
    events: list[Happened] = field(default_factory=list)
    policy: str | None = None
    readiness: dict[str, Any] | None = None
    counted: int = 0
    spent: dict[str, tuple[float, float]] = field(default_factory=dict)
    witnessed: tuple[str, int] | None = None


@dataclass
class Story:
    """All of it.

    Attributes:
        verdict: what came of the checks.
        proposed: the entry of the proposal, and when.
        roster: who takes part, as it stood last.
    """

    verdict: Verdict | None = None
    sites: dict[str, Site] = field(default_factory=dict)
    proposed: Happened | None = None
    decisions: list[Decided] = field(default_factory=list)
    happened: list[Happened] = field(default_factory=list)
    roster: RosterEntry | None = None
    rounds: list[Round] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    metrics: list[Measured] = field(default_factory=list)
    end: EndEntry | None = None

    @property
    def told(self) -> Verdict:
        """What came of the checks."""
        assert self.verdict is not None  # noqa: S101 - made by story_of
        return self.verdict

    @property
    def plan(self) -> Plan | None:
        """The run's plan; None if the bundle could not be read to its end."""
        return self.told.standing.plan if self.told.standing else None

    @property
    def plan_text(self) -> str:
        """The plan as it was proposed, YAML; empty if it could not be read."""
        standing = self.told.standing
        if standing is None:
            return ""
        if standing.plan.digest == standing.digest:
            return standing.plan.to_yaml()
        return yaml.safe_dump(json.loads(standing.content), sort_keys=False, allow_unicode=True, width=120)

    # --- as the log goes by

    def watch(self, number: int, entry: Entry, standing: Standing) -> None:
        """One more entry; `standing` is what stood before it."""
        if isinstance(entry, SiteEntry):
            self.site(entry.site).events.append(Happened(number, entry.at, entry.event))
        elif isinstance(entry, ProposalEntry):
            if entry.plan == standing.digest:
                self.proposed = Happened(number, entry.at, "proposed")
        elif isinstance(entry, ApprovalEntry):
            self._decided(number, entry, standing)
        elif standing.is_mine(entry):
            self._of_run(number, entry, standing)

    def site(self, name: str) -> Site:
        """A site by its name."""
        return self.sites.setdefault(name, Site(name))

    def _decided(self, number: int, entry: ApprovalEntry, standing: Standing) -> None:
        said = standing.approval_of(entry) if entry.plan == standing.digest else None
        if said is not None:
            self.decisions.append(Decided(number, entry.at, entry.site, said.decision, said.steward))

    def _of_run(self, number: int, entry: Entry, standing: Standing) -> None:
        if isinstance(entry, RunEntry):
            self.happened.append(Happened(number, entry.at, entry.event))
        elif isinstance(entry, ReadinessEntry):
            said = standing.readiness_of(entry.site, entry.statement)
            self.site(entry.site).readiness = None if said is None else said.model_dump(mode="json")
        elif isinstance(entry, RosterEntry):
            self._roster(number, entry)
        elif isinstance(entry, RoundEntry):
            self._round(number, entry, standing)
        elif isinstance(entry, VoidEntry):
            step = "training" if entry.fold == "train" else entry.fold
            what = f"attempt {entry.attempt} at {step} in round {entry.round} counts for nothing"
            self.happened.append(Happened(number, entry.at, what))
            self._left(number, entry.at, f"{what}", entry.refused)
        elif isinstance(entry, MetricsEntry):
            self._measured(number, entry, standing)
        elif isinstance(entry, EndEntry):
            self.end = entry
            self.happened.append(Happened(number, entry.at, entry.status))

    def _roster(self, number: int, entry: RosterEntry) -> None:
        self.roster = entry
        for site, policy in entry.policies.items():
            self.site(site).policy = policy
        self.rounds = [done for done in self.rounds if done.round <= entry.round]
        self.happened.append(Happened(number, entry.at, f"{len(entry.sites)} sites agree, at round {entry.round}"))
        self._left(number, entry.at, "the whole run", entry.excluded)

    def _round(self, number: int, entry: RoundEntry, standing: Standing) -> None:
        secured = None if entry.secured is None else (entry.secured.sites, entry.secured.threshold)
        spent = self._spent(entry.spent, "train", standing)
        back = entry.start != standing.models.get(entry.round - 1)
        self.rounds.append(
            Round(number, entry.at, entry.round, entry.attempt, entry.sites, entry.refused, secured, entry.start,
                  entry.model, back, spent)
        )  # fmt: skip
        self._left(number, entry.at, f"round {entry.round}", entry.refused)

    def _measured(self, number: int, entry: MetricsEntry, standing: Standing) -> None:
        self._spent(entry.spent, entry.fold, standing)
        fields = entry.model_dump(mode="json")
        self.metrics.append(
            Measured(number, entry.at, entry.round, entry.fold, entry.model, entry.sites, entry.cases,
                     fields["overall"], fields["per_site"])
        )  # fmt: skip
        self._left(number, entry.at, f"{entry.fold} in round {entry.round}", entry.refused)

    def _spent(self, statements: dict[str, str], purpose: str, standing: Standing) -> dict[str, float]:
        found = {}
        for site, envelope in statements.items():
            said = standing.spent_of(site, envelope)
            if said is not None:
                self.site(site).spent[purpose] = said.epsilon, said.delta
                found[site] = said.epsilon
        return found

    def _left(self, number: int, at: str, step: str, refused: dict[str, str]) -> None:
        self.left += [Left(number, at, site, step, word) for site, word in sorted(refused.items())]


def story_of(path: Path, *, authority: str | None = None, witnesses: int | None = None) -> Story:
    """Checks a bundle, and tells what it says as far as it can be read."""
    story = Story()
    story.verdict = verify(path, authority=authority, witnesses=witnesses, watch=story.watch)
    for done in story.rounds:
        for site in done.sites:
            story.site(site).counted += 1
    for site, (at, size) in story.verdict.witnesses.items():
        story.site(site).witnessed = at, size
    return story
