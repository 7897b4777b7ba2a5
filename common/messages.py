"""What coordinator and site say to each other: a small typed header, and named tensors.

Rules:
  * A header is JSON validated against a frozen model; an unknown key is an error.
  * A tensor is raw little-endian bytes with a declared dtype and shape; the length must agree. Nothing is unpickled.
  * Every message names the digest of the plan it belongs to.

A message is a Flower `RecordDict` with the one record `locum`: the header's JSON, and the tensors in safetensors form
or the name of the blob that holds them (see :class:`Carrier`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from locum.common.canonical import sha256_hex
from locum.common.identity import SiteName
from locum.common.plan import Fold
from locum.common.secagg.model import seal_bytes
from locum.common.tensor_files import Mapped, Sendable, in_memory

Tensors = dict[str, NDArray[Any]]
Arrays = Mapping[str, NDArray[Any]]
Fields = Mapping[str, Any]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: Signed statements, certificates and sealed keys, as text.
Envelope = Annotated[str, StringConstraints(max_length=64 << 10)]
Certificate = Annotated[str, StringConstraints(max_length=16 << 10)]
Text = Annotated[str, StringConstraints(max_length=4 << 10)]
RunName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,80}$")]

#: Flower message types, one a task.
DESCRIBE, TRAIN, EVALUATE = "query.describe", "train", "evaluate"
#: The three of a set-up of secure aggregation, and the second exchange of each of its sums.
KEYS, PAIRS, BEGIN, UNMASK = "query.keys", "query.pairs", "query.begin", "query.unmask"

#: The name of a run within one process.
LOCAL = "local"

#: Tensors of up to so many bytes travel inside a message also between hospitals.
BLOB_THRESHOLD = 128 << 10

_RECORD, _HEADER, _TENSORS = "locum", "json", "tensors"
#: The element types that a message carries, as NumPy names them.
DTYPES = frozenset({"float16", "float32", "float64", "uint8", "int8", "int16", "int32", "uint32", "int64", "uint64"})
_MAX_NAME = 512


class MessageError(ValueError):
    """A message that is not in this protocol's form."""


class Header(BaseModel):
    """What every header has: the plan it belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    plan_digest: Digest


class DescribeTask(Header):
    """Asks a site for its resolved configuration and whether it can take part."""


class Description(Header):
    """A site's answer: what it would run, and how many cases it has of each fold (if the plan releases counts).

    `configuration` maps a topic (`tensors`, `transforms`, `classes`, `metrics`, `versions`) to words or a digest that
    must be equal at every site. `missing_classes` are classes without a training case. `policy` is the digest of the
    site's policy, which stands in the log. `readiness` is the signed statement of whether its data meet the contract
    (:class:`locum.common.envelope.Readiness`): one that fails makes the site unable.
    """

    site: SiteName
    configuration: dict[str, str]
    cases: dict[Fold, int] | None
    missing_classes: tuple[str, ...] = ()
    able: bool
    reason: str = Field("", max_length=200)
    policy: Digest | None = None
    readiness: Envelope | None = None


class Secured(BaseModel):
    """What makes a task one of a secure sum (see :mod:`locum.common.secagg`).

    Attributes:
        context: the signed context of the sum.
        keys: by site, the content key of the model, sealed to it (base64url).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    context: Envelope
    keys: dict[SiteName, Text]


class TrainTask(Header):
    """The model of a round goes out; its tensors are the shared tensors of the network.

    `start` is the round that the model is of, if that is not the one before: after a roll-back.
    """

    round: int = Field(ge=1)
    start: int | None = Field(None, ge=0)
    secured: Secured | None = None


class TrainResult(Header):
    """A site's update: tensors are local minus global weights; `weight` is its weight in the mean.

    `steps` is None where it would tell a number of cases that is not released, `seconds` where it would tell how many
    patients were drawn. `spent` is the signed statement of what the run has spent of its patients' privacy
    (:class:`locum.common.envelope.Spent`).
    """

    round: int = Field(ge=1)
    weight: float = Field(ge=0)
    steps: int | None = Field(ge=0)
    loss: float | None
    seconds: float | None = Field(ge=0)
    spent: Envelope | None = None


#: The folds that a model is measured on.
MeasuredFold = Literal["validation", "test"]


class EvaluateTask(Header):
    """Asks for the metrics of a model on one fold."""

    round: int = Field(ge=0)
    fold: MeasuredFold
    secured: Secured | None = None


class EvaluateResult(Header):
    """Metric sums: tensors by metric name, float64 vectors that add up over sites."""

    round: int = Field(ge=0)
    fold: MeasuredFold
    cases: int | None = Field(ge=0)
    spent: Envelope | None = None


class MaskedResult(Header):
    """What a site gives to a secure sum: tensors are those of :mod:`locum.common.secagg.upload`.

    The plan may release what else it says of itself: a loss, a number of cases; and its own metric sums, as tensors.

    Attributes:
        upload: the signed header.
        loss: the site's own training loss.
        cases: the number of cases that it trained on or measured.
        spent: as in :class:`TrainResult`.
    """

    upload: Envelope
    loss: float | None = None
    cases: int | None = Field(None, ge=0)
    spent: Envelope | None = None


class KeysTask(Header):
    """Asks for a site's keys of a set-up."""

    run: RunName


class KeysResult(Header):
    """The signed statement of a site's public keys, and its certificate (PEM)."""

    keys: Envelope
    certificate: Certificate


class PairsTask(Header):
    """The roster, and by site the run keys and certificates that it means."""

    run: RunName
    roster: Envelope
    keys: dict[SiteName, Envelope]
    certificates: dict[SiteName, Certificate]


class PairsResult(Header):
    """By peer, the signed half of a secret that is sealed to it."""

    pairs: dict[SiteName, Envelope]


class BeginTask(Header):
    """By peer, the half of a secret that it has sealed to this site."""

    run: RunName
    pairs: dict[SiteName, Envelope]


class BeginResult(Header):
    """The digest of the roster under which the site is ready for sums."""

    roster: Digest


class UnmaskTask(Header):
    """Asks survivors for what unmasks the sum.

    Attributes:
        context: the signed context of the sum.
        uploads: by survivor, the signed header of its upload.
        receivers: the sites whose boxes are in the tensor `boxes`, a row for each survivor, in their order; of several
            receivers one after the other. None named: of the site that is asked alone.
    """

    context: Envelope
    uploads: dict[SiteName, Envelope]
    receivers: tuple[SiteName, ...] = ()


class UnmaskResult(Header):
    """The tensor `sealed` holds the site's shares, sealed to the aggregator."""


H = TypeVar("H", bound=Header)


class Carrier(Protocol):
    """How tensors travel: inside the message, or beside it as a blob."""

    def stow(self, tensors: Sendable) -> Fields:
        """The fields of a message that carry or name `tensors`."""

    def fetch(self, fields: Fields) -> Arrays:
        """The tensors of a message with these fields; raises MessageError."""


class Sealer(Carrier, Protocol):
    """A carrier by which models also go out sealed."""

    def seal(self, model: Mapped, key: bytes) -> Fields:
        """The fields of a message that carry or name the encrypted file of a model."""


class Opener(Carrier, Protocol):
    """A carrier by which models also come in sealed."""

    def open(self, fields: Fields, key: bytes, digest: str) -> Arrays:
        """The tensors of a sealed model whose file has a SHA-256; raises MessageError if it has another."""


@dataclass(frozen=True)
class Inline:
    """Tensors travel inside the message, in safetensors form."""

    def stow(self, tensors: Sendable) -> Fields:
        """The bytes of `tensors`; nothing if there are none."""
        return {_TENSORS: save(in_memory(tensors))}

    def fetch(self, fields: Fields) -> Arrays:
        """The tensors that the bytes hold; raises MessageError."""
        content = fields.get(_TENSORS, b"")
        if set(fields) - {_TENSORS} or not isinstance(content, bytes):
            raise MessageError("the tensors are not in the message")
        return tensors_from(content) if content else {}

    def seal(self, model: Mapped, key: bytes) -> Fields:
        """The encrypted bytes of the model's file."""
        return {_TENSORS: seal_bytes(model.path.read_bytes(), key)}

    def open(self, fields: Fields, key: bytes, digest: str) -> Arrays:
        """The tensors whose file's bytes are these, encrypted; raises MessageError."""
        sealed = fields.get(_TENSORS)
        if set(fields) != {_TENSORS} or not isinstance(sealed, bytes):
            raise MessageError("the sealed model is not in the message")
        content = seal_bytes(sealed, key)
        if sha256_hex(content) != digest:
            raise MessageError(NOT_SIGNED)
        return tensors_from(content)


#: Why a sealed model is not used.
NOT_SIGNED = "the model is not the one that the coordinator has signed"
INLINE = Inline()


def pack(
    header: Header | Callable[[str], Header], tensors: Sendable | None = None, carrier: Carrier = INLINE
) -> RecordDict:
    """Puts a header and tensors into a Flower record; the header may be made of the SHA-256 of the tensors' file."""
    fields = carrier.stow(tensors) if tensors else {}
    return assemble(header(digest_of(fields)) if callable(header) else header, fields)


def assemble(header: Header, fields: Fields) -> RecordDict:
    """A Flower record of a header and the fields that carry or name tensors."""
    return RecordDict({_RECORD: ConfigRecord({_HEADER: header.model_dump_json().encode(), **fields})})


def digest_of(fields: Fields) -> str:
    """The SHA-256 of the file of the tensors that fields carry or name; of nothing where there are none."""
    return str(fields["sha256"]) if "sha256" in fields else sha256_hex(fields.get(_TENSORS, b""))


def body_of(record: RecordDict) -> str:
    """The SHA-256 of the file of a message's tensors; of one that :func:`unpack` has read."""
    return digest_of(record.config_records[_RECORD])


def unpack(record: RecordDict, kind: type[H], carrier: Carrier = INLINE) -> tuple[H, Arrays]:
    """Reads a header of `kind` and its tensors; raises :class:`MessageError`."""
    header, fields = take_apart(record, kind)
    return header, carrier.fetch(fields)


def take_apart(record: RecordDict, kind: type[H]) -> tuple[H, Fields]:
    """Reads a header of `kind`, and leaves the fields that carry or name tensors; raises :class:`MessageError`."""
    if set(record) != {_RECORD}:
        raise MessageError(f"a message has the one record '{_RECORD}'")
    config = record[_RECORD]
    content = config.get(_HEADER) if isinstance(config, ConfigRecord) else None
    if not isinstance(config, ConfigRecord) or not isinstance(content, bytes):
        raise MessageError("the header is not JSON bytes")
    return parse_header(content, kind), {name: config[name] for name in config if name != _HEADER}


def parse_header(content: bytes, kind: type[H]) -> H:
    """Validates a header's JSON; raises :class:`MessageError`."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise MessageError(f"not a {kind.__name__}: {error.error_count()} fields are wrong") from error


def tensors_from(content: bytes) -> Tensors:
    """Tensors in safetensors form, with names and types of this protocol; raises :class:`MessageError`."""
    try:
        tensors: Tensors = load(content)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise MessageError("the tensors are not in safetensors form") from error
    for name, array in tensors.items():
        if len(name) > _MAX_NAME:
            raise MessageError("a tensor's name is too long")
        if array.dtype.name not in DTYPES:
            raise MessageError(f"tensor {name!r} has the type {array.dtype.name}, which no message carries")
    return tensors
