"""Tensors in a file, in safetensors form, without a copy in memory: written in chunks, read as views of a map.

Rules:
  * A file is byte for byte what `safetensors.numpy.save` makes of the same tensors, so its SHA-256 is theirs.
  * A file is read only if it is exactly what would have been written: the header is parsed, laid out anew and compared.
    Nothing in it can then point outside the file, overlap, or be read in two ways.
  * What was read is read-only. Its pages are the system's file cache and are given back with :func:`forget`.

A map shows the file as it is: whoever shortens a file that is mapped kills the process that reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from locum.common.blobs import Blob, write_all

Arrays = Mapping[str, NDArray[Any]]

#: The dtypes by their names in a file, in the reverse of the order in which safetensors lays them out.
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}
#: Bytes of a header; more than 30,000 tensors fit, and a hostile one costs little to parse.
MAX_HEADER = 4 << 20
_MAX_ELEMENTS = 1 << 48
_CHUNK_ELEMENTS = 1 << 17


class TensorFileError(ValueError):
    """A file that is not tensors in safetensors form, or tensors that have no such form."""


class _Entry(BaseModel):
    """One tensor in a header, as far as form can be checked alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dtype: Literal["U8", "I8", "I16", "F16", "I32", "U32", "F32", "F64", "I64", "U64"]
    shape: tuple[Annotated[int, Field(ge=0, lt=_MAX_ELEMENTS)], ...] = Field(max_length=32)
    data_offsets: tuple[int, int]


_HEADER = TypeAdapter(dict[Annotated[str, Field(max_length=512)], _Entry])


@dataclass(frozen=True)
class _Spec:
    """What a tensor is, without where it lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class _Map(mmap.mmap):
    """A map that this module made: read-only and shared, so its pages can be dropped at any time."""


class Mapped(Mapping[str, NDArray[Any]]):
    """The tensors of a file, as read-only views of it.

    Attributes:
        path: where the file was when it was mapped.
        size: bytes of the file.
    """

    def __init__(self, path: Path, size: int, tensors: Arrays, sha256: str | None) -> None:
        self.path, self.size = path, size
        self._tensors, self._sha256 = tensors, sha256

    @property
    def sha256(self) -> str:
        """The file's digest, as whoever checked it gave it; if nobody did it is read once more."""
        if self._sha256 is None:
            with self.path.open("rb") as file:
                self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._sha256

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Lazy:
    """A tensor that is made while it is written, piece by piece, once.

    Attributes:
        dtype: of its elements.
        shape: its shape.
        pieces: its elements in C order, in contiguous arrays; one may lie where the one before it lay.
    """

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], pieces: Iterable[NDArray[Any]]) -> None:
        self.dtype, self.shape, self.pieces = dtype, shape, pieces

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> NDArray[Any]:
        """All of it in memory."""
        content = b"".join(piece.tobytes() for piece in self.pieces)
        return np.frombuffer(content, self.dtype).reshape(self.shape)


Tensor = NDArray[Any] | Lazy
#: Tensors that go out.
Sendable = Mapping[str, Tensor]


def in_memory(tensors: Sendable) -> dict[str, NDArray[Any]]:
    """Tensors that are all there, contiguous."""
    return {
        name: tensor.whole() if isinstance(tensor, Lazy) else np.asarray(tensor, order="C")
        for name, tensor in tensors.items()
    }


def write_tensors(path: Path, tensors: Sendable, *, flush: bool = False, named: bool = True) -> Blob:
    """Writes `tensors` to `path` and hashes them on the way; memory is a chunk, whatever their size.

    `flush` waits for the disk. Not `named`, nothing is hashed and the digest is empty. Raises TensorFileError for names
    and dtypes without a form, and OSError; a file that could not be written whole is removed.
    """
    specs = _ordered(_spec(name, array) for name, array in tensors.items())
    header, digest = _header(specs), hashlib.sha256()
    try:
        with path.open("wb", buffering=0) as file:
            for part in chain([memoryview(header)], *(_chunks(tensors[spec.name]) for spec in specs)):
                if named:
                    digest.update(part)
                write_all(file.fileno(), part)
            if flush:
                os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return Blob(digest.hexdigest() if named else "", len(header) + sum(spec.size for spec in specs))


def map_tensors(path: Path, sha256: str | None = None) -> Mapped:
    """The tensors of a file, mapped; `sha256` is the name under which the file was checked, and is not checked here.

    Raises TensorFileError if the file is not exactly what :func:`write_tensors` writes, and OSError.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(file, size)
        specs = _parse(header)
        if _header(specs) != header:
            raise TensorFileError("its header is not written as this protocol writes it")
        if size != len(header) + sum(spec.size for spec in specs):
            raise TensorFileError(f"it has {size} bytes, which is not what its header says")
        content = _Map(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    return Mapped(path, size, _views(content, specs, len(header)), sha256)


def forget_part(array: NDArray[Any]) -> None:
    """Gives back the memory of a contiguous view of a mapped file until it is read again; other arrays are left."""
    content = _map_of(array)
    if content is None or not array.size:
        return
    start = _address(array) - _address(np.frombuffer(content, np.uint8))
    first = start - start % mmap.PAGESIZE
    content.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


# --- form


def _spec(name: str, array: Tensor) -> _Spec:
    dtype = _NAMES.get(array.dtype.name)
    if dtype is None:
        raise TensorFileError(f"tensor {name!r} has the type {array.dtype.name}, which no file carries")
    return _Spec(name, dtype, array.shape)


def _ordered(specs: Iterable[_Spec]) -> list[_Spec]:
    """As safetensors lays them out: the widest types first, then by name."""
    return sorted(specs, key=lambda spec: (-_RANK[spec.dtype], spec.name))


def _header(specs: Sequence[_Spec]) -> bytes:
    """The one header of these tensors: its length, JSON, and spaces up to a multiple of 8 bytes."""
    entries, end = {}, 0
    for spec in specs:
        begin, end = end, end + spec.size
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (begin, end)}
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        _HEADER.validate_json(text)
    except (UnicodeEncodeError, ValidationError) as error:
        raise TensorFileError("a tensor's name or shape has no form in a file") from error
    if "__metadata__" in entries or len(text) > MAX_HEADER - 8:
        raise TensorFileError("a tensor is called __metadata__, or there are too many tensors")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(file: BinaryIO, size: int) -> bytes:
    """The header, with its length in front."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, MAX_HEADER):
        raise TensorFileError("it does not begin with the length of a header")
    return start + file.read(length)


def _parse(header: bytes) -> list[_Spec]:
    """The tensors that a header names, in its order; where they lie is not believed."""
    try:
        entries = _HEADER.validate_json(header[8:])
    except ValidationError as error:
        raise TensorFileError("its header is not one of tensors") from error
    return [_Spec(name, entry.dtype, entry.shape) for name, entry in entries.items()]


def _views(content: _Map, specs: Iterable[_Spec], offset: int) -> Arrays:
    views: dict[str, NDArray[Any]] = {}
    for spec in specs:
        views[spec.name] = np.ndarray(spec.shape, DTYPES[spec.dtype], buffer=content, offset=offset)
        offset += spec.size
    return views


# --- memory


def _chunks(array: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in C order and little-endian, in pieces; a piece is copied only where it must be."""
    if isinstance(array, Lazy):
        yield from (piece.data.cast("B") for piece in array.pieces)
        return
    pieces = np.nditer(  # type: ignore[call-overload]  # NumPy's own types misspell "contig"
        array,
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=["readonly", "contig"],
        op_dtypes=array.dtype.newbyteorder("<"),
        casting="equiv",
        order="C",
        buffersize=_CHUNK_ELEMENTS,
    )
    for piece in pieces:
        yield memoryview(piece).cast("B")


def _map_of(array: NDArray[Any]) -> _Map | None:
    """The map of ours that an array is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, _Map) else None


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
