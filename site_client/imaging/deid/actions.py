"""What is done with one element: a function gets the job, the element, its rule and its level, and gives the new one.

Rules:
  * What stays was checked: a number is digits, a code string is short and plain, a date is a date. What does not fit
    goes.
  * A text that holds an identifier of the input is withheld; so is one that is not plain ASCII, as scanners write it.
    What is copied is told to the job, to be searched for residue.
  * What is made here holds nothing of the input.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.dataelem import RawDataElement

from locum.site_client.imaging.deid.elements import Element, Level
from locum.site_client.imaging.deid.residue import Copied, Identifiers, Kind, Search
from locum.site_client.imaging.deid.words import cleaned, meaning, schemes
from locum.site_client.imaging.known import OLDEST

if TYPE_CHECKING:
    from collections.abc import Mapping

    from locum.site_client.imaging.keys import Keys


class Rule(NamedTuple):
    """What is done with an attribute, and why.

    Attributes:
        vr: of the data dictionary; empty for an unknown or a private attribute.
        code: of Table E.1-1, resolved; empty without a row.
        option: that decided; empty if the Basic Profile did.
    """

    tag: int
    name: str
    vr: str
    code: str
    option: str
    why: str
    act: Act


class Job(Protocol):
    """What the engine holds of the file in hand.

    Attributes:
        days: by how many days its dates move back.
        encodings: of its text, as pydicom calls them.
        known: identifiers of the input, and what looks for them.
        copied: values that the output has from the input.
    """

    keys: Keys
    days: int
    encodings: list[str]
    known: Identifiers
    search: Search
    copied: list[Copied]

    @property
    def private(self) -> Mapping[tuple[int, str, int], str]:
        """Safe private attributes to their VR."""

    def level(self, tag: int, items: list[Level]) -> list[Level]:
        """The items of a sequence, cleaned."""


Act: TypeAlias = Callable[[Job, Element, Rule, Level], Element | None]

REMOVED = b"REMOVED "
_TEXTS = frozenset(
    {"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}
)
#: Bytes of one number.
SIZES = {
    **dict.fromkeys(("OW", "SS", "US"), 2),
    **dict.fromkeys(("AT", "FL", "OF", "OL", "SL", "UL"), 4),
    **dict.fromkeys(("FD", "OD", "OV", "SV", "UV"), 8),
}
_BULK = frozenset({"OB", "OD", "OF", "OL", "OV", "OW", "UN"})
#: Dummies of PS3.15 E.1 by VR; text is REMOVED.
_DUMMIES = {
    **{vr: b"\0" * size for vr, size in SIZES.items()},
    "AS": b"000Y",
    "DA": b"19000101",
    "DS": b"0 ",
    "DT": b"19000101000000",
    "IS": b"0 ",
    "OB": b"\0\0",
    "TM": b"000000",
    "UN": b"\0\0",
    "UR": b"http://removed.invalid",
}

#: Written so that no value takes longer than its length.
_ONE_NUMBER = rb"[ \0]*([+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?[ \0]*)?"
_NUMBERS = re.compile(_ONE_NUMBER + rb"(\\" + _ONE_NUMBER + rb")*")
_CODES = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_ .-+/\\\0"
_CODE_VALUE = re.compile(rb"[A-Za-z0-9_.:\-+/{}\[\]%*^()'#?=&~]{1,64}[ \0]*")
_LONGEST_CODE = 32
#: Of a text that stays; LO has 64 characters a value, ST 1024 (PS3.5 6.2).
_LONGEST_TEXT = 1024
#: Printable ASCII.
_PLAIN = bytes(range(32, 127))
_UID = re.compile(r"[0-9.]{1,64}")
_TIME = re.compile(rb"([01]\d|2[0-3])(:?[0-5]\d(:?([0-5]\d|60)(\.\d{1,6})?)?)?[ \0]*")
_ZONE = re.compile(rb"[+-](0\d|1[0-4])[0-5]\d[ \0]*")
_DATE = re.compile(rb"(\d{4})([.\-]?)(\d\d)\2(\d\d)[ \0]*")
_DATE_TIME = re.compile(rb"(\d{4})(\d\d)(\d\d)(\d{2,6}(\.\d{1,6})?)?([+-]\d{4})?[ \0]*")
_AGE = re.compile(rb"(\d{3})([DWMY])[ \0]*")
_SEGMENT_LABEL = 0x00620005
#: What decides whether an image may be used: it is refused rather than emptied.
_GATES = frozenset({0x00080008, 0x00080060, 0x00280301})
_CODE_TAGS = (0x00080100, 0x00080119, 0x00080120)
_SCHEME = 0x00080102
_CODING_UIDS = frozenset({0x0008010C, 0x00080117, 0x00080118})
#: Below it HL7 registers coding schemes.
_PUBLIC_ROOT = "2.16.840.1.113883."


def vr_of(element: Element, rule: Rule) -> str | None:
    """The VR under which a value is read and written; None if what the file says cannot be.

    A VR that the file does not state stays empty where the dictionary leaves a choice.
    """
    found, known = element.vr, rule.vr
    if found == known:
        return found
    if found in {"", "UN"}:
        return "" if " or " in known else known
    if found in known.split(" or "):
        return found
    if known in _TEXTS and found in _TEXTS:
        return known
    if known in SIZES and found in SIZES and (known in _BULK) == (found in _BULK):
        return found
    return found if known in _BULK and found in _BULK else None


def _copy(job: Job, element: Element, rule: Rule, kind: Kind) -> Element | None:
    vr = vr_of(element, rule)
    if vr is None or not isinstance(element.value, bytes):
        return None
    if kind == "text" and element.tag not in _GATES and _is_withheld(job, element.value, rule):
        return Element(element.tag, vr, b"")
    job.copied.append(Copied(element.tag, element.value, kind))
    return Element(element.tag, vr, element.value)


def _is_withheld(job: Job, value: bytes, rule: Rule) -> bool:
    """Whether a text goes after all: it holds an identifier, or what no scanner writes and no option asked to keep."""
    if len(value) > _LONGEST_TEXT:
        return True
    plain = value.rstrip(b"\0").translate(None, _PLAIN)
    return (bool(plain) and not rule.option) or job.search.in_text(value)


def _made(rule: Rule, value: bytes) -> Element:
    return Element(rule.tag, rule.vr.partition(" or ")[0], value)


def text_of(job: Job, value: object) -> str:
    """A value as text, several joined by a backslash, without blanks at its ends."""
    if not isinstance(value, bytes):
        return ""
    if value.isascii() and b"\x1b" not in value:
        return value.decode("ascii").strip(" \0")
    if len(job.encodings) == 1 and b"\x1b" not in value:
        return value.decode(job.encodings[0], "replace").strip(" \0")
    return str(decode_bytes(value, job.encodings, {"\\", "^", "=", "\r", "\n", "\f", "\t"})).strip(" \0")


# --- to remove, to empty, to replace


def drop(job: Job, element: Element, rule: Rule, level: Level) -> None:  # an Act
    """X: the element goes."""


def empty(job: Job, element: Element, rule: Rule, level: Level) -> Element:  # noqa: ARG001
    """Z: the element stays without a value."""
    return _made(rule, b"")


def dummy(job: Job, element: Element, rule: Rule, level: Level) -> Element:  # noqa: ARG001
    """D: the element gets a value that says nothing; one that was empty stays empty."""
    if element.value in (b"", []):
        return _made(rule, b"")
    return _made(rule, _DUMMIES.get(rule.vr.partition(" or ")[0], REMOVED))


def patient(job: Job, element: Element, rule: Rule, level: Level) -> Element:  # noqa: ARG001
    """D: a patient ID becomes its pseudonym."""
    return _made(rule, job.keys.patient(text_of(job, element.value)).encode())


def patient_name(job: Job, element: Element, rule: Rule, level: Level) -> Element:
    """D: a patient's name becomes the pseudonym of the ID beside it."""
    beside = next((other.value for other in level if other.tag == 0x00100020), b"")
    pseudonym = job.keys.patient(text_of(job, beside)).encode()
    return _made(rule, pseudonym or (REMOVED if element.value else b""))


def accession(job: Job, element: Element, rule: Rule, level: Level) -> Element:  # noqa: ARG001
    """The accession number becomes its keyed name, so that labels find it."""
    return _made(rule, job.keys.accession(text_of(job, element.value)).encode())


def uid(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:
    """U: each UID becomes its keyed name, even one that is none; those of the standard and of public codes stay."""
    if vr_of(element, rule) is None:
        return None
    values = text_of(job, element.value).split("\\")
    if rule.tag in _CODING_UIDS and values[0].startswith(_PUBLIC_ROOT):
        return copy_uid(job, element, rule, level)
    return _made(rule, "\\".join(job.keys.uid(value) for value in values).encode())


# --- to keep what was checked


def copy_uid(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:
    """K of a UID: it stays, if it is one."""
    values = text_of(job, element.value).split("\\")
    fits = all(_UID.fullmatch(value) for value in values if value)
    return copy_text(job, element, rule, level) if fits else None


def copy_text(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """Text that stays as it is."""
    return _copy(job, element, rule, "text")


def number(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """DS and IS: digits stay."""
    fits = isinstance(element.value, bytes) and _NUMBERS.fullmatch(element.value)
    return _copy(job, element, rule, "number") if fits else None


def binary(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """Binary numbers of whole size stay."""
    value, vr = element.value, element.vr if element.vr in SIZES else rule.vr.partition(" or ")[0]
    fits = isinstance(value, bytes) and len(value) % SIZES.get(vr, 1) == 0
    return _copy(job, element, rule, "binary") if fits else None


def code_string(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """CS: short and plain values stay."""
    value = element.value
    if not isinstance(value, bytes) or value.translate(None, _CODES):
        return None
    if len(value) > _LONGEST_CODE and any(len(part) > _LONGEST_CODE for part in value.split(b"\\")):
        return None
    return _copy(job, element, rule, "text")


def code(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """A code or its scheme: one word."""
    value = element.value
    if rule.tag == _SCHEME and text_of(job, value) in schemes():
        return _made(rule, text_of(job, value).encode())
    return _copy(job, element, rule, "text") if isinstance(value, bytes) and _CODE_VALUE.fullmatch(value) else None


def code_meaning(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:
    """A meaning is that of the dictionary for the code beside it, or the code; without a code it goes."""
    beside = {other.tag: other.value for other in level if other.tag in _CODE_TAGS or other.tag == _SCHEME}
    found = next((beside[tag] for tag in _CODE_TAGS if beside.get(tag)), b"")
    if not isinstance(found, bytes) or not _CODE_VALUE.fullmatch(found):
        return None
    code_text = text_of(job, found)
    known = meaning(text_of(job, beside.get(_SCHEME, b"")), code_text)
    if known == code_text[:64]:
        return _copy(job, element._replace(value=found[:64]), rule, "text")
    return _made(rule, known.encode("ascii", "replace"))


def words(job: Job, element: Element, rule: Rule, level: Level) -> Element:  # noqa: ARG001
    """C of a text: only words of the vocabulary stay, and none that is part of a name in this file."""
    kept = cleaned(text_of(job, element.value)[:_LONGEST_TEXT], job.known.names).encode()
    kept = b"" if job.search.in_text(kept) else kept
    if not kept and rule.tag == _SEGMENT_LABEL:
        return _made(rule, REMOVED)
    job.copied.append(Copied(element.tag, kept, "text"))
    return _made(rule, kept)


def character_set(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:
    """The character set stays if it is one of the standard's."""
    value = text_of(job, element.value)
    known = all(
        not part.strip() or part.strip().startswith(("ISO_IR ", "ISO 2022 IR ", "GB")) for part in value.split("\\")
    )
    return code_string(job, element, rule, level) if known else None


def age(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """An age stays, and stops at 90 years (45 CFR 164.514(b)(2)(i)(C))."""
    found = _AGE.fullmatch(element.value) if isinstance(element.value, bytes) else None
    if not found:
        return None
    years = {b"D": 365.25, b"W": 52.18, b"M": 12.0, b"Y": 1.0}[found[2]]
    return _made(rule, b"%03dY" % OLDEST if int(found[1]) / years >= OLDEST else found[1] + found[2])


# --- dates and times


def shifted(job: Job, element: Element, rule: Rule, level: Level) -> Element:  # noqa: ARG001
    """C of a date or a date-time: it moves back by the patient's days; one that cannot be read is emptied."""
    change = shift_date if rule.vr == "DA" else shift_date_time
    value = element.value if isinstance(element.value, bytes) else b""
    return _made(rule, b"\\".join(change(part.strip(b" \0"), job.days) for part in value.split(b"\\")))


def shift_date(value: bytes, days: int) -> bytes:
    """A DA (PS3.5 6.2) moved back by `days`; empty if it is none."""
    found = _DATE.fullmatch(value)
    return _moved(int(found[1]), int(found[3]), int(found[4]), days) if found else b""


def shift_date_time(value: bytes, days: int) -> bytes:
    """A DT moved back by `days`, its time of day and zone as they were; empty if it names no day."""
    found = _DATE_TIME.fullmatch(value)
    moved = _moved(int(found[1]), int(found[2]), int(found[3]), days) if found else b""
    return moved + (found[4] or b"") + (found[6] or b"") if found and moved else b""


def _moved(year: int, month: int, day: int, days: int) -> bytes:
    try:
        return (dt.date(year, month, day) - dt.timedelta(days)).strftime("%Y%m%d").rjust(8, "0").encode()
    except (ValueError, OverflowError):
        return b""


def time(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """C of a time of day: it stays, if it is one."""
    value = element.value
    fits = isinstance(value, bytes) and all(_TIME.fullmatch(part) for part in value.split(b"\\") if part.strip(b" \0"))
    return _copy(job, element, rule, "number") if fits else _made(rule, b"")


def zone(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """C of an offset from UTC: it stays, if it is one."""
    fits = isinstance(element.value, bytes) and _ZONE.fullmatch(element.value)
    return _copy(job, element, rule, "number") if fits else None


# --- sequences, pixels, private attributes


def inner(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """A sequence stays, with its items cleaned by the same rules."""
    if not isinstance(element.value, list):
        return None if element.value else _made(rule, b"")
    return Element(element.tag, "SQ", job.level(element.tag, element.value))


def pixels(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:  # noqa: ARG001
    """Pixels stay where they are."""
    return element if isinstance(element.value, RawDataElement) else None


def safe_private(job: Job, element: Element, rule: Rule, level: Level) -> Element | None:
    """A private attribute stays if it is on the list, as a number or a code string; its creator with it."""
    group, low = element.tag >> 16, element.tag & 0xFFFF
    if 0x10 <= low <= 0xFF:
        block = range(element.tag & 0xFFFF0000 | low << 8, (element.tag & 0xFFFF0000 | low << 8) + 0x100)
        name = text_of(job, element.value)
        needed = any((group, name, other.tag & 0xFF) in job.private for other in level if other.tag in block)
        return Element(element.tag, "LO", name.encode()) if needed else None
    vr = _private_vr(job, element, level)
    if not vr or not group & 1:
        return None
    act: Act = {"DS": number, "IS": number, "CS": code_string}.get(vr, binary)
    return act(job, element, rule._replace(vr=vr), level)


def _private_vr(job: Job, element: Element, level: Level) -> str:
    """The VR of a private attribute that may stay; empty if it may not."""
    group, low = element.tag >> 16, element.tag & 0xFFFF
    creator = next((other.value for other in level if other.tag == group << 16 | low >> 8), b"")
    return job.private.get((group, text_of(job, creator), low & 0xFF), "")


def encodings_of(value: bytes) -> list[str]:
    """Python's encodings for a Specific Character Set (0008,0005); raises LookupError or ValueError for none."""
    parts = value.decode("ascii", "replace").strip(" \0").split("\\")
    return [str(encoding) for encoding in convert_encodings([part.strip() for part in parts])]
