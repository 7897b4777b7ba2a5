"""Checks of the log itself: the form of its entries, the tree over them, who signed it and who witnessed that.

Rules:
  * Entries and checkpoints are read side by side, once, an entry at a time.
  * A checkpoint tells of all entries before it. So an entry that was changed is named as closely as checkpoints stand:
    between the last that is right and the first that is not.
  * A cosignature says that its site has seen this checkpoint as the continuation of all that it had seen before. It
    counts if a certificate of that site was valid when it was made, and not revoked before. A key of which the log says
    nothing is nobody's, whatever certificate lies in the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509

from locum.common.audit.bundle import CHECKPOINTS
from locum.common.audit.rules import Wrong, some
from locum.common.audit.standing import Anchors, Standing
from locum.common.canonical import canonical_json
from locum.common.identity import IdentityError, certified_key, check_valid, fingerprint_of, public_key_sha256
from locum.common.log.entries import (
    AnswerEntry,
    ApprovalEntry,
    EndEntry,
    Entry,
    EntryError,
    FederationEntry,
    MetricsEntry,
    ProposalEntry,
    QuestionEntry,
    ReadinessEntry,
    RosterEntry,
    RoundEntry,
    RunEntry,
    SiteEntry,
    VoidEntry,
    moment,
    read_entry,
)
from locum.common.log.merkle import Frontier, leaf_hash
from locum.common.log.note import Line, NoteError, check_cosignature, check_signature, key_hash, opened
from locum.common.log.origins import federation_origin, site_origin

_COORDINATORS = (
    FederationEntry, SiteEntry, ProposalEntry, ApprovalEntry, QuestionEntry, AnswerEntry, RunEntry, ReadinessEntry,
    RosterEntry, RoundEntry, VoidEntry, MetricsEntry, EndEntry,
)  # fmt: skip
_UNSIGNED = "what the log key signed is not known"


@dataclass(frozen=True)
class Signed:
    """A checkpoint of the bundle: its note, how many entries it counts, their root, and its lines."""

    note: str
    size: int
    root: bytes
    origin: str
    lines: tuple[Line, ...]


def checkpoints(lines: Iterator[bytes]) -> Iterator[Signed]:
    """The checkpoints of a bundle in their order; raises Wrong for a line that is none."""
    for number, line in enumerate(lines, start=1):
        try:
            note = json.loads(line)["checkpoint"]
            checkpoint, signatures = opened(note)
            canonical = canonical_json({"checkpoint": note}) == line
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Wrong(f"line {number} of {CHECKPOINTS} is no checkpoint: {error}", _UNSIGNED) from error
        if not canonical:
            raise Wrong(f"line {number} of {CHECKPOINTS} is not in canonical JSON", _UNSIGNED)
        yield Signed(note, checkpoint.size, checkpoint.root, checkpoint.origin, signatures)


# --- entries


def entry_of(content: bytes, number: int, anchors: Anchors) -> Entry:
    """An entry of a coordinator's log; raises Wrong."""
    try:
        entry = read_entry(content)
    except EntryError as error:
        raise Wrong(str(error), "it was changed, or written by something else than Locum") from error
    if not isinstance(entry, _COORDINATORS):
        raise Wrong(f"an entry '{entry.kind}' is of a site's own log", "the log is not a coordinator's")
    if (number == 0) != isinstance(entry, FederationEntry):
        raise Wrong("the first entry, and no other, says whose log it is", "this is not a log from its beginning")
    if isinstance(entry, FederationEntry):
        _check_federation(entry, anchors)
    return entry


def _check_federation(entry: FederationEntry, anchors: Anchors) -> None:
    named = entry.name, entry.authority, entry.log_key
    if named != (anchors.federation, fingerprint_of(anchors.authority), fingerprint_of(anchors.log)):
        raise Wrong(
            f"the log is that of the federation {entry.name} with the authority {entry.authority[:12]}",
            "the certificates in the bundle are those of another federation",
        )


# --- the tree and its signatures


@dataclass
class Tree:
    """The tree over the entries so far, held against the checkpoints.

    Attributes:
        good: how many entries the last checkpoint that is right counts.
        signatures: the first thing that is wrong with a signature of the log key.
        witnesses: likewise with a cosignature.
        last_seen: by a witness's key, the site, when it signed last, and how many entries that counts.
        covers: by a witness's key, the site, and the most entries that it signed.
    """

    anchors: Anchors
    signed: Iterator[Signed]
    good: int = 0
    count: int = 0
    signatures: Wrong | None = None
    witnesses: Wrong | None = None
    last_seen: dict[str, tuple[str, datetime, int]] = field(default_factory=dict)
    covers: dict[str, tuple[str, int]] = field(default_factory=dict)
    _frontier: Frontier = field(default_factory=Frontier)
    _next: Signed | None = None
    _keys: dict[tuple[str, bytes], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for certificate, site in self.anchors.names.items():
            name = site_origin(self.anchors.federation, site)
            known = name, key_hash(name, certified_key(self.anchors.sites[certificate]))
            self._keys.setdefault(known, []).append(certificate)
        self._next = self._after(-1)
        self._hold()

    @property
    def size(self) -> int:
        """How many entries there are so far."""
        return self._frontier.size

    def add(self, content: bytes) -> None:
        """One more entry; raises Wrong if a checkpoint counts it and has another root."""
        self._frontier.add(leaf_hash(content))
        self._hold()

    def close(self) -> str:
        """After the last entry; in words, what was found. Raises Wrong."""
        if self._next is not None:
            raise Wrong(
                f"the log ends here, and a checkpoint of {self._next.size} entries was signed",
                "its end was cut off",
                self.size,
            )
        if self.good < self.size:
            raise Wrong(
                f"the last checkpoint counts {self.good} entries, and there are {self.size}",
                "what comes after it was signed by nobody",
                self.good,
            )
        return f"{self.size} entries, {self.count} checkpoints, root {self._frontier.root().hex()[:16]}"

    def _hold(self) -> None:
        if self._next is None or self._next.size != self.size:
            return
        origin = federation_origin(self.anchors.federation)
        if self._next.origin != origin:
            raise Wrong(f"a checkpoint is of the log {self._next.origin}, not of {origin}", _UNSIGNED, self.good)
        if self._next.root != self._frontier.root():
            roots = self._next.root.hex()[:16], self._frontier.root().hex()[:16]
            raise Wrong(
                f"the checkpoint of {self.size} entries has the root {roots[0]}, and these entries have {roots[1]}",
                f"{_between(self.good, self.size)} changed, removed, put in or moved after the log key had signed",
                self.good,
            )
        self._look(self._next)
        self.good, self.count = self.size, self.count + 1
        self._next = self._after(self.size)

    def _after(self, size: int) -> Signed | None:
        found = next(self.signed, None)
        if found is not None and found.size <= size:
            raise Wrong(
                f"a checkpoint of {found.size} entries comes after one of {size}",
                "two histories of one log were signed, or the checkpoints were moved",
                self.good,
            )
        return found

    def _look(self, signed: Signed) -> None:
        """Holds the signatures under a checkpoint against the certificates."""
        origin = federation_origin(self.anchors.federation)
        if self.signatures is None:
            try:
                check_signature(signed.note, origin, self.anchors.log_key)
            except NoteError as error:
                what = f"the checkpoint of {signed.size} entries does not count: {error}"
                means = "nobody vouches for these entries; the checkpoint is forged"
                self.signatures = Wrong(what, means, self.good)
        for line in signed.lines:
            if self.witnesses is None and line.name != origin:
                try:
                    self._witness(signed, line)
                except Wrong as wrong:
                    self.witnesses = Wrong(wrong.what, wrong.means, self.good)

    def _witness(self, signed: Signed, line: Line) -> None:
        site, certificates = line.name.rpartition("/")[2], self._keys.get((line.name, line.key_hash), [])
        what = f"the cosignature of {site} under the checkpoint of {signed.size} entries does not count"
        if not certificates:
            raise Wrong(f"{what}: no certificate of the federation has its key", "the witness is made up")
        key = certified_key(self.anchors.sites[certificates[0]])
        try:
            at = check_cosignature(signed.note, line.name, key)
        except NoteError as error:
            raise Wrong(
                f"{what}: {error}", "it is forged, or this site was shown another history of the log than this one"
            ) from error
        if not any(valid(self.anchors.sites[certificate], at) for certificate in certificates):
            raise Wrong(
                f"{what}: no certificate of it was valid at {at:%Y-%m-%d %H:%M}", "its key was not its own then"
            )
        digest = public_key_sha256(key)
        if digest not in self.last_seen or self.last_seen[digest][1] <= at:
            self.last_seen[digest] = site, at, signed.size
        self.covers[digest] = site, max(signed.size, self.covers.get(digest, (site, 0))[1])


def _between(good: int, size: int) -> str:
    return f"entry {good} was" if size - good == 1 else f"one of the entries {good} to {size - 1} was"


def valid(certificate: x509.Certificate, at: datetime) -> bool:
    """Whether a certificate was valid at a time."""
    try:
        check_valid(certificate, at)
    except IdentityError:
        return False
    return True


def witnessed(tree: Tree, standing: Standing, wanted: int | None) -> str:
    """Who vouches for all of the run; in words. Raises Wrong if these are fewer than `wanted`.

    `wanted` is None for more than half of the run's sites, those of its roster and of its rounds, each with a key under
    which it took part; else so many sites of the federation, with any key that the log gave them.
    """
    if tree.witnesses is not None:
        raise tree.witnesses
    for key, (site, at, size) in tree.last_seen.items():
        ended = standing.revoked_at.get(key)
        if ended is not None and moment(at) > ended:
            raise Wrong(
                f"{site} cosigned the checkpoint of {size} entries at {at:%Y-%m-%d %H:%M:%S}, and was revoked before",
                "its word counts for nothing",
                size - 1,
            )
    end = 0 if standing.last is None else standing.last + 1
    keys = standing.keys if wanted is not None or standing.roster is None else standing.took_part
    sites = {site for key, (site, size) in tree.covers.items() if size >= end and key in keys}
    roster = set(standing.members) if standing.roster is None else set(standing.roster.sites)
    roster = roster.union(*standing.counted.values())
    needed, counted = (len(roster) // 2 + 1, sites & roster) if wanted is None else (wanted, sites)
    if len(counted) < needed:
        who = some(sorted(counted)) or "none"
        raise Wrong(
            f"{len(counted)} sites have cosigned a checkpoint that counts all of the run ({who}), {needed} are needed",
            "the coordinator may have shown others another log, or the sites have not reported since the run",
            standing.last,
        )
    return f"{len(counted)} sites vouch for all of the run ({some(sorted(counted))}), {needed} needed"
