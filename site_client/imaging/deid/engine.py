"""The engine: one data set in, a cleaned one out (PS3.15 Annex E, Basic Profile and options).

Rules:
  * One pass gathers the identifiers of the whole input, one cleans it, one searches what was copied. A hit refuses
    the file.
  * The same rules hold at every depth. File meta information and preamble are written anew.
  * Names, UIDs, accession numbers and shifts of dates are keyed: the same patient gets the same ones at every run, and
    references resolve.
  * The input is not changed. Pixels are not looked at, and stay in their file until somebody asks for them. A file has
    no more of them than its header says, no overlay in their unused bits, and no identifier between compressed ones.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, MediaStorageDirectoryStorage

from locum.site_client.imaging.damage import damage_is
from locum.site_client.imaging.deid.actions import Rule, encodings_of, text_of
from locum.site_client.imaging.deid.elements import (
    EXPLICIT_LITTLE,
    UNDEFINED,
    DamagedError,
    Element,
    Encoding,
    Level,
    elements_of,
    head,
    padded,
    standard_vr,
    value_of,
    written,
    written_items,
)
from locum.site_client.imaging.deid.residue import Copied, Identifiers, Search, residue
from locum.site_client.imaging.deid.rules import CHARACTER_SET, PIXELS, identifies, rule_for
from locum.site_client.imaging.deid.table import load_tables
from locum.site_client.imaging.headers import count, frames, text
from locum.site_client.imaging.reasons import Reason, RefusedError

if TYPE_CHECKING:
    from locum.site_client.imaging.keys import Keys
    from locum.site_client.imaging.sources import Deidentification

#: CID 7050 of PS3.16, by the option; the first is the Basic Profile.
METHOD_CODES = {
    "": ("113100", "Basic Application Confidentiality Profile"),
    "clean_graphics": ("113103", "Clean Graphics Option"),
    "clean_structured_content": ("113104", "Clean Structured Content Option"),
    "clean_descriptors": ("113105", "Clean Descriptors Option"),
    "modified_dates": ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    "patient_characteristics": ("113108", "Retain Patient Characteristics Option"),
    "device_identity": ("113109", "Retain Device Identity Option"),
    "retain_uids": ("113110", "Retain UIDs Option"),
    "safe_private": ("113111", "Retain Safe Private Option"),
    "institution_identity": ("113112", "Retain Institution Identity Option"),
}
#: Of this software (PS3.7 D.3.3.2), a UUID-derived UID.
IMPLEMENTATION_UID = "2.25.86183479463041932577013265486293148752"
IMPLEMENTATION_NAME = "LOCUM"
_SHOWN = 64
_OVERLAY_BIT = 0x60000102
_NATIVE = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"})
#: Bits of a value; of Pixel Data its header says how many.
_BITS = {0x7FE00008: 32, 0x7FE00009: 64}
_DIRECTORY = 0x00041220


@dataclass(frozen=True)
class Change:
    """What was done with one element, for a person at the site: it quotes the input.

    Attributes:
        path: tags from the outermost sequence on, items counted from 1.
        code: of Table E.1-1, resolved; empty without a row.
        option: that decided, or empty.
        before: the value as it was, shortened; `after` is None for what was removed.
    """

    path: str
    name: str
    vr: str
    code: str
    option: str
    why: str
    before: str
    after: str | None


@dataclass
class _Job:
    """The file in hand; see :class:`locum.site_client.imaging.deid.actions.Job`."""

    engine: Deidentifier
    keys: Keys
    days: int
    encoding: Encoding
    encodings: list[str]
    private: Mapping[tuple[int, str, int], str]
    known: Identifiers = field(default_factory=Identifiers)
    search: Search = field(default_factory=lambda: Search(Identifiers()))
    copied: list[Copied] = field(default_factory=list)
    changes: list[Change] | None = None
    place: list[str] = field(default_factory=list)

    def cleaned(self, level: Level) -> Level:
        """One level, cleaned."""
        rule_of, kept = self.engine.rule, []
        for element in level:
            rule = rule_of(element.tag)
            after = rule.act(self, element, rule, level)
            if after is not None:
                kept.append(after)
            if self.changes is not None:
                self.changes.append(self._change(element, rule, after))
        return kept

    def level(self, tag: int, items: list[Level]) -> list[Level]:
        """The items of a sequence, cleaned."""
        found = []
        for number, item in enumerate(items, 1):
            self.place.append(f"{_shown_tag(tag)}[{number}]")
            found.append(self.cleaned(item))
            self.place.pop()
        return found

    def gather(self, level: Level) -> None:
        """The identifiers of one level and of all below it."""
        kind_of = self.engine.kind
        for element in level:
            value = element.value
            if isinstance(value, list):
                for item in value:
                    self.gather(item)
            elif value and (kind := kind_of(element.tag, element.vr)):
                self._note(kind, text_of(self, value))

    def _note(self, kind: str, value: str) -> None:
        if kind == "name":
            self.known.add_name(value)
        elif kind == "id":
            self.known.add_id(value)
        elif kind == "day":
            self.known.add_days(value)
        else:
            self.known.uids.update(uid for uid in value.split("\\") if self.keys.uid(uid) != uid)

    def _change(self, element: Element, rule: Rule, after: Element | None) -> Change:
        path = ".".join([*self.place, _shown_tag(element.tag)])
        told = None if after is None else self._shown(after)
        vr = element.vr or rule.vr
        return Change(path, rule.name, vr, rule.code, rule.option, rule.why, self._shown(element), told)

    def _shown(self, element: Element) -> str:
        value = element.value
        if isinstance(value, list):
            return f"{len(value)} items"
        if isinstance(value, RawDataElement):
            return "pixels"
        shown = text_of(self, value)
        return shown[:_SHOWN] if shown.isprintable() else f"{len(value)} bytes"


@dataclass(frozen=True)
class _Cleaned:
    """A cleaned data set before it is anybody's."""

    level: Level
    encoding: Encoding
    syntax: str
    sop_class: str
    sop: str
    encodings: list[str]
    search: Search
    overlaid: bool


class Deidentifier:
    """Cleans data sets by one site's options and keys.

    Attributes:
        profile: what was applied, in words: edition of the standard and options.
        digest: of all tables that it was applied with, 16 hexadecimal characters.
    """

    def __init__(self, setting: Deidentification, keys: Keys) -> None:
        self._tables = load_tables()
        self._options = frozenset(setting.options)
        self._keys = keys
        self._rules: dict[int, Rule] = {}
        self._kinds: dict[tuple[int, str], str] = {}
        self.digest = self._tables.digest[:16]
        self.profile = ", ".join([f"PS3.15 {self._tables.edition} Basic", *sorted(self._options)])

    def clean(self, dataset: Dataset) -> Dataset:
        """A cleaned copy with file meta information of its own.

        Raises:
            RefusedError: unreadable, or residue.
        """
        made = self._cleaned(dataset, self._job(dataset))
        with _damage():
            return _as_dataset(made, dataset)

    def file(self, dataset: Dataset) -> bytes:
        """A whole Part 10 file (PS3.10 7.1) of the cleaned data set.

        Raises:
            RefusedError: unreadable, or residue.
        """
        made = self._cleaned(dataset, self._job(dataset))
        with damage_is(Reason.UNREADABLE, "pixels"), _damage():
            return b"".join([b"\0" * 128, b"DICM", _meta(made), *_parts(made, dataset)])

    def explain(self, dataset: Dataset) -> tuple[Change, ...]:
        """What is done with every element, in the order of the file; it quotes the input.

        Raises:
            RefusedError: unreadable.
        """
        return self.explained(dataset)[0]

    def explained(self, dataset: Dataset) -> tuple[tuple[Change, ...], str]:
        """As :meth:`explain`, and why the file would be refused: where residue is, or nothing.

        Raises:
            RefusedError: unreadable.
        """
        job = self._job(dataset)
        job.changes = []
        refused = ""
        try:
            self._cleaned(dataset, job)
        except RefusedError as error:
            if error.reason is not Reason.RESIDUE:
                raise
            refused = str(error)
        return tuple(job.changes), refused

    def rule(self, tag: int) -> Rule:
        """What is done with an attribute."""
        found = self._rules.get(tag)
        if found is None:
            found = self._rules[tag] = rule_for(tag, self._tables, self._options)
        return found

    def kind(self, tag: int, vr: str) -> str:
        """What a value is to the search for residue: name, id, day, uid, or nothing."""
        found = self._kinds.get((tag, vr))
        if found is None:
            found = self._kinds[tag, vr] = self._kind(tag, vr)
        return found

    def _kind(self, tag: int, vr: str) -> str:
        known = standard_vr(tag)
        if "PN" in {vr, known}:
            return "name"
        if known in {"DA", "DT"} or (vr in {"DA", "DT"} and not known):
            return "day"
        if "UI" in {vr, known}:
            return "" if "retain_uids" in self._options else "uid"
        return "id" if identifies(tag, self._tables, self._options) else ""

    def _job(self, dataset: Dataset) -> _Job:
        with damage_is(Reason.UNREADABLE, "header"):
            patient, charset = text(dataset, "PatientID"), dataset.get_item(BaseTag(CHARACTER_SET))
            encodings = encodings_of(_charset_value(charset))
        encoding = _encoding_of(dataset)
        private = self._tables.private if "safe_private" in self._options else {}
        return _Job(self, self._keys, self._keys.days(patient), encoding, encodings, private)

    def _cleaned(self, dataset: Dataset, job: _Job) -> _Cleaned:
        with damage_is(Reason.UNREADABLE, "elements"), _damage():
            level = elements_of(dataset, job.encoding, job.encodings, PIXELS.__contains__)
        sop_class, sop = _text_at(job, level, 0x00080016), _text_at(job, level, 0x00080018)
        if sop_class == MediaStorageDirectoryStorage or any(element.tag == _DIRECTORY for element in level):
            raise RefusedError(Reason.NOT_AN_IMAGE, "a DICOM directory")
        with _damage():
            job.gather(level)
            job.search = Search(job.known)
            kept = job.cleaned(level)
            left = residue(job.copied, job.search)
        if left is not None:
            raise RefusedError(Reason.RESIDUE, f"{_shown_tag(left)} {self.rule(left).name}")
        kept = sorted([*kept, *self._method(job.encoding)], key=lambda element: element.tag)
        uids = self._keys.uid if "retain_uids" not in self._options else str
        return _Cleaned(
            kept,
            job.encoding,
            _syntax(dataset, job.encoding),
            uids(sop_class),
            uids(sop),
            job.encodings,
            job.search,
            overlaid=any(_lies_in_pixels(element) for element in level),
        )

    def _method(self, encoding: Encoding) -> Level:
        """(0012,0062) to (0012,0064) and (0028,0303): that and how the file was cleaned (PS3.15 E.1)."""
        method = [self.profile.split(", ")[0], *sorted(self._options), f"tables {self.digest}"]
        dates = b"MODIFIED" if "modified_dates" in self._options else b"REMOVED "
        codes = [METHOD_CODES[name] for name in ("", *sorted(self._options))]
        return [
            Element(0x00120062, "CS", b"YES "),
            Element(0x00120063, "LO", padded("\\".join(method).encode(), "LO")),
            Element(0x00120064, "SQ", written_items([_code(*code) for code in codes], encoding)),
            Element(0x00280303, "CS", dates),
        ]


def _code(value: str, meaning: str) -> Level:
    return [
        Element(0x00080100, "SH", value.encode()),
        Element(0x00080102, "SH", b"DCM "),
        Element(0x00080104, "LO", meaning[:64].encode()),
    ]


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise RefusedError(Reason.UNREADABLE, str(error)) from None


def _charset_value(element: Any) -> bytes:
    if element is None:
        return b""
    value = element.value
    if isinstance(value, bytes):
        return value
    return "\\".join([value] if isinstance(value, str) else list(value or ())).encode("ascii", "replace")


def _text_at(job: _Job, level: Level, tag: int) -> str:
    return text_of(job, next((element.value for element in level if element.tag == tag), b""))


@lru_cache(maxsize=4096)
def _shown_tag(tag: int) -> str:
    return f"({tag >> 16:04x},{tag & 0xFFFF:04x})"


# --- encodings


def _encoding_of(dataset: Dataset) -> Encoding:
    implicit, little = dataset.original_encoding
    if implicit is None or little is None:
        syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", ExplicitVRLittleEndian)
        implicit, little = syntax == "1.2.840.10008.1.2", syntax != "1.2.840.10008.1.2.2"
    return Encoding(implicit, little)


def _syntax(dataset: Dataset, encoding: Encoding) -> str:
    """The transfer syntax of the cleaned data set: that of the input, but never deflated."""
    stated = str(getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", "") or "")
    if stated and stated != DeflatedExplicitVRLittleEndian:
        return stated
    if stated or not encoding.implicit:
        return "1.2.840.10008.1.2.1" if encoding.little else "1.2.840.10008.1.2.2"
    return "1.2.840.10008.1.2"


# --- out


def _as_dataset(made: _Cleaned, source: Dataset) -> Dataset:
    encoding = made.encoding
    raw = {BaseTag(element.tag): _raw(element, encoding) for element in made.level}
    cleaned = FileDataset(io.BytesIO(), raw, b"\0" * 128, _file_meta(made), encoding.implicit, encoding.little)
    for name in ("filename", "buffer", "fileobj_type", "timestamp"):  # where pixels are that were not read yet
        setattr(cleaned, name, getattr(source, name, None))
    cleaned.set_original_encoding(encoding.implicit, encoding.little, made.encodings)
    return cleaned


def _raw(element: Element, encoding: Encoding) -> RawDataElement:
    tag, vr, value = element
    if isinstance(value, RawDataElement):
        return value
    content = padded(value, vr) if isinstance(value, bytes) else written_items(value, encoding)
    return RawDataElement(BaseTag(tag), vr or None, len(content), content, 0, encoding.implicit, encoding.little)


def _file_meta(made: _Cleaned) -> FileMetaDataset:
    meta = FileMetaDataset()
    for element in _meta_elements(made):
        meta[BaseTag(element.tag)] = _raw(element, EXPLICIT_LITTLE)
    return meta


def _meta_elements(made: _Cleaned) -> Level:
    """File meta information (PS3.10 7.1) without anything of the input's but SOP class and keyed instance."""
    return [
        Element(0x00020001, "OB", b"\0\1"),
        Element(0x00020002, "UI", padded(made.sop_class.encode(), "UI")),
        Element(0x00020003, "UI", padded(made.sop.encode(), "UI")),
        Element(0x00020010, "UI", padded(made.syntax.encode(), "UI")),
        Element(0x00020012, "UI", padded(IMPLEMENTATION_UID.encode(), "UI")),
        Element(0x00020013, "SH", padded(IMPLEMENTATION_NAME.encode(), "SH")),
    ]


def _meta(made: _Cleaned) -> bytes:
    content = written(_meta_elements(made), EXPLICIT_LITTLE)
    return head(0x00020000, "UL", 4, EXPLICIT_LITTLE) + len(content).to_bytes(4, "little") + content


def _parts(made: _Cleaned, source: Dataset) -> list[bytes]:
    """The data set in bytes; pixels that are still in their file are read now."""
    parts: list[bytes] = []
    for element in made.level:
        if isinstance(element.value, RawDataElement):
            parts += _pixel_parts(element, made, source)
        else:
            parts.append(written([element], made.encoding))
    return parts


def _lies_in_pixels(element: Element) -> bool:
    """Whether it says that an overlay is drawn in bits of the pixels that they do not use (retired, PS3.3 C.9.2)."""
    return element.tag & 0xFF00FFFF == _OVERLAY_BIT and isinstance(element.value, bytes) and any(element.value)


def _pixel_parts(element: Element, made: _Cleaned, source: Dataset) -> list[bytes]:
    raw, encoding = element.value, made.encoding
    if not isinstance(raw, RawDataElement):
        raise DamagedError("these are no pixels")
    vr, value = raw.VR or "OW", value_of(source, raw)
    if raw.length == UNDEFINED or made.syntax not in _NATIVE:
        if made.overlaid:
            raise RefusedError(Reason.BURNED_IN, "an overlay in the bits of compressed pixels")
        if made.search.in_binary(value):  # a comment in a JPEG, text between the fragments
            raise RefusedError(Reason.RESIDUE, _shown_tag(element.tag))
    else:
        value = value[: _length_of_pixels(element.tag, source)]
        value = _without_overlay(value, encoding, source) if made.overlaid else value
    if raw.length == UNDEFINED:
        end = head(0xFFFEE0DD, "", 0, Encoding(implicit=True, little=encoding.little))
        return [head(element.tag, vr, UNDEFINED, encoding), value, end]
    return [head(element.tag, vr, len(value) + len(value) % 2, encoding), padded(value, "OB")]


def _length_of_pixels(tag: int, source: Dataset) -> int:
    """Bytes of uncompressed pixels: what follows them is none."""
    values = count(source, "Rows") * count(source, "Columns") * (count(source, "SamplesPerPixel") or 1)
    bits = values * _BITS.get(tag, count(source, "BitsAllocated"))
    return max(0, frames(source)) * -(-bits // 8)


def _without_overlay(value: bytes, encoding: Encoding, source: Dataset) -> bytes:
    """Uncompressed pixels with nothing in the bits beside those that they use (PS3.5 8.1.1)."""
    size, high = count(source, "BitsAllocated") // 8, count(source, "HighBit")
    low, above = high + 1 - count(source, "BitsStored"), 8 * size - 1 - high
    if size not in {1, 2, 4} or low < 0 or above < 0 or len(value) % size:
        raise RefusedError(Reason.BURNED_IN, "an overlay in the bits of the pixels")
    kind = "i" if count(source, "PixelRepresentation") else "u"
    pixels = np.frombuffer(value, f"{encoding.order}{kind}{size}")
    return ((((pixels << above) >> above) >> low) << low).astype(pixels.dtype).tobytes()
