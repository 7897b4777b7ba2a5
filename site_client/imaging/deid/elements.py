"""The elements of a data set as bytes: read from what pydicom holds, and from and to the encoding of PS3.5 chapter 7.

Rules:
  * A value stays the bytes that it was; sequences alone are taken apart, at every depth, private ones too.
  * Whatever the bytes are, reading ends in elements or in :class:`DamagedError`; nothing is guessed.
  * What is written has defined lengths, even lengths, and its elements in order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_deferred_data_element
from pydicom.filewriter import write_data_element

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

#: Explicit VRs with a length of four bytes (PS3.5 7.1.2).
LONG = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"})
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
_DEEPEST = 48


class DamagedError(ValueError):
    """Bytes that are no elements."""


class Element(NamedTuple):
    """One element.

    Attributes:
        tag: group · 2¹⁶ + element.
        vr: as it is in the file; empty where the file does not say.
        value: bytes, or the items of a sequence, or what pydicom holds of pixels that stay where they are.
    """

    tag: int
    vr: str
    value: bytes | list[Level] | RawDataElement


Level: TypeAlias = list[Element]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How elements are written: with or without VR, and in which order of bytes."""

    implicit: bool
    little: bool

    @property
    def order(self) -> str:
        """What `struct` calls the order of bytes."""
        return "<" if self.little else ">"


IMPLICIT_LITTLE = Encoding(implicit=True, little=True)
EXPLICIT_LITTLE = Encoding(implicit=False, little=True)


@lru_cache(maxsize=8192)
def standard_vr(tag: int) -> str:
    """The VR of the data dictionary (PS3.6), 'US or SS' for one; empty for an unknown or a private tag."""
    entry = DicomDictionary.get(tag)
    return entry[0] if entry else ""


# --- from pydicom


def elements_of(dataset: Dataset, encoding: Encoding, texts: list[str], keep: Callable[[int], bool]) -> Level:
    """The elements of a data set; those for which `keep(tag)` holds stay as pydicom has them.

    Args:
        dataset: as it was read, or made in memory.
        encoding: of what is no raw element any more.
        texts: the encodings of its text, by their names in Python.
        keep: which elements stay.

    Raises:
        DamagedError: a sequence of the standard is none.
    """
    return list(_elements_of(dataset, _Given(encoding, texts, keep), 0))


class _Given(NamedTuple):
    encoding: Encoding
    texts: list[str]
    keep: Callable[[int], bool]


def _elements_of(dataset: Dataset, given: _Given, depth: int) -> Iterator[Element]:
    if depth > _DEEPEST:
        raise DamagedError("sequences are nested too deeply")
    for element in dataset.values():
        tag = int(element.tag)
        if isinstance(element, RawDataElement):
            if given.keep(tag):
                yield Element(tag, element.VR or "", element)
            else:
                within = Encoding(element.is_implicit_VR, element.is_little_endian)
                yield _opened(tag, element.VR or "", value_of(dataset, element), within, depth)
        elif element.VR == "SQ":
            items = element.value or ()
            yield Element(tag, "SQ", [list(_elements_of(item, given, depth + 1)) for item in items])
        elif given.keep(tag):
            yield Element(tag, element.VR, _raw(element, given))
        else:
            yield Element(tag, element.VR, _raw(element, given).value or b"")


def value_of(dataset: Dataset, element: RawDataElement) -> bytes:
    """A raw value; one that stayed in its file is read, and the data set still does not hold it.

    Raises:
        OSError: the file is gone, or is another.
    """
    if element.value is not None or element.length == 0:
        return element.value or b""
    source = getattr(dataset, "filename", None) or getattr(dataset, "buffer", None)
    kind, time = getattr(dataset, "fileobj_type", None), getattr(dataset, "timestamp", None)
    return read_deferred_data_element(kind, source, time, element).value or b""


def _raw(element: DataElement, given: _Given) -> RawDataElement:
    """An element that pydicom has converted, in bytes again."""
    encoding = given.encoding
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = encoding.little, True
    write_data_element(buffer, element, given.texts)
    whole = buffer.getvalue()
    length = struct.unpack_from(encoding.order + "I", whole, 4)[0]
    value = whole[8:-8] if length == UNDEFINED else whole[8:]
    return RawDataElement(element.tag, element.VR, length, value, 0, encoding.implicit, encoding.little)


def _opened(tag: int, vr: str, value: bytes, encoding: Encoding, depth: int) -> Element:
    """An element with its sequence taken apart, if it is one."""
    if vr == "SQ" or (vr in {"", "UN"} and standard_vr(tag) == "SQ"):
        # Of unknown VR (PS3.5 6.2.2, note 2): what is within is implicit, little-endian.
        within = IMPLICIT_LITTLE if vr == "UN" else encoding
        try:
            return Element(tag, "SQ", parse_items(value, within, depth + 1))
        except DamagedError:
            if tag >> 16 & 1:
                return Element(tag, "UN", value)  # a private one goes whole
            raise
    return Element(tag, vr, value)


# --- from bytes


def parse_items(buffer: bytes, encoding: Encoding, depth: int = 0) -> list[Level]:
    """The items of a sequence of which the value is `buffer`.

    Raises:
        DamagedError: it is no sequence.
    """
    reader = _Reader(buffer, encoding)
    try:
        return reader.items(len(buffer), depth)
    except (struct.error, UnicodeDecodeError):
        raise DamagedError("a sequence is cut off") from None


class _Reader:
    """Reads elements from a buffer, from a place that moves."""

    def __init__(self, buffer: bytes, encoding: Encoding) -> None:
        self._buffer = buffer
        self._encoding = encoding
        self._head = struct.Struct(encoding.order + "HH")
        self._short = struct.Struct(encoding.order + "H")
        self._long = struct.Struct(encoding.order + "I")
        self._at = 0

    def items(self, end: int, depth: int) -> list[Level]:
        """The items up to `end`, or to the delimiter of the sequence."""
        if depth > _DEEPEST:
            raise DamagedError("sequences are nested too deeply")
        found: list[Level] = []
        while self._at < end:
            tag, length = self._tag(), self._length()
            if tag == _SEQUENCE_END:
                break
            if tag != _ITEM:
                raise DamagedError("a sequence holds something else than items")
            limit = end if length == UNDEFINED else self._at + length
            if limit > end:
                raise DamagedError("an item is longer than its sequence")
            found.append(list(self._elements(limit, depth)))
        return found

    def _elements(self, end: int, depth: int) -> Iterator[Element]:
        while self._at < end:
            tag = self._tag()
            if tag == _ITEM_END:
                self._length()
                return
            yield self._element(tag, end, depth)

    def _element(self, tag: int, end: int, depth: int) -> Element:
        vr = "" if self._encoding.implicit else self._vr()
        length = self._length() if self._encoding.implicit or vr in LONG else self._short_length()
        if length == UNDEFINED:
            return self._undefined(tag, vr, end, depth)
        if self._at + length > end:
            raise DamagedError("an element is longer than what holds it")
        value = self._buffer[self._at : self._at + length]
        self._at += length
        return _opened(tag, vr, value, self._encoding, depth)

    def _undefined(self, tag: int, vr: str, end: int, depth: int) -> Element:
        if vr in {"OB", "OW"}:
            raise DamagedError("pixels in fragments within a sequence")
        if vr == "UN":
            inner = _Reader(self._buffer, IMPLICIT_LITTLE)
            inner._at = self._at  # its own class
            items = inner.items(end, depth + 1)
            self._at = inner._at
            return Element(tag, "SQ", items)
        return Element(tag, "SQ", self.items(end, depth + 1))

    def _tag(self) -> int:
        group, element = self._head.unpack_from(self._buffer, self._at)
        self._at += 4
        return int(group << 16 | element)

    def _vr(self) -> str:
        vr = self._buffer[self._at : self._at + 2].decode("ascii")
        if not (vr.isalpha() and vr.isupper()):
            raise DamagedError("an element without a VR")
        self._at += 2
        if vr in LONG:
            self._at += 2
        return vr

    def _length(self) -> int:
        (length,) = self._long.unpack_from(self._buffer, self._at)
        self._at += 4
        return int(length)

    def _short_length(self) -> int:
        (length,) = self._short.unpack_from(self._buffer, self._at)
        self._at += 2
        return int(length)


# --- to bytes

_EXPLICIT_SHORT = {True: struct.Struct("<HH2sH"), False: struct.Struct(">HH2sH")}
_EXPLICIT_LONG = {True: struct.Struct("<HH2sHI"), False: struct.Struct(">HH2sHI")}
_IMPLICIT = {True: struct.Struct("<HHI"), False: struct.Struct(">HHI")}
_NUL_PADDED = frozenset({"UI", "OB", "UN", ""})


def head(tag: int, vr: str, length: int, encoding: Encoding) -> bytes:
    """Tag, VR and length of an element (PS3.5 7.1).

    Raises:
        DamagedError: the value is too long for its VR.
    """
    group, element, little = tag >> 16, tag & 0xFFFF, encoding.little
    if encoding.implicit:
        return _IMPLICIT[little].pack(group, element, length)
    if vr in LONG:
        return _EXPLICIT_LONG[little].pack(group, element, vr.encode(), 0, length)
    if length > 0xFFFF:
        raise DamagedError("a value is too long for its VR")
    return _EXPLICIT_SHORT[little].pack(group, element, vr.encode(), length)


def padded(value: bytes, vr: str) -> bytes:
    """A value of even length."""
    if len(value) % 2 == 0:
        return value
    return value + (b"\0" if vr in _NUL_PADDED else b" ")


def written(level: Iterable[Element], encoding: Encoding) -> bytes:
    """Elements in bytes; all of them hold bytes or items."""
    parts: list[bytes] = []
    for tag, vr, value in level:
        content = padded(value, vr) if isinstance(value, bytes) else written_items(value, encoding)
        parts.append(head(tag, vr, len(content), encoding))
        parts.append(content)
    return b"".join(parts)


def written_items(items: list[Level] | RawDataElement, encoding: Encoding) -> bytes:
    """The value of a sequence in bytes."""
    if isinstance(items, RawDataElement):
        raise DamagedError("pixels within a sequence")
    parts: list[bytes] = []
    for item in items:
        content = written(item, encoding)
        parts.append(_IMPLICIT[encoding.little].pack(0xFFFE, 0xE000, len(content)))
        parts.append(content)
    return b"".join(parts)
