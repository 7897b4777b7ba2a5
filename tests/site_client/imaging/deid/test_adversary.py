"""A generator that hides names, identifiers and dates wherever a DICOM file has room for bytes."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import pydicom
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from locum.site_client.imaging.reasons import Reason, RefusedError
from tests.site_client.imaging.deid.checker import Secrets, leaks
from tests.site_client.imaging.deid.objects import ALL_OPTIONS, LONG, element, engine, item, level, outcome

_TEXT_VRS = [b"AE", b"AS", b"CS", b"DA", b"DS", b"DT", b"IS", b"LO", b"LT", b"PN", b"SH", b"ST", b"TM", b"UI"]
_VRS = sorted(LONG | {*_TEXT_VRS, b"AT", b"FD", b"FL", b"SL", b"SS", b"UL", b"US"})
_PUBLIC = [
    tag for tag in DicomDictionary if tag >> 16 not in {0, 2, 4, 0x7FE0, 0xFFFA} and tag & 0xFFFF and tag != 0x00080005
]
_SEQUENCES = [tag for tag in _PUBLIC if DicomDictionary[tag][0] == "SQ"]
_SURNAMES = [
    "Okonkwo",
    "Kowalska",
    "Brzezinski",
    "Nguyen",
    "Ferreira",
    "Lindqvist",
    "Doe",
    "Wu-Zhang",
    "O'Leary",
    "Müller-Öztürk",
]
_FIRST = ["Zofia", "Adaeze", "Jörg", "Ximena", "Bob"]
_SYNTAXES = {True: b"1.2.840.10008.1.2\0", False: b"1.2.840.10008.1.2.1\0"}
_DRAWINGS = [0x60003000, 0x60004000, 0x60020022, 0x50003000, 0x50000030]
_ENGINES = [engine(), engine("modified_dates"), engine(*ALL_OPTIONS)]


@dataclass(frozen=True)
class Person:
    """Whom a file is of, and the ways in which somebody may have written that."""

    surname: str
    first: str
    number: str
    born: str

    @property
    def spellings(self) -> list[bytes]:
        year, month, day = self.born[:4], self.born[4:6], self.born[6:]
        names = [self.surname, self.surname.upper(), f"{self.surname}^{self.first}", f"{self.first} {self.surname}"]
        notes = [f"Dr. {self.surname}, ward 5", f"x_{self.surname}_1", f"seen {self.first.upper()} today"]
        dates = [self.born, f"{year}-{month}-{day}", f"{day}.{month}.{year}", f"{month}/{day}/{year}"]
        texts = [*names, *notes, *dates, self.number, f"ID:{self.number}", f"born {day}/{month}/{year}"]
        return [text.encode("latin-1") for text in texts] + [self.surname.encode(), self.first.encode()]

    @property
    def secrets(self) -> Secrets:
        found = Secrets()
        found.add_name(self.surname)
        found.add_name(self.first)
        found.add_id(self.number)
        found.add_day(self.born)
        return found


people = st.builds(
    Person,
    surname=st.sampled_from(_SURNAMES),
    first=st.sampled_from(_FIRST),
    number=st.from_regex(r"[A-Z]{2}[0-9]{6}|[1-9][0-9]{6,9}|[0-9]{3}-[0-9]{4}-[A-Z]", fullmatch=True),
    born=st.dates(
        min_value=__import__("datetime").date(1910, 1, 1), max_value=__import__("datetime").date(2019, 12, 31)
    ).map(lambda day: day.strftime("%Y%m%d")),
)


@st.composite
def hiding_places(draw: st.DrawFn, person: Person, implicit: bool, depth: int = 0) -> dict[int, tuple[bytes, bytes]]:
    """Elements of one level, some of them with a secret, some of them sequences of more."""
    found: dict[int, tuple[bytes, bytes]] = {}
    secret = st.sampled_from(person.spellings)
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["right", "wrong", "unknown", "private", "overlay", "sequence", "code"]))
        if kind == "right":
            tag = draw(st.sampled_from(_PUBLIC))
            vr = DicomDictionary[tag][0].split(" or ")[0].encode()
            found[tag] = (vr if vr != b"SQ" else b"UN", draw(secret))
        elif kind == "wrong":
            found[draw(st.sampled_from(_PUBLIC))] = (draw(st.sampled_from(_VRS)), draw(secret))
        elif kind == "unknown":
            found[draw(st.integers(0x00080000, 0x7FDFFFFF))] = (draw(st.sampled_from(_VRS)), draw(secret))
        elif kind == "private":
            group = draw(st.sampled_from([0x0009, 0x0019, 0x0029, 0x2005, 0x7FE1]))
            found[group << 16 | 0x10] = (
                b"LO",
                draw(st.sampled_from([b"SIEMENS MR HEADER", b"ACME 1.0", *person.spellings])),
            )
            found[group << 16 | 0x1000 | draw(st.integers(0, 0xFF))] = (draw(st.sampled_from(_VRS)), draw(secret))
        elif kind == "overlay":
            found[draw(st.sampled_from(_DRAWINGS))] = (b"OB", draw(secret))
        elif kind == "code":
            scheme = draw(st.sampled_from([b"DCM", b"99LOCAL"]))
            found |= {0x00080100: (b"SH", draw(secret)), 0x00080102: (b"SH", scheme), 0x00080104: (b"LO", draw(secret))}
        elif depth < 4:
            levels = [draw(hiding_places(person, implicit, depth + 1)) for _ in range(draw(st.integers(1, 2)))]
            tag = draw(st.sampled_from([*_SEQUENCES, 0x00091001]))
            found[tag] = (b"SQ", b"".join(item(level(one, implicit=implicit)) for one in levels))
    return found


@st.composite
def files(draw: st.DrawFn) -> tuple[Person, bytes]:
    """A Part 10 file of a person, who stands in the usual places and in unusual ones."""
    person = draw(people)
    implicit = draw(st.booleans())
    hidden = draw(hiding_places(person, implicit))
    name = f"{person.surname}^{person.first}".encode()
    usual = {
        0x00080005: (b"CS", b"ISO_IR 192"),
        0x00080016: (b"UI", b"1.2.840.10008.5.1.4.1.1.2"),
        0x00080018: (b"UI", b"1.2.826.0.1.3680043.10.77.1"),
        0x00100010: (b"PN", name),
        0x00100020: (b"LO", person.number.encode()),
        0x00100030: (b"DA", person.born.encode()),
    }
    meta = element(0x00020001, b"OB", b"\0\1") + element(0x00020010, b"UI", _SYNTAXES[implicit])
    meta += element(0x00020016, b"AE", draw(st.sampled_from(person.spellings))[:16])
    preamble = (draw(st.sampled_from(person.spellings)) + b"\0" * 128)[:128]
    length = element(0x00020000, b"UL", struct.pack("<I", len(meta)))
    pixels = element(0x7FE00010, b"OW", name, implicit=implicit)
    return person, preamble + b"DICM" + length + meta + level({**hidden, **usual}, implicit=implicit) + pixels


def parsed(content: bytes) -> Dataset | None:
    try:
        return pydicom.dcmread(io.BytesIO(content))
    except (InvalidDicomError, EOFError, ValueError, NotImplementedError, struct.error):
        return None


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(files(), st.sampled_from(range(3)))
def test_whatever_is_hidden_is_gone_or_the_file_is_refused(made, which):
    person, content = made
    dataset = parsed(content)
    if dataset is None:
        event("pydicom cannot read it")
        return
    result = outcome(lambda: _ENGINES[which].file(dataset))
    if isinstance(result, RefusedError):
        event(f"refused: {result.reason}")
        assert result.reason in {Reason.RESIDUE, Reason.UNREADABLE}
        assert not any(spelling.decode("latin-1").lower() in str(result).lower() for spelling in person.spellings)
        return
    event("cleaned")
    assert leaks(result, person.secrets) == []


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["山田^太郎", "王^小明", "김^민수", "Петров^Иван", "Ωμέγα^Άννα", "Åström^Çağla"]), st.data())
def test_a_name_in_any_script_and_encoding_is_found(name, data):
    sets = {
        "ISO_IR 192": "utf-8",
        "GB18030": "gb18030",
        "ISO_IR 144": "iso8859_5",
        "ISO_IR 126": "iso8859_7",
        "ISO_IR 148": "iso8859_9",
    }
    charset = data.draw(st.sampled_from([key for key, code in sets.items() if _can(name, code)]))
    other = data.draw(st.sampled_from([code for code in (*sets.values(), "shift_jis", "euc_kr") if _can(name, code)]))
    part = data.draw(st.sampled_from(name.split("^")))
    place = data.draw(
        st.sampled_from([0x00080070, 0x00081090, 0x00620005, 0x00181210, 0x00281055, 0x00081030, 0x00400254])
    )
    hidden = {place: (DicomDictionary[place][0].encode(), part.encode(other))}
    usual = {
        0x00080005: (b"CS", charset.encode()),
        0x00080016: (b"UI", b"1.2.840.10008.5.1.4.1.1.2"),
        0x00080018: (b"UI", b"1.2.3.4"),
        0x00100010: (b"PN", name.encode(sets[charset])),
        0x00100020: (b"LO", b"P1"),
    }
    meta = element(0x00020010, b"UI", b"1.2.840.10008.1.2.1\0")
    content = (
        b"\0" * 128
        + b"DICM"
        + element(0x00020000, b"UL", struct.pack("<I", len(meta)))
        + meta
        + level({**hidden, **usual})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cleaned = engine(*ALL_OPTIONS).file(pydicom.dcmread(io.BytesIO(content)))
    secrets = Secrets()
    secrets.add_name(name)
    assert leaks(cleaned, secrets) == []


def _can(name: str, code: str) -> bool:
    try:
        name.encode(code)
    except UnicodeEncodeError:
        return False
    return True
