"""The search for what is left: identifiers of the input, looked for in what the output has copied from it.

Rules:
  * Identifiers are: every value of VR PN, DA and DT anywhere, private and nested too; and the values of those rows of
    Table E.1-1 that hold identifiers, addresses, telephone numbers and institutions, unless an option keeps them.
  * Searched is all that was copied: what the engine itself wrote (keyed names, shifted dates, meanings from the
    dictionary) holds nothing of the input, and random digits would look like identifiers.
  * A name counts by each part of three letters and more, as a word of its own; from six on inside other words too.
    Non-ASCII parts count from two characters, in every encoding of DICOM.
  * An identifier counts from four characters with a letter, from five digits in text, from six digits in numbers.
    Shorter ones cannot be told from numbers. Its digits alone count from six, without leading zeros.
  * A date counts in all its spellings.
  * In binary values a word counts from four letters, in long ones from six: chance would find shorter ones. A short one
    of which three quarters can be printed is searched as text.
  * Makers of scanners and code strings of the standard (`configs/deid/words.txt`) are no names: a patient called
    Siemens does not put all of that scanner's images into quarantine. So that name alone is not found there.
  * A text that may stay but holds an identifier is withheld while cleaning. Whatever is found after that refuses the
    file; where is told, what is not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from locum.site_client.imaging.deid.words import common

_LETTERS = re.compile(r"[a-z]+")
_ALNUM = re.compile(r"[a-z0-9]+")
_UID = re.compile(r"\d+(?:\.\d+){5,}")
_PARTS = re.compile(r"[\^=\s,.\-_/\\;:()\[\]'\"]+")
_DAY = re.compile(r"(?<!\d)(\d{4})([-./ ]?)(\d{2})\2(\d{2})(?!\d)|(?<!\d)(\d{1,2})([-./ ])(\d{1,2})\6(\d{4})(?!\d)")
_REVERSED = re.compile(r"(?<!\d)(\d{2})(\d{2})(\d{4})(?!\d)")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAMED_MONTH = re.compile(rf"(\d{{1,2}})[ .\-]*({'|'.join(_MONTHS)})[a-z]*[ .,\-]*(\d{{4}})")
_MONTH_FIRST = re.compile(rf"({'|'.join(_MONTHS)})[a-z]*[ .\-]*(\d{{1,2}})[ .,\-]+(\d{{4}})")
_VALUE_DAY = re.compile(r"(\d{4})[.\-]?(\d{2})[.\-]?(\d{2})")
_ESCAPE = re.compile(rb"\x1b[$()\-,./]*[A-Za-z0-9]")
_ENCODINGS = (
    "utf-8", "gb18030", "iso2022_jp", "shift_jis", "euc_jp", "euc_kr", "latin-1", "iso8859_2", "iso8859_5", "iso8859_6",
    "iso8859_7", "iso8859_8", "iso8859_9", "tis_620", "utf-16-le", "utf-16-be",
)  # fmt: skip
_LONG_BINARY = 64
_PRINTABLE = bytes(range(32, 127)) + b"\0"
_LONG_NAME, _LONG_ID, _LONG_NUMBER = 6, 8, 6
#: Müller is Mueller where a keyboard has no ü.
_SPELT = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "ø": "oe", "å": "aa", "æ": "ae"})

Kind = Literal["text", "number", "binary"]


class Copied(NamedTuple):
    """A value that the output has from the input."""

    tag: int
    value: bytes
    kind: Kind


@dataclass
class Identifiers:
    """The identifiers of one input, gathered while it is read.

    Attributes:
        names: parts of names in small letters: ASCII, three letters and more.
        foreign: parts of names that are not ASCII, of two characters and more.
        ids: identifiers in small letters, and parts of addresses.
        days: (year, month, day).
        uids: all that are not of the standard.
    """

    names: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    days: set[tuple[int, int, int]] = field(default_factory=set)
    uids: set[str] = field(default_factory=set)

    def add_name(self, text: str) -> None:
        """A name of VR PN, whatever its form."""
        plain, foreign = _name_parts(text)
        self.names |= plain
        self.foreign |= foreign

    def add_id(self, text: str) -> None:
        """An identifier, an address or a telephone number."""
        for value in text.lower().split("\\"):
            self._add_id(value.strip(" \0"))

    def _add_id(self, value: str) -> None:
        if not value.isascii():
            self.foreign |= _name_parts(value)[1]
            return
        if _is_telling(value):
            self.ids.add(value)
            bare = "".join(_ALNUM.findall(value))
            if _is_telling(bare):
                self.ids.add(bare)
            # As a number it has neither letters nor leading zeros.
            digits = "".join(filter(str.isdigit, value)).lstrip("0")
            if len(digits) >= _LONG_NUMBER and _is_telling(digits):
                self.ids.add(digits)

    def add_days(self, text: str) -> None:
        """A value of VR DA or DT."""
        for value in text.split("\\"):
            found = _VALUE_DAY.match(value.strip())
            if found:
                self.days.add((int(found[1]), int(found[2]), int(found[3])))


@lru_cache(maxsize=4096)
def _name_parts(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """The parts of a name that tell: ASCII words, and others."""
    plain: set[str] = set()
    foreign: set[str] = set()
    for one in text.split("\\"):
        parts = [part for part in _PARTS.split(one.lower()) if part]
        foreign |= {part for part in parts if not part.isascii() and len(part) > 1}
        ascii_parts = [_without_marks(part) for part in parts]
        words = [word for part in ascii_parts for word in _LETTERS.findall(part)]
        spelt = [word for part in parts for word in _LETTERS.findall(_without_marks(part.translate(_SPELT)))]
        plain |= {word for word in words + spelt if len(word) > 2 and len(set(word)) > 1}
        if len(words) > 1:
            plain |= {words[0] + words[1], words[1] + words[0]} if len(words[0] + words[1]) >= _LONG_NAME else set()
    return frozenset(plain), frozenset(foreign)


def _without_marks(text: str) -> str:
    """Müller as muller; what has no ASCII letter goes."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _is_telling(value: str) -> bool:
    """Whether a value is long enough to tell it from a number or a word."""
    if len(value) < 4 or len(set(value)) < 2:
        return False
    digits = sum(character.isdigit() for character in value)
    if digits == len(value):
        return len(value) > 4
    return digits > 0 or bool(set(_LETTERS.findall(value)) - common())


def residue(values: Sequence[Copied], search: Search) -> int | None:
    """The tag of the first copied value that holds an identifier; None if none does."""
    whole = b"\n".join(value.value for value in values if value.kind == "text")
    numbers = b"\n".join(value.value for value in values if value.kind == "number")
    if not search.in_text(whole) and not search.in_numbers(numbers):
        values = [value for value in values if value.kind == "binary"]
    return next((value.tag for value in values if search.holds(value)), None)


class Search:
    """Looks for the identifiers of one input."""

    def __init__(self, known: Identifiers) -> None:
        self._known = known
        self._words = known.names - common()
        letters = {value for value in known.ids if value.isalpha()} - common()
        self._tokens = {value for value in known.ids if value.isalnum()} | letters
        self._inside = sorted(word for word in self._words if len(word) >= _LONG_NAME)
        self._inside += sorted(value for value in known.ids if not value.isalnum() or len(value) >= _LONG_ID)
        self._encoded = _encoded(frozenset(known.foreign))

    def holds(self, copied: Copied) -> bool:
        """Whether one value holds an identifier."""
        if copied.kind == "text":
            return self.in_text(copied.value)
        if copied.kind == "number":
            return self.in_numbers(copied.value)
        days = _days_in(copied.value.translate(None, b"\0").decode("latin-1").lower())
        return self.in_binary(copied.value) or not self._known.days.isdisjoint(days)

    def in_text(self, content: bytes) -> bool:
        """Whether a text does."""
        text = content.decode("latin-1").lower()
        if not self._words.isdisjoint(_LETTERS.findall(text)) or not self._tokens.isdisjoint(_ALNUM.findall(text)):
            return True
        if any(needle in text for needle in self._inside) or any(needle in content for needle in self._encoded):
            return True
        return not self._known.days.isdisjoint(_days_in(text)) or not self._known.uids.isdisjoint(_UID.findall(text))

    def in_numbers(self, content: bytes) -> bool:
        """Whether numbers that are written in digits do: identifiers of six digits and more, and dates."""
        text = content.decode("latin-1").lower()
        long = [token for token in _ALNUM.findall(text) if len(token) >= _LONG_NUMBER or not token.isdigit()]
        long += [token.lstrip("0") for token in long if token.startswith("0")]
        if not self._tokens.isdisjoint(long) or not self._words.isdisjoint(long):
            return True
        days = {
            (int(token[:4]), int(token[4:6]), int(token[6:])) for token in long if len(token) == 8 and token.isdigit()
        }
        return not self._known.days.isdisjoint(days)

    def in_binary(self, content: bytes) -> bool:
        """Whether bytes hold an identifier as text, of one byte a character or of two."""
        if len(content) <= _LONG_BINARY and 4 * len(content.translate(None, _PRINTABLE)) <= len(content):
            return self.in_text(content)
        least = 4 if len(content) <= _LONG_BINARY else _LONG_NAME
        text = content.translate(None, b"\0").decode("latin-1").lower()
        words = (word for word in [*self._words, *self._tokens] if len(word) >= least)
        if any(word in text for word in words) or any(needle in text for needle in self._inside):
            return True
        return any(needle in content for needle in self._encoded if len(needle) >= _LONG_NAME)


def _days_in(text: str) -> Iterator[tuple[int, int, int]]:
    """Every date that a text may mean, day first and month first."""
    for year, _, month, day, first, _, second, last in _DAY.findall(text):
        if year:
            yield int(year), int(month), int(day)
        else:
            yield int(last), int(second), int(first)
            yield int(last), int(first), int(second)
    for first, second, last in _REVERSED.findall(text):
        yield int(last), int(second), int(first)
        yield int(last), int(first), int(second)
    for day, month, year in _NAMED_MONTH.findall(text):
        yield int(year), _MONTHS.index(month) + 1, int(day)
    for month, day, year in _MONTH_FIRST.findall(text):
        yield int(year), _MONTHS.index(month) + 1, int(day)


@lru_cache(maxsize=1024)
def _encoded(parts: frozenset[str]) -> tuple[bytes, ...]:
    """Parts of names in the bytes of every encoding that can write them, without escape sequences."""
    found = set()
    for part in parts:
        for spelling in {part, part.upper(), part.title()}:
            for encoding in _ENCODINGS:
                try:
                    content = _ESCAPE.sub(b"", spelling.encode(encoding))
                except UnicodeEncodeError:
                    continue
                if len(content) > 2:
                    found.add(content)
    return tuple(sorted(found))
