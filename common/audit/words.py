"""Entries and reasons in words."""

from __future__ import annotations

from collections.abc import Mapping

from locum.common.errors import MEANING, Code
from locum.common.log.entries import (
    AnswerEntry,
    ApprovalEntry,
    DecisionEntry,
    EndEntry,
    Entry,
    FederationEntry,
    MetricsEntry,
    ProposalEntry,
    QuestionEntry,
    ReadinessEntry,
    RefusalEntry,
    ReleaseEntry,
    RosterEntry,
    RoundEntry,
    RunEntry,
    SiteEntry,
    VoidEntry,
)

#: What is no code of a site.
_WORDS: Mapping[str, str] = {
    "AWAY": "not heard from",
    "LATE": "no answer by the deadline",
    "NOT_ADMITTED": "its answer did not pass the coordinator's checks",
    "OUTSIDE": "not in the roster of keys of the secure sum",
}


def reason(word: str) -> str:
    """Why a site is missing, for a person."""
    if word in _WORDS:
        return _WORDS[word]
    return (
        MEANING[Code[word]][0] if word in Code.__members__ and Code[word] in MEANING else word.lower().replace("_", " ")
    )


def named(entry: Entry) -> str:
    """What an entry is, in a few words."""
    if isinstance(entry, RoundEntry):
        return f"round {entry.round} of {entry.run}"
    if isinstance(entry, MetricsEntry):
        return f"{entry.fold} metrics of round {entry.round} of {entry.run}"
    if isinstance(entry, RosterEntry):
        return f"roster of {entry.run} at round {entry.round}"
    if isinstance(entry, RunEntry | EndEntry):
        return f"{entry.run} {entry.event if isinstance(entry, RunEntry) else 'ended'}"
    if isinstance(entry, ApprovalEntry):
        return f"decision of {entry.site} on plan {entry.plan[:12]}"
    return _of_federation(entry)


def _of_federation(entry: Entry) -> str:
    if isinstance(entry, FederationEntry):
        return f"beginning of the log of {entry.name}"
    if isinstance(entry, SiteEntry):
        return f"{entry.site} {entry.event}"
    if isinstance(entry, ProposalEntry):
        return f"proposal of plan {entry.plan[:12]}"
    if isinstance(entry, QuestionEntry):
        return f"cohort question {entry.question[:12]}"
    if isinstance(entry, AnswerEntry):
        return f"answer of {entry.site} to cohort question {entry.question[:12]}"
    return _of_site(entry)


def _of_site(entry: Entry) -> str:
    if isinstance(entry, ReleaseEntry):
        about = "" if entry.run is None else f" for {entry.run}"
        return f"release of {entry.purpose}{about}" + ("" if entry.round is None else f", round {entry.round}")
    if isinstance(entry, DecisionEntry):
        return f"decision on plan {entry.plan[:12]}"
    if isinstance(entry, RefusalEntry):
        return f"refusal of {entry.asked}"
    if isinstance(entry, ReadinessEntry):
        return f"readiness of {entry.site} for {entry.run}"
    if isinstance(entry, VoidEntry):
        return f"void attempt at round {entry.round} of {entry.run}"
    return entry.kind
