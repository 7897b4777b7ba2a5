"""What coordinator and site say to each other: a small typed header, and named tensors.

Rules:
  * A header is JSON validated against a frozen model; an unknown key is an error.
  * A tensor is raw little-endian bytes with a declared dtype and shape; the length must agree. Nothing is unpickled.
  * Every message names the digest of the plan it belongs to.

On the wire a message is a Flower `RecordDict` with the records `header` and `tensors`. Between an agent and its own
worker it is two frames, the header's JSON and the tensors in safetensors form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from locum.common.plan import Fold

Tensors = dict[str, NDArray[Any]]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

#: Flower message types, one a task.
DESCRIBE, TRAIN, EVALUATE = "query.describe", "train", "evaluate"

_RAW = "locum.raw"
_DTYPES = frozenset({"float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64"})
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
    cases: int | None


H = TypeVar("H", bound=Header)


def pack(header: Header, tensors: Mapping[str, NDArray[np.generic]] | None = None) -> RecordDict:
    """Puts a header and tensors into a Flower record."""
    arrays = {name: _array(value) for name, value in (tensors or {}).items()}
    config = ConfigRecord({"json": header.model_dump_json().encode()})
    return RecordDict({"header": config, "tensors": ArrayRecord(arrays)})


def unpack(record: RecordDict, kind: type[H]) -> tuple[H, Tensors]:
    """Reads a header of `kind` and its tensors; raises :class:`MessageError`."""
    if set(record) != {"header", "tensors"}:
        raise MessageError("a message has the records 'header' and 'tensors'")
    config, arrays = record["header"], record["tensors"]
    if not isinstance(config, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise MessageError("a record has the wrong kind")
    content = config.get("json")
    if not isinstance(content, bytes):
        raise MessageError("the header is not JSON bytes")
    return parse_header(content, kind), {name: _tensor(name, array) for name, array in arrays.items()}


def parse_header(content: bytes, kind: type[H]) -> H:
    """Validates a header's JSON; raises :class:`MessageError`."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise MessageError(f"not a {kind.__name__}: {error.error_count()} fields are wrong") from error


def _array(value: NDArray[np.generic]) -> Array:
    data = np.asarray(value, order="C")
    return Array(dtype=data.dtype.name, shape=data.shape, stype=_RAW, data=data.tobytes())


def _tensor(name: str, array: Array) -> NDArray[np.generic]:
    if len(name) > _MAX_NAME:
        raise MessageError("a tensor's name is too long")
    if array.stype != _RAW or array.dtype not in _DTYPES:
        raise MessageError(f"tensor {name!r} has the unknown form {array.stype}/{array.dtype}")
    dtype = np.dtype(array.dtype)
    if any(size < 0 for size in array.shape) or math.prod(array.shape) * dtype.itemsize != len(array.data):
        raise MessageError(f"tensor {name!r} has not the length that its shape says")
    return np.frombuffer(array.data, dtype=dtype).reshape(tuple(array.shape))
