"""What can stand in a log: the coordinator's, and a site's own.

Rules:
  * An entry is the canonical JSON (RFC 8785) of one of the types below; its bytes are a leaf of the tree. Any other
    spelling, and any unknown key or kind, is refused.
  * Nothing of a patient, no file name, and no free text: why something failed is one :data:`Word`.
  * What a site says of itself stands as the envelope that it signed.
  * Times are UTC, to the second, by the clock of whoever writes the log. The order is that of the entries.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from rfc8785 import CanonicalizationError

from locum.common.canonical import canonical_json
from locum.common.identity import SiteName

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
RunName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,80}$")]
Moment = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
#: Why a site did not contribute: the name of a :class:`locum.common.errors.Code`, or AWAY (not heard from), LATE (no
#: answer by the deadline), NOT_ADMITTED (the coordinator's own checks), OUTSIDE (not in the roster of keys).
Word = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z_]{2,39}$")]
#: A statement that a site or the coordinator signed (:mod:`locum.common.envelope`).
Envelope = Annotated[str, StringConstraints(min_length=2, max_length=64 << 10)]
Fold = Literal["train", "validation", "test"]
#: From here on JSON cannot hold every whole number (RFC 8785, section 3.2.2.3).
_TOO_MUCH = 1 << 53
#: A metric: a number, a confusion matrix (rows: truth, in cases), or null where it does not exist.
Number = float | tuple[tuple[float, ...], ...] | None
Metrics = dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]{1,40}$")], Number]


class EntryError(ValueError):
    """Bytes that are no entry of a log."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    at: Moment


# --- the coordinator's log


class FederationEntry(_Entry):
    """The first entry: whose log this is. `authority` and `log_key` are SHA-256 of the certificates (DER)."""

    kind: Literal["federation"] = "federation"
    name: str = Field(min_length=1, max_length=64)
    authority: Digest
    log_key: Digest


class SiteEntry(_Entry):
    """A change of the federation's members; `certificate` is the SHA-256 of the one that was issued (DER)."""

    kind: Literal["site"] = "site"
    site: SiteName
    event: Literal["enrolled", "renewed", "revoked"]
    certificate: Digest | None = None


class ProposalEntry(_Entry):
    """A plan was put before the sites; `statement` is the SHA-256 of the signed proposal."""

    kind: Literal["proposal"] = "proposal"
    plan: Digest
    statement: Digest


class ApprovalEntry(_Entry):
    """A site's decision on a plan, as it signed it, under the certificate with this SHA-256 (DER)."""

    kind: Literal["approval"] = "approval"
    site: SiteName
    plan: Digest
    statement: Envelope
    certificate: Digest


class QuestionEntry(_Entry):
    """A cohort question, as the log key signed it; in a site's own log, that it was answered."""

    kind: Literal["question"] = "question"
    question: Digest
    statement: Envelope


class AnswerEntry(_Entry):
    """A site's answer to a question, as it signed it, under the certificate with this SHA-256 (DER)."""

    kind: Literal["answer"] = "answer"
    site: SiteName
    question: Digest
    statement: Envelope
    certificate: Digest


class RunEntry(_Entry):
    """What became of a run. `completed` is in :class:`EndEntry`."""

    kind: Literal["run"] = "run"
    run: RunName
    plan: Digest
    event: Literal["started", "resumed", "paused", "stopped", "failed"]


class ReadinessEntry(_Entry):
    """What a site that was asked to take part said of its data, as it signed it."""

    kind: Literal["readiness"] = "readiness"
    run: RunName
    plan: Digest
    site: SiteName
    statement: Envelope


class RosterEntry(_Entry):
    """Who takes part from here on, after all agreed on one configuration.

    Attributes:
        configuration: the digest of what every site and the coordinator resolved the plan to.
        model: the SHA-256 of the file of the model that the run stands at.
        round: the round that this model is of.
        policies: by site, the digest of its policy.
        excluded: by site that was asked and is left out, why.
    """

    kind: Literal["roster"] = "roster"
    run: RunName
    plan: Digest
    round: int = Field(ge=0, lt=_TOO_MUCH)
    model: Digest
    sites: tuple[SiteName, ...]
    configuration: Digest
    policies: dict[SiteName, Digest]
    excluded: dict[SiteName, Word]


class SecureSumFields(BaseModel):
    """What a secure sum was.

    Attributes:
        roster: the digest of the signed roster of keys; `context` that of the sum's signed context.
        sites: of the roster.
        threshold: how many of them had to answer.
        uploads: by survivor, the SHA-256 of its signed header.
        total: the SHA-256 of the unmasked sum of the updates, little-endian ring elements; None in a sum of metrics.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    roster: Digest
    context: Digest
    sites: int = Field(ge=1, lt=_TOO_MUCH)
    threshold: int = Field(ge=1, lt=_TOO_MUCH)
    uploads: dict[SiteName, Digest]
    total: Digest | None = None


class RoundEntry(_Entry):
    """A committed round.

    Attributes:
        start: the SHA-256 of the model that went out; `model` that of the model after the round (files).
        sites: those whose updates are in the sum, sorted.
        secured: what the sum was, if it was a secure one.
        refused: by site that is not in it, why.
        spent: by site, its signed statement of what it has spent.
    """

    kind: Literal["round"] = "round"
    run: RunName
    plan: Digest
    round: int = Field(ge=1, lt=_TOO_MUCH)
    attempt: int = Field(ge=1, lt=_TOO_MUCH)
    start: Digest
    model: Digest
    sites: tuple[SiteName, ...]
    secured: SecureSumFields | None = None
    refused: dict[SiteName, Word]
    spent: dict[SiteName, Envelope]


class VoidEntry(_Entry):
    """An attempt that counts for nothing; `fold` says of which: `train` is a round."""

    kind: Literal["void"] = "void"
    run: RunName
    plan: Digest
    round: int = Field(ge=0, lt=_TOO_MUCH)
    attempt: int = Field(ge=1, lt=_TOO_MUCH)
    fold: Fold
    refused: dict[SiteName, Word]


class MetricsEntry(_Entry):
    """What was released of a fold, for the model with this SHA-256.

    Attributes:
        sites: those in the sums.
        cases: their number over all sites, if it is told.
        overall: the metrics of the sums; `per_site` of each site that tells its own.
    """

    kind: Literal["metrics"] = "metrics"
    run: RunName
    plan: Digest
    round: int = Field(ge=0, lt=_TOO_MUCH)
    fold: Literal["validation", "test"]
    model: Digest
    sites: tuple[SiteName, ...]
    cases: int | None = Field(None, ge=0, lt=_TOO_MUCH)
    overall: Metrics
    per_site: dict[SiteName, Metrics]
    refused: dict[SiteName, Word]
    spent: dict[SiteName, Envelope]


class EndEntry(_Entry):
    """A run reached its end; `model` is the SHA-256 of the released file, `round` the round that it is of."""

    kind: Literal["end"] = "end"
    run: RunName
    plan: Digest
    status: Literal["completed", "completed with losses"]
    round: int = Field(ge=0, lt=_TOO_MUCH)
    model: Digest


# --- a site's own log


class OwnerEntry(_Entry):
    """The first entry of a site's log."""

    kind: Literal["owner"] = "owner"
    federation: str = Field(min_length=1, max_length=64)
    site: SiteName


class PolicyEntry(_Entry):
    """The policy that holds from here on."""

    kind: Literal["policy"] = "policy"
    policy: Digest


class DecisionEntry(_Entry):
    """A steward's decision, as it was signed."""

    kind: Literal["decision"] = "decision"
    plan: Digest
    statement: Envelope


class ReleaseEntry(_Entry):
    """Something that left, written down before it did.

    Attributes:
        purpose: the type of the message that it answers, or `decision`, `cohort` (an answer to a question),
            `cosignature`, `enrolment`, `renewal`, or `report.` and what the agent does.
        run: the run that it is for, or null.
        bytes: of the message and of the tensors beside it.
        sha256: of the message as it travels; `tensors` of the file of the tensors beside it, or null.
        statements: the SHA-256 of each statement that the site signed in it (the header of a masked upload, what was
            spent, a decision, the line of a cosignature), sorted.
        code: of an answer that is a failure, its name.
        epsilon: what the run has spent with this release, at `delta`; null without differential privacy.
    """

    kind: Literal["release"] = "release"
    purpose: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z._]{0,39}$")]
    run: RunName | None = None
    round: int | None = Field(None, ge=0, lt=_TOO_MUCH)
    bytes: int = Field(ge=0, lt=_TOO_MUCH)
    sha256: Digest
    tensors: Digest | None = None
    statements: tuple[Digest, ...] = ()
    code: Word | None = None
    epsilon: float | None = Field(None, ge=0)
    delta: float | None = Field(None, gt=0, lt=1)


class RefusalEntry(_Entry):
    """Something that was asked and refused; `clause` is the policy's key."""

    kind: Literal["refusal"] = "refusal"
    run: RunName | None = None
    asked: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z._]{0,39}$")]
    code: Word
    clause: Annotated[str, StringConstraints(pattern=r"^[a-z_]{1,40}$")] | None = None


class LedgerEntry(_Entry):
    """The state of the privacy ledger: its number of rows and the hash of the last."""

    kind: Literal["ledger"] = "ledger"
    rows: int = Field(ge=0, lt=_TOO_MUCH)
    head: Digest


Entry = Annotated[
    FederationEntry
    | SiteEntry
    | ProposalEntry
    | ApprovalEntry
    | QuestionEntry
    | AnswerEntry
    | RunEntry
    | ReadinessEntry
    | RosterEntry
    | RoundEntry
    | VoidEntry
    | MetricsEntry
    | EndEntry
    | OwnerEntry
    | PolicyEntry
    | DecisionEntry
    | ReleaseEntry
    | RefusalEntry
    | LedgerEntry,
    Field(discriminator="kind"),
]
_ENTRY: TypeAdapter[Any] = TypeAdapter(Entry)


def moment(at: datetime) -> str:
    """A time as it stands in an entry."""
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def written(entry: Entry) -> bytes:
    """The bytes of an entry: a leaf. Raises EntryError for a number that JSON cannot hold, or half a character."""
    fields = entry.model_dump(mode="json")
    try:
        return _canonical(fields, fractions=isinstance(entry, _WITH_FRACTIONS))
    except (CanonicalizationError, UnicodeEncodeError) as error:
        raise EntryError("this entry cannot be written as canonical JSON") from error


# A log is read by the million entries, and Python's own writer takes a tenth of the time. It gives the bytes of RFC
# 8785 but for some fractions: 1.0 is written 1, and powers of ten begin at another number.

_WITH_FRACTIONS = (MetricsEntry, ReleaseEntry)
_compact = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, check_circular=False).encode


class _OtherSpelling(Exception):
    """A fraction that Python writes in another way."""


def _canonical(fields: dict[str, Any], *, fractions: bool) -> bytes:
    """Canonical JSON of names, which are ASCII, texts and numbers; raises CanonicalizationError, UnicodeEncodeError."""
    try:
        return _compact(_with_whole_numbers(fields) if fractions else fields).encode()
    except _OtherSpelling:
        return canonical_json(fields)


def _with_whole_numbers(value: Any) -> Any:
    """The same with 1 for 1.0; raises _OtherSpelling for fractions beyond 10^-4 and 10^15."""
    if isinstance(value, dict):
        return {name: _with_whole_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_whole_numbers(each) for each in value]
    if not isinstance(value, float):
        return value
    if value.is_integer() and abs(value) < _TOO_MUCH:
        return int(value)
    if not 1e-4 <= abs(value) < 1e15:
        raise _OtherSpelling
    return value


def read_entry(content: bytes) -> Entry:
    """The entry that a leaf is; raises EntryError if it is none, or is spelt in another way."""
    try:
        entry: Entry = _ENTRY.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EntryError(f"this is no entry of a log: {where}: {first['type']}") from error
    if written(entry) != content:
        raise EntryError("this entry is not in canonical JSON")
    return entry
