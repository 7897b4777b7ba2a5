"""A site's own log held against the coordinator's: what the one says it got, the other must say it let go.

Rules:
  * Compared are the bundle's run and plan, and the site whose log it is.
  * What the coordinator counts (an update in a round, numbers of a fold, what the site said of its data, a decision, a
    cosignature) must stand in the site's log as a release: of this run, round and purpose, and of the same signed
    statement where there is one.
  * What the site let go must be accounted for by the coordinator: counted, or of a round or a fold of which it says
    that it did without the site, or that an attempt counts for nothing.
  * The site's log is read and not touched. Its tree is held against its own checkpoints, and the newest of them against
    the site's certificate.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from locum.common.audit import papers
from locum.common.audit.bundle import CHECKPOINTS, ENTRIES, BundleError, open_bundle
from locum.common.audit.rules import Wrong
from locum.common.audit.standing import Anchors
from locum.common.audit.tree import checkpoints, entry_of
from locum.common.canonical import sha256_hex
from locum.common.errors import DataError
from locum.common.identity import certified_key
from locum.common.log.entries import (
    ApprovalEntry,
    DecisionEntry,
    Entry,
    EntryError,
    MetricsEntry,
    OwnerEntry,
    ReadinessEntry,
    ReleaseEntry,
    RosterEntry,
    RoundEntry,
    VoidEntry,
    read_entry,
)
from locum.common.log.merkle import Frontier, leaf_hash
from locum.common.log.note import Line, NoteError, check_signature, opened
from locum.common.log.origins import site_origin

_REMEDY = "restore the site's log from a backup"


@dataclass(frozen=True)
class Difference:
    """Something that one log says and the other does not.

    Attributes:
        coordinator: the number of the entry in the coordinator's log, if it says it; `site` likewise.
        what: one sentence.
    """

    coordinator: int | None
    site: int | None
    what: str

    def line(self) -> str:
        """The difference with where it stands."""
        places = [("coordinator's entry", self.coordinator), ("site's entry", self.site)]
        where = ", ".join(f"{name} {number}" for name, number in places if number is not None)
        return f"{where}: {self.what}"


@dataclass(frozen=True)
class Compared:
    """What came of a comparison.

    Attributes:
        compared: how many statements were held against each other.
        signed: how many entries of the site's log are under a checkpoint that the site has signed.
    """

    site: str
    run: str
    compared: int
    signed: int
    differences: tuple[Difference, ...]

    def lines(self) -> Iterator[str]:
        """The comparison in lines."""
        for difference in self.differences:
            yield difference.line()
        told = f"the log of {self.site} and the coordinator's"
        if self.differences:
            yield f"{told} differ in {len(self.differences)} of {self.compared} statements of {self.run}"
        else:
            yield f"{told} agree on all {self.compared} statements of {self.run}"
        yield f"{self.site} has signed for the first {self.signed} entries of its log"


def compare(bundle: Path, log: Path) -> Compared:
    """Compares a site's own log with that in a bundle; raises DataError if one of them cannot be read.

    Args:
        bundle: of a run.
        log: the folder of the site's log, or its `entries.jsonl`.
    """
    entries = log / ENTRIES if log.is_dir() else log
    owner = _owner(entries)
    coordinator, anchors = _coordinators(bundle, owner)
    own = _Own()
    signed = _read_own(entries, owner, own, anchors)
    return coordinator.held_against(own, signed)


# --- the site's log


@dataclass
class _Own:
    """What a site's log says that it let go: by what, the numbers of the entries.

    Attributes:
        releases: answers to tasks, by run, round and purpose; those that are failures are left out.
        signed: by the SHA-256 of a statement that was signed in a release.
        decided: by the SHA-256 of a decision, its plan.
        told: decisions that were sent.
    """

    releases: dict[tuple[str | None, int | None, str], list[int]] = field(default_factory=dict)
    signed: dict[str, int] = field(default_factory=dict)
    decided: dict[str, str] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)

    def take(self, number: int, entry: Entry) -> None:
        """One more entry."""
        if isinstance(entry, DecisionEntry):
            self.decided[sha256_hex(entry.statement.encode())] = entry.plan
        elif isinstance(entry, ReleaseEntry):
            self.signed.update(dict.fromkeys(entry.statements, number))
            if entry.purpose == "decision":
                self.told[entry.sha256] = number
            elif entry.code is None:
                self.releases.setdefault((entry.run, entry.round, entry.purpose), []).append(number)


def _own_lines(path: Path) -> Iterator[bytes]:
    """The entries of a site's file; one that a crash has cut short was never promised to anybody."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line.rstrip(b" \n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "give the folder of a site's log") from error


def _entry(content: bytes, number: int, path: Path) -> Entry:
    try:
        return read_entry(content)
    except EntryError as error:
        raise DataError(f"entry {number} of {path} cannot be read: {error}", _REMEDY) from error


def _owner(path: Path) -> OwnerEntry:
    first = next(_own_lines(path), b"")
    entry = _entry(first, 0, path)
    if not isinstance(entry, OwnerEntry):
        raise DataError(f"{path} is no log of a site: it begins with '{entry.kind}'", "give the folder of a site's log")
    return entry


def _read_own(path: Path, owner: OwnerEntry, own: _Own, anchors: Anchors) -> int:
    """Reads a site's log; how many of its entries the site has signed for. Raises DataError."""
    notes = dict(_notes(path.with_name(CHECKPOINTS)))
    frontier, good, newest = Frontier(), 0, ""
    for number, content in enumerate(_own_lines(path)):
        own.take(number, _entry(content, number, path))
        frontier.add(leaf_hash(content))
        if (note := notes.pop(frontier.size, None)) is not None:
            if opened(note)[0].root != frontier.root():
                raise DataError(f"{path} was changed between entries {good} and {number}, after it was signed", _REMEDY)
            good, newest = frontier.size, note
    if notes:
        raise DataError(f"{path} ends at entry {frontier.size}, and more of it was signed", _REMEDY)
    if newest:
        _check_signed(newest, owner, anchors)
    return good


def _notes(path: Path) -> Iterator[tuple[int, str]]:
    """The checkpoints beside a site's log, by size."""
    if not path.exists():
        return
    for line in _own_lines(path):
        try:
            note = json.loads(line).get("checkpoint")
            if note is not None:
                yield opened(note)[0].size, note
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path} holds something else than checkpoints", _REMEDY) from error


def _check_signed(note: str, owner: OwnerEntry, anchors: Anchors) -> None:
    """Raises DataError unless a certificate of the site has the key that signed the newest checkpoint."""
    name, problem = site_origin(owner.federation, owner.site), f"{owner.site} has no certificate in the bundle"
    for digest, site in anchors.names.items():
        if site == owner.site:
            try:
                check_signature(note, name, certified_key(anchors.sites[digest]))
            except NoteError as error:
                problem = str(error)
            else:
                return
    raise DataError(f"the log is not signed by {owner.site}: {problem}", "give the log of this site, or its own bundle")


# --- the coordinator's


@dataclass
class _Coordinators:
    """What the coordinator's log says of one site, in one run; numbers are those of its entries.

    Attributes:
        updates: rounds that count it, with the digest of its upload where it was masked.
        folds: measurements that have its numbers.
        decisions: by the SHA-256 of the statement; `readiness` likewise.
        cosignatures: by the SHA-256 of the line, the last entry that its checkpoint counts.
        without: rounds and folds of which the log says that something was done without it or counts for nothing.
    """

    site: str
    run: str
    plan: str
    updates: list[tuple[int, int, str | None]] = field(default_factory=list)
    folds: list[tuple[int, int, str]] = field(default_factory=list)
    decisions: dict[str, int] = field(default_factory=dict)
    readiness: dict[str, int] = field(default_factory=dict)
    cosignatures: dict[str, int] = field(default_factory=dict)
    without: set[tuple[int, str]] = field(default_factory=set)

    def take(self, number: int, entry: Entry) -> None:
        """One more entry."""
        if isinstance(entry, ApprovalEntry):
            if (entry.site, entry.plan) == (self.site, self.plan):
                self.decisions[sha256_hex(entry.statement.encode())] = number
        elif isinstance(entry, ReadinessEntry):
            if (entry.site, entry.run) == (self.site, self.run):
                self.readiness[sha256_hex(entry.statement.encode())] = number
        elif isinstance(entry, RoundEntry | VoidEntry | MetricsEntry | RosterEntry) and entry.run == self.run:
            self._of_run(number, entry)

    def _of_run(self, number: int, entry: RoundEntry | VoidEntry | MetricsEntry | RosterEntry) -> None:
        if isinstance(entry, RoundEntry):
            if self.site in entry.sites:
                upload = None if entry.secured is None else entry.secured.uploads.get(self.site)
                self.updates.append((number, entry.round, upload))
            else:
                self.without.add((entry.round, "train"))
        elif isinstance(entry, MetricsEntry):
            if self.site in entry.sites:
                self.folds.append((number, entry.round, entry.fold))
            else:
                self.without.add((entry.round, "evaluate"))
        elif isinstance(entry, VoidEntry):
            self.without.add((entry.round, "train" if entry.fold == "train" else "evaluate"))
        else:  # whoever goes on from a round may have made the next one before, and lost it
            self.without |= {(entry.round + 1, "train"), (entry.round, "evaluate")}

    def held_against(self, own: _Own, signed: int) -> Compared:
        """The comparison, both ways."""
        found = [*self._updates(own), *self._folds(own), *self._statements(own), *self._unaccounted(own)]
        statements = len(self.readiness) + len(self.decisions) + len(self.cosignatures)
        compared = len(self.updates) + len(self.folds) + statements
        found.sort(key=lambda each: (each.coordinator is None, each.coordinator or 0, each.site or 0))
        return Compared(self.site, self.run, compared, signed, tuple(found))

    def _updates(self, own: _Own) -> Iterator[Difference]:
        for number, of, upload in self.updates:
            if not own.releases.get((self.run, of, "train")):
                yield Difference(number, None, f"round {of} counts an update that the site did not let go")
            elif upload is not None and upload not in own.signed:
                (*_, last) = own.releases[self.run, of, "train"]
                yield Difference(number, last, f"round {of} counts another upload than the one that the site signed")

    def _folds(self, own: _Own) -> Iterator[Difference]:
        left = Counter({key: len(numbers) for key, numbers in own.releases.items() if key[2] == "evaluate"})
        for number, of, fold in self.folds:
            left[self.run, of, "evaluate"] -= 1
            if left[self.run, of, "evaluate"] < 0:
                what = f"the {fold} of round {of} counts numbers that the site did not let go"
                yield Difference(number, None, what)

    def _statements(self, own: _Own) -> Iterator[Difference]:
        for statement, number in self.decisions.items():
            if statement not in own.decided:
                yield Difference(number, None, "a decision on the plan that is not in the site's log")
        for statement, number in own.told.items():
            if own.decided.get(statement) == self.plan and statement not in self.decisions:
                yield Difference(None, number, "a decision that the site sent is not in the coordinator's log")
        for statement, number in self.readiness.items():
            if statement not in own.signed:
                yield Difference(number, None, "a statement of readiness that the site did not let go")
        for line, number in self.cosignatures.items():
            if line not in own.signed:
                yield Difference(number, None, "a cosignature that the site did not give")

    def _unaccounted(self, own: _Own) -> Iterator[Difference]:
        """What the site let go in this run, and the coordinator says nothing of."""
        known = {(of, "train") for _, of, _ in self.updates} | {(of, "evaluate") for _, of, _ in self.folds}
        for (run, of, purpose), numbers in own.releases.items():
            if run != self.run or of is None or purpose not in {"train", "evaluate"}:
                continue
            if (of, purpose) not in known | self.without:
                what = "an update" if purpose == "train" else "numbers"
                said = f"{what} of round {of} left the site, and the coordinator's log says nothing of it"
                yield Difference(None, numbers[-1], said)


def _coordinators(path: Path, owner: OwnerEntry) -> tuple[_Coordinators, Anchors]:
    """What a bundle says of a site; raises DataError."""
    with open_bundle(path) as bundle:
        try:
            anchors = papers.anchors_of(bundle, None)
            if owner.federation != anchors.federation:
                what = f"the log is of the federation {owner.federation}, and the bundle of {anchors.federation}"
                raise DataError(what, "give the bundle of the site's own federation")
            found = _Coordinators(owner.site, bundle.manifest.run, bundle.manifest.plan)
            for number, content in enumerate(bundle.lines(ENTRIES)):
                found.take(number, entry_of(content, number, anchors))
            name = site_origin(owner.federation, owner.site)
            for signed in checkpoints(bundle.lines(CHECKPOINTS)):
                lines = [line for line in signed.lines if line.name == name]
                found.cosignatures |= {_digest(line): signed.size - 1 for line in lines}
        except Wrong as wrong:
            raise BundleError(f"{path} does not hold: {wrong.what}", f"locum audit verify {path}") from wrong
    return found, anchors


def _digest(line: Line) -> str:
    return sha256_hex(line.text().encode())
