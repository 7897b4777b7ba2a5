"""What coordinator and site say to each other: a small typed header, and named tensors.

Rules:
  * A header is JSON validated against a frozen model; an unknown key is an error.
  * A tensor is raw little-endian bytes with a declared dtype and shape; the length must agree. Nothing is unpickled.
  * Every message names the digest of the plan it belongs to.

A message is a Flower `RecordDict` with the one record `locum`: the header's JSON, and the tensors in safetensors form
or the name of the blob that holds them (see :class:`Carrier`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from locum.common.plan import Fold

Tensors = dict[str, NDArray[Any]]
Arrays = Mapping[str, NDArray[Any]]
Fields = Mapping[str, Any]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

#: Flower message types, one a task.
DESCRIBE, TRAIN, EVALUATE = "query.describe", "train", "evaluate"

#: Tensors of up to so many bytes travel inside a message also between hospitals.
BLOB_THRESHOLD = 128 << 10

_RECORD, _HEADER, _TENSORS = "locum", "json", "tensors"
#: The element types that a message carries, as NumPy names them.
DTYPES = frozenset({"float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64"})
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
    must be equal at every site. `missing_classes` are classes without a training case.
    """

    site: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")]
    configuration: dict[str, str]
    cases: dict[Fold, int] | None
    missing_classes: tuple[str, ...] = ()
    able: bool
    reason: str = Field("", max_length=200)


class TrainTask(Header):
    """The model of a round goes out; its tensors are the shared tensors of the network."""

    round: int = Field(ge=1)


class TrainResult(Header):
    """A site's update: tensors are local minus global weights; `weight` is its weight in the mean.

    `steps` is None where it would tell a number of cases that is not released.
    """

    round: int = Field(ge=1)
    weight: float = Field(ge=0)
    steps: int | None = Field(ge=0)
    loss: float | None
    seconds: float = Field(ge=0)


#: The folds that a model is measured on.
MeasuredFold = Literal["validation", "test"]


class EvaluateTask(Header):
    """Asks for the metrics of a model on one fold."""

    round: int = Field(ge=0)
    fold: MeasuredFold


class EvaluateResult(Header):
    """Metric sums: tensors by metric name, float64 vectors that add up over sites."""

    round: int = Field(ge=0)
    fold: MeasuredFold
    cases: int | None = Field(ge=0)


H = TypeVar("H", bound=Header)


class Carrier(Protocol):
    """How tensors travel: inside the message, or beside it as a blob."""

    def stow(self, tensors: Arrays) -> Fields:
        """The fields of a message that carry or name `tensors`."""

    def fetch(self, fields: Fields) -> Arrays:
        """The tensors of a message with these fields; raises MessageError."""


@dataclass(frozen=True)
class Inline:
    """Tensors travel inside the message, in safetensors form."""

    def stow(self, tensors: Arrays) -> Fields:
        """The bytes of `tensors`; nothing if there are none."""
        return {_TENSORS: save({name: np.asarray(array, order="C") for name, array in tensors.items()})}

    def fetch(self, fields: Fields) -> Arrays:
        """The tensors that the bytes hold; raises MessageError."""
        content = fields.get(_TENSORS, b"")
        if set(fields) - {_TENSORS} or not isinstance(content, bytes):
            raise MessageError("the tensors are not in the message")
        return tensors_from(content) if content else {}


INLINE = Inline()


def pack(header: Header, tensors: Arrays | None = None, carrier: Carrier = INLINE) -> RecordDict:
    """Puts a header and tensors into a Flower record."""
    fields = carrier.stow(tensors) if tensors else {}
    return RecordDict({_RECORD: ConfigRecord({_HEADER: header.model_dump_json().encode(), **fields})})


def unpack(record: RecordDict, kind: type[H], carrier: Carrier = INLINE) -> tuple[H, Arrays]:
    """Reads a header of `kind` and its tensors; raises :class:`MessageError`."""
    if set(record) != {_RECORD}:
        raise MessageError(f"a message has the one record '{_RECORD}'")
    config = record[_RECORD]
    content = config.get(_HEADER) if isinstance(config, ConfigRecord) else None
    if not isinstance(config, ConfigRecord) or not isinstance(content, bytes):
        raise MessageError("the header is not JSON bytes")
    header = parse_header(content, kind)
    return header, carrier.fetch({name: config[name] for name in config if name != _HEADER})


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
