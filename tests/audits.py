"""A whole federation's log of a run, with real keys, certificates and signatures; and ways to lie about it.

Two kinds of peers misbehave. A coordinator that lies signs what it likes: give `bundle` other entries. Whoever meddles
with a bundle afterwards has no keys: use `meddled`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save

from locum.common.audit import bundle as bundles
from locum.common.audit.bundle import Bundle, Manifest, Parts, open_bundle, write_bundle
from locum.common.audit.statement import Loss, Release, seal_statement
from locum.common.audit.verify import Verdict, verify
from locum.common.canonical import canonical_json, sha256_hex
from locum.common.cohort import Answer, Query, Question, Told, seal_answer, seal_question
from locum.common.envelope import (
    CLAUSES,
    Approval,
    Proposal,
    Readiness,
    Spent,
    seal_approval,
    seal_proposal,
    seal_readiness,
    seal_spent,
)
from locum.common.identity import certificate_pem, fingerprint_of, new_key
from locum.common.log.entries import (
    AnswerEntry,
    ApprovalEntry,
    DecisionEntry,
    EndEntry,
    Entry,
    FederationEntry,
    MetricsEntry,
    OwnerEntry,
    ProposalEntry,
    QuestionEntry,
    ReadinessEntry,
    ReleaseEntry,
    RosterEntry,
    RoundEntry,
    RunEntry,
    SecureSumFields,
    SiteEntry,
    moment,
    written,
)
from locum.common.log.merkle import Frontier, leaf_hash
from locum.common.log.note import Checkpoint, cosign, sign, with_lines
from locum.common.log.origins import federation_origin, site_origin
from locum.common.log.store import Log
from locum.common.plan import Plan
from locum.common.secagg.roster import threshold_of
from locum.server.authority import Authority, found, load_log_certificate, load_log_key
from locum.server.home import Home
from locum.server.records import Evaluated, RunSummary

SITES = ("north", "riverside", "st-anne")
BEGAN = datetime(2026, 5, 4, 8, 0, tzinfo=UTC)
RUN = "20260504-test-ab12"
NAME = "Three Rivers"


def sha(text: str) -> str:
    """A digest of something that nobody looks at."""
    return sha256_hex(text.encode())


def model_of(number: int) -> bytes:
    """The file of the model of a round."""
    return save({"weight": np.full(8, number, np.float32)})


@dataclass
class Federation:
    """An authority, a log key, and sites with a key and a certificate each.

    Attributes:
        folder: an empty folder.
        plan: the plan of its run.
        sites: their names.
        older: keys of the plan, such as `seed` or `contract.split`, that the version of Locum which ran did not know.
    """

    folder: Path
    plan: Plan
    sites: Sequence[str] = SITES
    name: str = NAME
    days: float = 90
    older: Sequence[str] = ()
    authority: Authority = field(init=False)
    keys: dict[str, ec.EllipticCurvePrivateKey] = field(init=False)

    def __post_init__(self) -> None:
        home = Home(self.folder / "federation")
        home.authority.mkdir(parents=True)
        self.authority = found(home, self.name, timedelta(days=self.days), now=BEGAN)
        self.log_key, self.log_certificate = load_log_key(home), load_log_certificate(home)
        self.keys = {site: new_key() for site in self.sites}
        self.certificates = {
            site: self.authority.issue_site(site, key.public_key(), now=BEGAN) for site, key in self.keys.items()
        }
        self.proposal = seal_proposal(
            Proposal(
                digest=self.digest,
                plan=json.loads(self.content),
                proposed_at=self.at(4).timestamp(),
                by="the ML team",
            ),
            self.log_key,
        )

    @property
    def content(self) -> bytes:
        """The plan as it was proposed."""
        written = json.loads(self.plan.canonical())
        for key in self.older:
            section, _, inner = key.rpartition(".")
            (written[section] if section else written).pop(inner)
        return canonical_json(written)

    @property
    def digest(self) -> str:
        """Its digest."""
        return sha256_hex(self.content)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the authority's certificate."""
        return fingerprint_of(self.authority.certificate)

    def at(self, minutes: float) -> datetime:
        """So many minutes after the beginning."""
        return BEGAN + timedelta(minutes=minutes)

    # --- statements

    def approval(self, site: str, minutes: float, decision: Any = "approve", /, **lies: Any) -> ApprovalEntry:
        """A site's decision, as it stands in the log; `key`, `certificate` and `digest` may be others'."""
        said = Approval(
            site=site,
            digest=lies.get("digest", self.digest),
            at=self.at(minutes).timestamp(),
            decision=decision,
            steward=lies.get("steward", "A. Steward"),
        )
        return ApprovalEntry(
            at=moment(self.at(minutes)),
            site=site,
            plan=self.digest,
            statement=seal_approval(said, lies.get("key", self.keys[site])).decode(),
            certificate=lies.get("certificate", fingerprint_of(self.certificates[site])),
        )

    def spent(self, site: str, number: int, purpose: Any, epsilon: float, /, **lies: Any) -> str:
        """What a site says it has spent."""
        fields = {"site": site, "run": RUN, "plan": self.digest, "round": number, "purpose": purpose,
                  "at": BEGAN.timestamp(), "epsilon": epsilon, "delta": 1e-6, **lies}  # fmt: skip
        key = fields.pop("key", self.keys[site])
        return seal_spent(Spent(**fields), key).decode()

    def spent_all(self, number: int, purpose: str, epsilon: float) -> dict[str, str]:
        """What each site says, of a private plan."""
        return {s: self.spent(s, number, purpose, epsilon) for s in self.sites} if self.plan.private else {}

    def readiness(self, site: str, minutes: float = 6.5, failing: Sequence[str] = (), /, **lies: Any) -> ReadinessEntry:
        """What a site says of its data, as it stands in the log; `key`, `site`, `plan` and `run` may be others'."""
        key, entry = lies.pop("key", self.keys[site]), lies.pop("entry", {})
        fields = {"site": site, "run": RUN, "plan": self.digest, "at": self.at(minutes).timestamp(), "step": 10,
                  "clauses": {name: name not in failing for name in CLAUSES}, "ready": not failing,
                  "patients": None if failing else 40, **lies}  # fmt: skip
        said = seal_readiness(Readiness(**fields), key).decode()
        return ReadinessEntry(**{**self.of_run(minutes), "site": site, "statement": said, **entry})

    def question(self, minutes: float, /, **lies: Any) -> QuestionEntry:
        """A cohort question, as it stands in the log; `key` and `entry` may be others'."""
        key, entry = lies.pop("key", self.log_key), lies.pop("entry", {})
        query = Query.model_validate({"name": "patients", "study": "study", "purpose": "to count", **lies})
        at = self.at(minutes).timestamp()
        fields = {"digest": query.digest, "query": query.model_dump(mode="json"), "asked_at": at, "until": at + 3600}
        said = seal_question(Question(**fields, by="the ML team"), key).decode()
        return QuestionEntry(**{"at": moment(self.at(minutes)), "question": query.digest, "statement": said, **entry})

    def answer(self, site: str, to: QuestionEntry, minutes: float, /, **lies: Any) -> AnswerEntry:
        """A site's answer, as it stands in the log; `key`, `entry` and the fields of an answer may be others'."""
        key, entry = lies.pop("key", self.keys[site]), lies.pop("entry", {})
        fields = {"site": site, "question": to.question, "at": self.at(minutes).timestamp(), "least_cell": 10,
                  "cells": (Told(table=0, key=(), patients=40),), **lies}  # fmt: skip
        said = seal_answer(Answer(**fields), key).decode()
        certificate = fingerprint_of(self.certificates[site])
        return AnswerEntry(**{"at": moment(self.at(minutes)), "site": site, "question": to.question, "statement": said,
                              "certificate": certificate, **entry})  # fmt: skip

    # --- the log

    def joined(self) -> list[Entry]:
        """The federation until the plan is approved by all."""
        sites = [
            SiteEntry(at=moment(self.at(n)), site=site, event="enrolled", certificate=fingerprint_of(certificate))
            for n, (site, certificate) in enumerate(self.certificates.items(), start=1)
        ]
        return [
            FederationEntry(
                at=moment(BEGAN),
                name=self.name,
                authority=self.fingerprint,
                log_key=fingerprint_of(self.log_certificate),
            ),
            *sites,
            ProposalEntry(at=moment(self.at(4)), plan=self.digest, statement=sha256_hex(self.proposal)),
            *(self.approval(site, 5 + n / 60) for n, site in enumerate(self.sites)),
        ]

    def roster(self, minutes: float = 7, /, **lies: Any) -> RosterEntry:
        """All sites agree on the configuration."""
        fields = {
            **self.of_run(minutes), "round": 0, "model": sha256_hex(model_of(0)), "sites": tuple(self.sites),
            "configuration": sha("configuration"), "policies": {s: sha(s) for s in self.sites}, "excluded": {},
        }  # fmt: skip
        return RosterEntry(**{**fields, **lies})

    def round(self, number: int, minutes: float, /, **lies: Any) -> RoundEntry:
        """A committed round over all sites, or those that `sites` says."""
        sites = tuple(lies.get("sites", self.sites))
        fields = {
            **self.of_run(minutes), "round": number, "attempt": 1,
            "start": sha256_hex(model_of(number - 1)), "model": sha256_hex(model_of(number)), "sites": sites,
            "secured": self.secured(number, sites) if self.plan.secured else None,
            "refused": dict.fromkeys(sorted(set(self.sites) - set(sites)), "LATE"),
            "spent": {s: e for s, e in self.spent_all(number, "train", number / 2).items() if s in sites},
        }  # fmt: skip
        return RoundEntry(**{**fields, **lies})

    def secured(self, number: int, sites: Sequence[str], /, **lies: Any) -> SecureSumFields:
        """A secure sum over these sites."""
        fields = {"roster": sha("keys"), "context": sha(f"context {number}"), "sites": len(self.sites),
                  "threshold": threshold_of(len(self.sites)), "uploads": {s: self.upload(s, number) for s in sites},
                  "total": sha(f"total {number}")}  # fmt: skip
        return SecureSumFields(**{**fields, **lies})

    def upload(self, site: str, number: int) -> str:
        """The digest of a site's signed header."""
        return sha(f"upload of {site} in round {number}")

    def metrics(self, number: int, minutes: float, fold: Any = "validation", /, **lies: Any) -> MetricsEntry:
        """What was measured of the model of a round."""
        per_site = {s: {"AUC": 0.5 + n / 100, "accuracy": 0.5} for n, s in enumerate(self.sites)}
        released = self.plan.released_metrics
        fields = {**self.of_run(minutes), "round": number, "fold": fold, "model": sha256_hex(model_of(number)),
                  "sites": tuple(self.sites), "cases": 30, "refused": {},
                  "overall": dict.fromkeys(released, 0.5 + number / 100),
                  "per_site": per_site if self.plan.tells("metrics") and released else {},
                  "spent": {} if self._silent else self.spent_all(number, fold, number / 10)}  # fmt: skip
        return MetricsEntry(**{**fields, **lies})

    @property
    def _silent(self) -> bool:
        return self.plan.private is None or self.plan.private.metrics_epsilon is None

    def said(self, event: Any, minutes: float) -> RunEntry:
        """Something became of the run."""
        return RunEntry(**self.of_run(minutes), event=event)

    def end(self, minutes: float, /, **lies: Any) -> EndEntry:
        """The run's end."""
        rounds = self.plan.rounds
        fields = {**self.of_run(minutes), "status": "completed", "round": rounds, "model": sha256_hex(model_of(rounds))}
        return EndEntry(**{**fields, **lies})

    def of_run(self, minutes: float) -> dict[str, Any]:
        """What every entry of the run has."""
        return {"at": moment(self.at(minutes)), "run": RUN, "plan": self.digest}

    def history(self) -> list[Entry]:
        """The whole true log of a run, the same at every call.

        With three sites: 0 federation, 1–3 sites, 4 proposal, 5–7 approvals, 8 started, 9–11 readiness, 12 roster, then
        a round and its metrics each, the test, and the end.
        """
        return list(self._history)

    @cached_property
    def _history(self) -> list[Entry]:
        ready = [] if "contract.consent" in self.older else [self.readiness(site) for site in self.sites]
        entries = [*self.joined(), self.said("started", 6), *ready, self.roster()]
        for number in range(1, self.plan.rounds + 1):
            entries += [self.round(number, 10 * number), self.metrics(number, 10 * number + 5)]
        after = 10 * (self.plan.rounds + 1)
        return [*entries, self.metrics(self.plan.rounds, after, "test"), self.end(after + 1)]

    # --- the bundle

    def checkpoints(self, leaves: Iterable[bytes], *, key: Any = None, every: int = 1) -> list[str]:
        """The checkpoints of a log: after each entry, or after so many, and after the last."""
        origin, frontier, notes = federation_origin(self.name), Frontier(), []
        lines = list(leaves)
        for number, leaf in enumerate(lines, start=1):
            frontier.add(leaf_hash(leaf))
            if number % every == 0 or number == len(lines):
                notes.append(sign(Checkpoint(origin, number, frontier.root()), origin, key or self.log_key))
        return notes

    def cosigned(self, note: str, site: str, *, minutes: float = 600, key: Any = None) -> str:
        """A site's line under a checkpoint."""
        return cosign(note, site_origin(self.name, site), key or self.keys[site], self.at(minutes))

    def witnessed(self, notes: Sequence[str], *, minutes: float = 600) -> list[str]:
        """The checkpoints, the last of them cosigned by every site."""
        *before, last = notes
        if minutes == 600 and sha256_hex(last.encode()) == self._last_note:
            return [*before, with_lines(last, self._lines.values())]
        return [*before, with_lines(last, [self.cosigned(last, site, minutes=minutes) for site in self.sites])]

    @cached_property
    def _last_note(self) -> str:
        return sha256_hex(self.checkpoints(map(written, self.history()))[-1].encode())

    def statement(self, entries: Sequence[Entry], notes: Sequence[str], **lies: Any) -> bytes:
        """The statement that goes with the model."""
        (end,) = [entry for entry in entries if isinstance(entry, EndEntry)][-1:]
        spent = {site: Loss(epsilon=entry.round / 2, delta=1e-6)
                 for entry in entries if isinstance(entry, RoundEntry) for site in entry.spent}  # fmt: skip
        fields = {
            "federation": self.name, "run": RUN, "plan": self.digest, "round": end.round, "status": end.status,
            "roster": tuple(self.sites), "checkpoint": _bare(notes[-1]), "at": end.at,
            "epsilon": spent,
            "authority": certificate_pem(self.authority.certificate).decode(),
            "log": certificate_pem(self.log_certificate).decode(),
        }  # fmt: skip
        model, key = lies.pop("of", end.model), lies.pop("key", self.log_key)
        return seal_statement(model, Release(**{**fields, **lies}), key)

    def bundle(
        self,
        entries: Sequence[Entry] | None = None,
        *,
        notes: Sequence[str] | None = None,
        name: str = "bundle.zip",
        **members: bytes | None,
    ) -> Path:
        """A bundle of these entries, which the coordinator signed and the sites cosigned; `members` replace its own."""
        told = list(self.history() if entries is None else entries)
        leaves = [written(entry) for entry in told]
        signed = self.witnessed(self.checkpoints(leaves)) if notes is None else list(notes)
        ends = [entry for entry in told if isinstance(entry, EndEntry)]
        content: dict[str, bytes | None] = {
            bundles.AUTHORITY: certificate_pem(self.authority.certificate),
            bundles.LOG_KEY: certificate_pem(self.log_certificate),
            bundles.CERTIFICATES: b"".join(map(certificate_pem, self.certificates.values())),
            bundles.ENTRIES: b"".join(leaf + b"\n" for leaf in leaves),
            bundles.CHECKPOINTS: lines_of(signed),
            bundles.PROPOSAL: self.proposal,
            bundles.PLAN: self.content,
            **(self._results(told, signed) if ends else {}),
            **{_member(name): value for name, value in members.items()},
        }
        path = self.folder / name
        parts = Parts(self.name, RUN, self.digest, ends[-1].model if ends else None,
                      {name: value for name, value in content.items() if value is not None})  # fmt: skip
        write_bundle(path, parts)
        return path

    def _results(self, entries: Sequence[Entry], notes: Sequence[str]) -> dict[str, bytes]:
        (end,) = [entry for entry in entries if isinstance(entry, EndEntry)][-1:]
        test = [entry for entry in entries if isinstance(entry, MetricsEntry) and entry.fold == "test"]
        told = test[-1] if test else self.metrics(end.round, 0, "test")
        overall = told.model_dump(mode="json")["overall"]
        evaluated = Evaluated(round=told.round, fold="test", overall=overall, per_site={}, cases={})
        summary = RunSummary(
            status=end.status,
            round=end.round,
            sites=tuple(self.sites),
            excluded={},
            lost={},
            test=evaluated,
            history=(),
        )
        return {
            bundles.SUMMARY: summary.model_dump_json(indent=1).encode(),
            bundles.CARD: f"# Model card\n\nSHA-256 `{end.model}`\n".encode(),
            bundles.STATEMENT: self.statement(entries, notes),
            bundles.MODEL: model_of(end.round),
        }

    # --- a site's own log

    def releases(self, site: str, *, line: str | None = None) -> list[Entry]:
        """What a site says it let go in the true run: its decision, an update a round, its numbers, its cosignature.

        0 owner, 1 decision, 2 that it was sent, 3 what it said of its data, then an update and numbers a round, the
        test, and a cosignature, that is `line`, or the one under the true log.
        """
        (entry,) = [e for e in self.history() if isinstance(e, ApprovalEntry) and e.site == site]
        said: list[Entry] = [
            OwnerEntry(at=moment(self.at(1)), federation=self.name, site=site),
            DecisionEntry(at=moment(self.at(5)), plan=self.digest, statement=entry.statement),
            self.released("decision", 5, sha256=sha256_hex(entry.statement.encode())),
            *(
                self.released("query.describe", 6.5, run=RUN, statements=(sha256_hex(e.statement.encode()),))
                for e in self.history()
                if isinstance(e, ReadinessEntry) and e.site == site
            ),
        ]
        for number in range(1, self.plan.rounds + 1):
            uploads = (self.upload(site, number),) if self.plan.secured else ()
            said.append(self.released("train", 10 * number, run=RUN, round=number, statements=uploads))
            said.append(self.released("evaluate", 10 * number + 5, run=RUN, round=number))
        after = 10 * (self.plan.rounds + 1)
        said.append(self.released("evaluate", after, run=RUN, round=self.plan.rounds))
        return [
            *said,
            self.released("cosignature", after + 1, statements=(sha256_hex((line or self.line(site)).encode()),)),
        ]

    def line(self, site: str) -> str:
        """The site's cosignature under the last checkpoint of the true log, the same at every call."""
        return self._lines[site]

    @cached_property
    def _lines(self) -> dict[str, str]:
        last = self.checkpoints(map(written, self.history()))[-1]
        return {site: self.cosigned(last, site) for site in self.sites}

    def released(self, purpose: str, minutes: float, /, **fields: Any) -> ReleaseEntry:
        """Something that left."""
        return ReleaseEntry(
            **{"at": moment(self.at(minutes)), "purpose": purpose, "bytes": 9, "sha256": sha(purpose), **fields}
        )

    def site_log(self, site: str, entries: Sequence[Entry] | None = None, *, name: str = "", key: Any = None) -> Path:
        """A folder with a site's log of these entries, signed with its key after the last."""
        folder = self.folder / (name or f"log-{len(list(self.folder.iterdir()))}")
        log = Log(folder, site_origin(self.name, site))
        log.append(*(self.releases(site) if entries is None else entries))
        log.checkpoint(lambda checkpoint: sign(checkpoint, checkpoint.origin, key or self.keys[site], self.at(700)))
        return folder


def _bare(note: str) -> str:
    """A checkpoint with the log key's line alone."""
    text, _, lines = note.partition("\n\n")
    return f"{text}\n\n{lines.splitlines()[0]}\n"


def _member(name: str) -> str:
    """`model_safetensors` for `model.safetensors`: the members' names as words of Python."""
    return next(known for known in bundles.LIMITS if known.replace(".", "_") == name)


def lines_of(notes: Iterable[str]) -> bytes:
    """Checkpoints as they stand in a bundle."""
    return b"".join(canonical_json({"checkpoint": note}) + b"\n" for note in notes)


def leaves_of(path: Path) -> list[bytes]:
    """The entries of a bundle."""
    with open_bundle(path) as bundle:
        return list(bundle.lines(bundles.ENTRIES))


def members_of(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """A bundle taken apart."""
    with open_bundle(path) as bundle:
        return bundle.manifest, {name: _content(bundle, name) for name in bundle.manifest.members}


def _content(bundle: Bundle, name: str) -> bytes:
    return b"".join(bundle._chunks(name))


def meddled(path: Path, change: Callable[[dict[str, bytes]], None], **fields: Any) -> Path:
    """A copy of a bundle with other members, and a manifest that fits them."""
    manifest, members = members_of(path)
    change(members)
    of = {"federation": manifest.federation, "run": manifest.run, "plan": manifest.plan, "model": manifest.model}
    target = path.with_name(f"meddled-{hashlib.sha256(path.name.encode()).hexdigest()[:8]}.zip")
    write_bundle(target, Parts(**{**of, **fields}, members=members))
    return target


def with_leaves(path: Path, change: Callable[[list[bytes]], Any]) -> Path:
    """A copy of a bundle whose entries somebody has changed, who has no keys."""

    def changed(members: dict[str, bytes]) -> None:
        leaves = members[bundles.ENTRIES].splitlines()
        change(leaves)
        members[bundles.ENTRIES] = b"".join(leaf + b"\n" for leaf in leaves)

    return meddled(path, changed)


def edited(leaf: bytes, **fields: Any) -> bytes:
    """An entry with other fields, in canonical JSON."""
    return canonical_json({**json.loads(leaf), **fields})


@dataclass(frozen=True)
class Failure:
    """What `verify` names first: the check, the entry and the two sentences."""

    check: int
    entry: int | None
    told: str
    means: str


def failure(path: Path, **options: Any) -> Failure | None:
    """What `verify` names first; None if all holds."""
    found = verify(path, **options)
    return None if found.first is None else failure_of(found)


def failure_of(verdict: Verdict) -> Failure:
    """What a verdict names first."""
    assert verdict.first is not None
    first = verdict.first
    return Failure(first.number, first.entry, first.told, first.means)
