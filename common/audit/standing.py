"""What a log has said up to one of its entries: of the federation's members, and of the run that is looked at.

Rules:
  * Entries are taken in their order, each after it was checked. Nothing here judges.
  * Of other runs nothing is kept but their last time.
  * A log of a million entries is taken in the memory that its members and the run's rounds need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography import x509

from locum.common.cohort import Query
from locum.common.envelope import (
    Approval,
    EnvelopeError,
    Readiness,
    Spent,
    open_approval,
    open_readiness,
    open_spent,
)
from locum.common.identity import PublicKey, certified_key, public_key_sha256
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

Statement = Approval | Spent | Readiness


#: Entries of a run.
OfRun = RunEntry | ReadinessEntry | RosterEntry | RoundEntry | VoidEntry | MetricsEntry | EndEntry
OF_RUN = (RunEntry, ReadinessEntry, RosterEntry, RoundEntry, VoidEntry, MetricsEntry, EndEntry)


def writer_of(entry: Entry) -> str:
    """Whose times come in order: a run's, which may write down late what it did before it was cut off, or others'."""
    return entry.run if isinstance(entry, OF_RUN) else ""


@dataclass(frozen=True)
class Anchors:
    """The certificates of a bundle, those of sites by the SHA-256 of each (DER), with the names that stand in them."""

    federation: str
    authority: x509.Certificate
    log: x509.Certificate
    sites: Mapping[str, x509.Certificate]
    names: Mapping[str, str]

    @property
    def log_key(self) -> PublicKey:
        """The key that signs checkpoints and proposals."""
        return certified_key(self.log)

    def key_of(self, certificate: str) -> PublicKey | None:
        """The key in a site's certificate, by its SHA-256; None for one that is not in the bundle."""
        found = self.sites.get(certificate)
        return None if found is None else certified_key(found)


@dataclass
class Member:
    """A site of the federation.

    Attributes:
        key: the SHA-256 of the public key that it is enrolled with.
        certificates: of this key, by their SHA-256.
        revoked: whether it was shown out.
    """

    key: str
    certificates: list[str]
    revoked: bool = False


@dataclass(frozen=True)
class Decision:
    """A site's newest word on the plan: when by its clock, whether it approves, and with which key."""

    at: float
    approves: bool
    key: str


@dataclass
class Standing:
    """What stands after the entries so far.

    Attributes:
        run: the run's name.
        plan: its plan, as this version of Locum reads it.
        content: the plan as it was proposed, canonical JSON, which an earlier version may have written; `digest` of it.
        proposal: the SHA-256 of the signed proposal in the bundle.
        members: by site, enrolled or revoked.
        keys: by the SHA-256 of each key that a site was enrolled with, the site.
        revoked_at: by the SHA-256 of a key, when its site was shown out.
        decisions: by site, its newest word on the plan.
        ended_since: sites whose approval or enrolment ended since the run's last entry.
        proposed: the SHA-256 of the proposal of the plan, once it is in the log.
        said: what became of the run last.
        ready: by site that was asked, what it said last of its data; `fresh` who said it since the last roster.
        questions: by its digest, each cohort question; `answered` which of them were, each with the key of the site.
        roster: who takes part.
        models: by round, the SHA-256 of its model.
        counted: by round, the sites in it.
        round: the last round that counts.
        took_part: the SHA-256 of the keys under which sites that approved were in a roster, a round or a measurement.
        spent: by site and purpose, what it said last that it has spent.
        test: the last final test.
        end: the run's end.
        last: the number of the run's last entry.
        times: the latest time, by who writes: the run by its name, everybody else by none.
    """

    run: str
    plan: Plan
    content: bytes = field(repr=False)
    digest: str
    proposal: str
    anchors: Anchors
    members: dict[str, Member] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    revoked_at: dict[str, str] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    ended_since: set[str] = field(default_factory=set)
    proposed: str | None = None
    said: str = ""
    ready: dict[str, Readiness] = field(default_factory=dict)
    fresh: set[str] = field(default_factory=set)
    questions: dict[str, Query] = field(default_factory=dict)
    answered: set[tuple[str, str]] = field(default_factory=set)
    roster: RosterEntry | None = None
    models: dict[int, str] = field(default_factory=dict)
    counted: dict[int, tuple[str, ...]] = field(default_factory=dict)
    round: int = 0
    took_part: set[str] = field(default_factory=set)
    spent: dict[tuple[str, str], Spent] = field(default_factory=dict)
    test: MetricsEntry | None = None
    end: EndEntry | None = None
    last: int | None = None
    times: dict[str, str] = field(default_factory=dict)
    _verified: dict[tuple[str, str], object] = field(default_factory=dict, repr=False)

    def is_mine(self, entry: Entry) -> bool:
        """Whether an entry is of the run."""
        return isinstance(entry, OF_RUN) and entry.run == self.run

    def approves(self, site: str) -> bool:
        """Whether the site is in the federation and its approval of the plan stands."""
        member, decision = self.members.get(site), self.decisions.get(site)
        if member is None or decision is None:
            return False
        return not member.revoked and decision.approves and decision.key == member.key

    def approved(self, site: str) -> bool:
        """The same, or it was so until after the run's last entry: what it gave before counts."""
        return self.approves(site) or site in self.ended_since

    def take(self, number: int, entry: Entry) -> None:
        """One more entry."""
        writer = writer_of(entry)
        if writer in {"", self.run}:
            self.times[writer] = max(entry.at, self.times.get(writer, ""))
        if isinstance(entry, SiteEntry):
            self._site(entry)
        elif isinstance(entry, ApprovalEntry):
            self._approval(entry)
        elif isinstance(entry, ProposalEntry):
            if entry.plan == self.digest:
                self.proposed = entry.statement
        elif self.is_mine(entry):
            self.last = number
            self._of_run(entry)
            self.ended_since.clear()
        self._verified.clear()

    # --- the federation

    def _site(self, entry: SiteEntry) -> None:
        stood = self.approves(entry.site)
        if entry.event == "revoked":
            if (member := self.members.get(entry.site)) is not None:
                member.revoked = True
                self.revoked_at.setdefault(member.key, entry.at)
        elif entry.certificate is not None and (key := self.anchors.key_of(entry.certificate)) is not None:
            self._certified(entry.site, public_key_sha256(key), entry.certificate)
        self._note_end(entry.site, stood=stood)

    def _certified(self, site: str, key: str, certificate: str) -> None:
        member = self.members.get(site)
        self.keys.setdefault(key, site)
        if member is None or member.key != key:
            self.members[site] = Member(key, [certificate])
        elif certificate not in member.certificates:
            member.certificates.append(certificate)

    def _approval(self, entry: ApprovalEntry) -> None:
        key = self.anchors.key_of(entry.certificate)
        if entry.plan != self.digest or key is None:
            return
        said = self.approval_of(entry)
        if said is None:
            return
        stood, before = self.approves(entry.site), self.decisions.get(entry.site)
        decision = Decision(said.at, said.decision == "approve", public_key_sha256(key))
        if before is None or before.key != decision.key or _is_newer(decision, before):
            self.decisions[entry.site] = decision
        self._note_end(entry.site, stood=stood)

    def _note_end(self, site: str, *, stood: bool) -> None:
        if stood and not self.approves(site):
            self.ended_since.add(site)

    # --- the run

    def _of_run(self, entry: Entry) -> None:
        if isinstance(entry, RosterEntry | RoundEntry | MetricsEntry):
            self.took_part |= {self.members[site].key for site in entry.sites if self.approves(site)}
        if isinstance(entry, RunEntry):
            self.said = entry.event
        elif isinstance(entry, ReadinessEntry):
            if (said := self.readiness_of(entry.site, entry.statement)) is not None:
                self.ready[entry.site] = said
                self.fresh.add(entry.site)
        elif isinstance(entry, RosterEntry):
            self._begun(entry)
        elif isinstance(entry, RoundEntry):
            self._counted(entry)
        elif isinstance(entry, MetricsEntry):
            self.test = entry if entry.fold == "test" else self.test
            self._heard(entry.spent, entry.fold)
        elif isinstance(entry, EndEntry):
            self.end, self.said = entry, "ended"

    def _begun(self, entry: RosterEntry) -> None:
        """The run stands at a round: at the last, or at an earlier one where later ones were lost."""
        self.roster, self.round = entry, entry.round
        self.fresh.clear()
        self.models.setdefault(entry.round, entry.model)
        self.models = {number: model for number, model in self.models.items() if number <= entry.round}
        self.counted = {number: sites for number, sites in self.counted.items() if number <= entry.round}

    def _counted(self, entry: RoundEntry) -> None:
        self.round = entry.round
        self.models[entry.round] = entry.model
        self.counted[entry.round] = entry.sites
        self._heard(entry.spent, "train")

    def _heard(self, spent: Mapping[str, str], purpose: str) -> None:
        for site, envelope in spent.items():
            said = self.spent_of(site, envelope)
            if said is not None:
                self.spent[site, purpose] = said

    # --- statements

    def approval_of(self, entry: ApprovalEntry) -> Approval | None:
        """What a site decided; None if the key of the certificate that the entry names did not sign it."""
        opened = self._opened(entry.statement, entry.certificate, open_approval)
        return opened if isinstance(opened, Approval) else None

    def spent_of(self, site: str, envelope: str) -> Spent | None:
        """What a member says it has spent; None if it is not signed with the key that it is enrolled with."""
        member = self.members.get(site)
        opened = None if member is None else self._opened(envelope, member.certificates[-1], open_spent)
        return opened if isinstance(opened, Spent) else None

    def readiness_of(self, site: str, envelope: str) -> Readiness | None:
        """What a member says of its data; None if it is not signed with the key that it is enrolled with."""
        member = self.members.get(site)
        opened = None if member is None else self._opened(envelope, member.certificates[-1], open_readiness)
        return opened if isinstance(opened, Readiness) else None

    def _opened(self, envelope: str, certificate: str, opener: Callable[[bytes, PublicKey], Statement]) -> object:
        """A signed statement, verified once for an entry; None if it does not verify."""
        known = envelope, certificate
        if known not in self._verified:
            key = self.anchors.key_of(certificate)
            try:
                self._verified[known] = None if key is None else opener(envelope.encode(), key)
            except (EnvelopeError, UnicodeEncodeError):
                self._verified[known] = None
        return self._verified[known]


def _is_newer(decision: Decision, before: Decision) -> bool:
    """Of two words at the same time the revocation stands."""
    return decision.at > before.at or (decision.at == before.at and not decision.approves)
