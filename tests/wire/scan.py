"""Looks for numbers and words in all that lies in a folder: files, databases, what is compressed or base64 in them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
import struct
import unicodedata
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np

from locum.common.messages import Arrays

Patterns = Mapping[str, Collection[bytes]]
_ZLIB = re.compile(rb"\x78[\x01\x5e\x9c\xda]|\x1f\x8b\x08")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{24,}")
_STANDARD = bytes.maketrans(b"-_", b"+/")
_BETWEEN = b"\0\n"
#: Values in a row by which a tensor is known: so few that one is whole on a page of a database.
_ROW = 8
#: Digits by which a number in words is known.
_DIGITS = 10


# --- what to look for


def number(value: float) -> set[bytes]:
    """A number in the forms in which a program writes it: eight bytes of either order, a protobuf's, digits."""
    found = {struct.pack(order + "d", value) for order in "<>"}
    if isinstance(value, int):
        found |= {struct.pack(order + "q", value) for order in "<>"} | {_varint(value)}
    digits = str(value).lstrip("0.")
    assert len(digits.replace(".", "")) >= _DIGITS, "it could be there by chance"
    return found | {digits.encode()}


def _varint(value: int) -> bytes:
    found = []
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def run_of(value: float) -> set[bytes]:
    """The same value several times in a row, as float32 and float64 of either order."""
    return _rows(np.full(_ROW // 2, value, np.float32))


def rows_of(model: Arrays) -> set[bytes]:
    """Values in a row from several places of every tensor that has different ones."""
    found: set[bytes] = set()
    for tensor in model.values():
        flat = tensor.reshape(-1)
        for start in range(0, flat.size - _ROW, max(_ROW, flat.size // 2)):
            row = flat[start : start + _ROW]
            if len(np.unique(row)) == _ROW:
                found |= _rows(row)
    assert found, "the model has no place by which it is known"
    return found


def text(words: str) -> set[bytes]:
    """Words in the forms in which a program writes them, in three cases, and their SHA-256."""
    spellings = {form for case in (words, words.lower(), words.upper()) for form in _spelt(case)}
    hashed = {form for one in (words.encode(), words.lower().encode()) for form in _digests(one)}
    return spellings | hashed


def _spelt(words: str) -> set[bytes]:
    """One spelling: Unicode in two normal forms, Latin-1, escapes of JSON, HTML, Python and addresses, hex."""
    composed = {unicodedata.normalize(form, words) for form in ("NFC", "NFD")}
    encoded = {one.encode(kind) for one in composed for kind in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")}
    named = {words.encode("latin-1", "ignore"), words.encode("ascii", "xmlcharrefreplace")}
    escaped = {json.dumps(words)[1:-1].encode(), words.encode("ascii", "backslashreplace"), quote(words).encode()}
    hexed = {one.hex().encode() for one in encoded} | {one.hex().upper().encode() for one in encoded}
    return encoded | named | escaped | hexed


def _digests(content: bytes) -> set[bytes]:
    digest = hashlib.sha256(content)
    return {digest.digest(), digest.hexdigest().encode()}


def _rows(row: np.ndarray[tuple[int], np.dtype[np.float32]]) -> set[bytes]:
    return {row.astype(kind).tobytes() for kind in ("<f4", ">f4", "<f8", ">f8")}


# --- where to look


def found(folder: Path, patterns: Patterns, *, rightly: str = "") -> dict[str, set[str]]:
    """By name of a pattern that is found, the files; those whose path within the folder matches `rightly` are left out.

    What goes while it is read is not there.
    """
    told: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if rightly and re.search(rightly, name):
            continue
        try:
            there = found_in(path, patterns) if path.is_file() and not path.is_symlink() else set()
        except FileNotFoundError:
            continue
        for pattern in there:
            told.setdefault(pattern, set()).add(name)
    return told


def found_in(path: Path, patterns: Patterns) -> set[str]:
    """The names of the patterns that are found in one file."""
    contents = list(_contents(path))
    return {name for name, forms in patterns.items() if any(form in one for one in contents for form in forms)}


def _contents(path: Path) -> Iterator[bytes]:
    """A file's bytes, those of each cell if it is a database, and what they hold in another form."""
    raw = path.read_bytes()
    parts = [raw, _BETWEEN.join(_cells(path))] if raw.startswith(b"SQLite format 3") else [raw]
    for part in parts:
        yield part
        yield from _inflated(part)
        yield from _decoded(part)


def _cells(path: Path) -> Iterator[bytes]:
    """Every cell of every table of a database, with what is only in its log yet."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        database.text_factory = bytes
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in database.execute(f'SELECT * FROM "{table.decode()}"'):  # noqa: S608 - its own name
                yield from (cell if isinstance(cell, bytes) else str(cell).encode() for cell in row)


def _inflated(content: bytes) -> Iterator[bytes]:
    for place in _ZLIB.finditer(content):
        inflate = zlib.decompressobj(47)  # zlib's or gzip's header
        try:
            yield inflate.decompress(content[place.start() :])
        except zlib.error:
            continue


def _decoded(content: bytes) -> Iterator[bytes]:
    """What base64 in it says, whichever of its letters a group begins with."""
    texts = [place.group().translate(_STANDARD) for place in _BASE64.finditer(content)]
    for start in range(4):
        yield _BETWEEN.join(base64.b64decode(text[start:] + b"A" * (-(len(text) - start) % 4)) for text in texts)
