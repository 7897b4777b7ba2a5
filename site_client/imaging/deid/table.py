"""The tables of de-identification, read from `configs/deid/`: what the standard says, and what else may stay.

Rules:
  * The tables are data. Each carries its edition in its first line and where its rows come from below it.
  * They are read strictly: an unknown code, a tag that is none or a row that is there twice is an error.
  * Their digest stands in every file that is cleaned with them.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import TypeVar

from locum.common.errors import DataError

#: The codes of Table E.1-1 (PS3.15 E.1): one, or a choice that depends on the type of the attribute.
CODES = frozenset({"D", "Z", "X", "K", "C", "U", "Z/D", "X/Z", "X/D", "X/Z/D", "X/Z/U*"})
#: The columns of options that this table carries, by the names that a site file gives them.
COLUMNS = (
    "retain_uids",
    "device_identity",
    "institution_identity",
    "patient_characteristics",
    "modified_dates",
    "clean_descriptors",
    "clean_structured_content",
    "clean_graphics",
    "safe_private",
)
TREATMENTS = frozenset({"copy", "words", "code", "meaning", "structured", "binary"})
PRIVATE = "private"
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Row:
    """What Table E.1-1 says of one attribute.

    Attributes:
        tag: eight hexadecimal digits, `50xxxxxx` for a repeating group, or `private`.
        basic: the code of the Basic Profile.
        options: option to code, for those that say something else.
    """

    tag: str
    name: str
    basic: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class Tables:
    """All that the engine is told by data.

    Attributes:
        edition: of the standard.
        rows: Table E.1-1 by tag.
        public: attributes without a row that may stay, by tag, and how.
        private: (group, creator, low byte of the element) to the VR of a private attribute that may stay.
        digest: SHA-256 of all tables.
    """

    edition: str
    rows: Mapping[str, Row]
    public: Mapping[int, str]
    private: Mapping[tuple[int, str, int], str]
    digest: str


@lru_cache(maxsize=1)
def load_tables() -> Tables:
    """The tables that are installed.

    Raises:
        DataError: one of them is damaged.
    """
    texts = [_text(name) for name in ("table_e_1_1.csv", "safe_public.csv", "safe_private.csv", "words.txt")]
    standard, public, private, _ = texts
    return Tables(
        edition=_edition(standard),
        rows=_once(standard, _row),
        public=_once(public, lambda cells: (_tag(cells["tag"]), _one_of(cells["treatment"], TREATMENTS))),
        private=_once(private, _private),
        digest=hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    )


def _text(name: str) -> str:
    return files("locum.configs").joinpath("deid", name).read_text(encoding="utf-8")


def _edition(text: str) -> str:
    first = text.partition("\n")[0]
    if not first.startswith("# edition: "):
        raise _damaged("the first line must state the edition")
    return first.removeprefix("# edition: ").strip()


def _once(text: str, read: Callable[[dict[str, str]], tuple[K, V]]) -> dict[K, V]:
    found: dict[K, V] = {}
    for cells in _cells(text):
        key, value = read(cells)
        if key in found:
            raise _damaged(f"{key} is there twice")
        found[key] = value
    return found


def _cells(text: str) -> Iterator[dict[str, str]]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    for cells in csv.DictReader(lines, strict=True):
        if None in cells or None in cells.values():
            raise _damaged(f"a line has more or fewer cells than columns: {next(iter(cells.values()))}")
        yield cells


def _row(cells: dict[str, str]) -> tuple[str, Row]:
    tag = cells["tag"]
    if tag != PRIVATE and not tag.startswith(("50xx", "60xx")):
        _tag(tag)
    options = {name: _one_of(cells[name], CODES) for name in COLUMNS if cells[name]}
    return tag, Row(tag, cells["name"], _one_of(cells["basic"], CODES), options)


def _private(cells: dict[str, str]) -> tuple[tuple[int, str, int], str]:
    return (int(cells["group"], 16), cells["creator"], int(cells["element"], 16)), cells["vr"]


def _tag(text: str) -> int:
    if len(text) != 8:
        raise _damaged(f"{text} is no tag")
    try:
        return int(text, 16)
    except ValueError:
        raise _damaged(f"{text} is no tag") from None


def _one_of(text: str, known: frozenset[str]) -> str:
    if text not in known:
        raise _damaged(f"{text} is none of {', '.join(sorted(known))}")
    return text


def _damaged(what: str) -> DataError:
    return DataError(f"the tables of de-identification are damaged: {what}", "install Locum again")
