"""From an attribute to what is done with it: Table E.1-1, the site's options, and what the standard leaves open.

Rules:
  * A row of the table decides. A choice between codes is taken as the one that fits every IOD: X/Z as Z; X/D, Z/D and
    X/Z/D as D.
    A sequence under D or Z is emptied; X/Z/U* stays with keyed UIDs.
  * An option decides before the Basic Profile; where two do, removal wins over keeping, keeping over cleaning.
  * Without a row: free text and bulk data go unless `safe_public.csv` lets them stay. The standard would keep them; but
    names are there. Numbers, code strings and sequences stay, UIDs are keyed, dates go the way of all dates.
  * What the data dictionary does not know goes; so do private groups, group lengths, overlays (60xx), curves (50xx) and
    signatures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from pydicom.datadict import dictionary_description

from locum.site_client.imaging.deid import actions
from locum.site_client.imaging.deid.actions import SIZES, Act, Rule
from locum.site_client.imaging.deid.elements import standard_vr
from locum.site_client.imaging.deid.table import Row, Tables

PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
#: What the engine writes anew into every file: what stood there goes.
OWN = frozenset({0x00120062, 0x00120063, 0x00120064, 0x00280303})
PATIENT_ID, PATIENT_NAME, PATIENT_AGE = 0x00100020, 0x00100010, 0x00101010
ACCESSION, CHARACTER_SET, ZONE = 0x00080050, 0x00080005, 0x00080201
_SIGNATURES = 0xFFFA
_RESOLVED = {"X/Z": "Z", "X/D": "D", "Z/D": "D", "X/Z/D": "D", "X/Z/U*": "U"}
_STRONGEST = ("X", "K", "C")
_DATES = {"DA": actions.shifted, "DT": actions.shifted, "TM": actions.time}
_IDENTIFIES = re.compile(r"\bIDs?\b|Identif|Number|Address|Telephone|Telecom|Locator|Institution|Residence|Station")
_SHORT_TEXTS = frozenset({"LO", "SH", "ST", "LT", "UT", "UC", "AE"})


def rule_for(tag: int, tables: Tables, options: Collection[str]) -> Rule:
    """What is done with the attribute `tag` under these options."""
    vr = standard_vr(tag)
    for found in (_structural(tag, vr, options), _special(tag, vr, options)):
        if found is not None:
            return found
    row = tables.rows.get(f"{tag:08x}")
    if not vr:
        return _rule(tag, vr, "X" if row else "", "", "the data dictionary does not know it", actions.drop)
    return _by_row(tag, vr, row, options) if row else _without_row(tag, vr, tables.public.get(tag, ""), options)


def identifies(tag: int, tables: Tables, options: Collection[str]) -> bool:
    """Whether the value of a public attribute identifies: an ID, an address, an institution that no option keeps."""
    if tag in {PATIENT_ID, ACCESSION}:
        return True
    row = tables.rows.get(f"{tag:08x}")
    if row is None or standard_vr(tag) not in _SHORT_TEXTS or row.basic in {"U", "K"}:
        return False
    kept = any(row.options.get(option) in {"K", "C"} for option in options)
    return not kept and bool(_IDENTIFIES.search(row.name))


def _rule(tag: int, vr: str, code: str, option: str, why: str, act: Act) -> Rule:  # one table row
    return Rule(tag, _name(tag), vr, code, option, why, act)


def _name(tag: int) -> str:
    try:
        return str(dictionary_description(tag))
    except KeyError:
        return "private" if tag >> 16 & 1 else "unknown"


def _structural(tag: int, vr: str, options: Collection[str]) -> Rule | None:
    """Groups and elements that go whatever they hold."""
    group = tag >> 16
    if group & 1 and group < _SIGNATURES:
        if "safe_private" in options:
            return _rule(tag, vr, "C", "safe_private", "private: stays if it is on the safe list", actions.safe_private)
        return _rule(tag, vr, "X", "", "private", actions.drop)
    why = _goes_because(group, tag & 0xFFFF)
    return _rule(tag, vr, "X", "", why, actions.drop) if why else None


def _goes_because(group: int, element: int) -> str:
    if element == 0:
        return "length of a group: it would be wrong"
    if group in {0x0000, 0x0002, 0x0004}:
        return "belongs to a message, to file meta information or to a directory"
    if group & 0xFF00 in {0x5000, 0x6000}:
        return "overlay or curve: text may be drawn in it"
    return "signature or padding" if group >= _SIGNATURES else ""


def _special(tag: int, vr: str, options: Collection[str]) -> Rule | None:
    """Attributes that this software fills itself."""
    if tag in OWN:
        return _rule(tag, vr, "", "", "written anew", actions.drop)
    if tag in PIXELS:
        return _rule(tag, vr, "", "", "pixels: not looked at here", actions.pixels)
    special: dict[int, tuple[str, str, Act]] = {
        PATIENT_ID: ("D", "keyed pseudonym", actions.patient),
        PATIENT_NAME: ("D", "the pseudonym of the ID", actions.patient_name),
        ACCESSION: ("D", "keyed name, so that labels find it", actions.accession),
        CHARACTER_SET: ("", "how text is encoded", actions.character_set),
    }
    if tag in special:
        code, why, act = special[tag]
        return _rule(tag, vr, code, "", why, act)
    if tag == PATIENT_AGE and "patient_characteristics" in options:
        return _rule(tag, vr, "K", "patient_characteristics", "stays, and stops at 90 years", actions.age)
    return None


# --- with a row


def _by_row(tag: int, vr: str, row: Row, options: Collection[str]) -> Rule:
    code, option = _decided(row, options)
    if option:
        return _rule(
            tag, vr, code, option, f"{code} under this option", _kept(tag, vr) if code == "K" else _clean(tag, vr, code)
        )
    taken = _RESOLVED.get(row.basic, row.basic)
    why = f"Basic Profile {row.basic}" + (f", taken as {taken}" if taken != row.basic else "")
    return _rule(tag, vr, taken, "", why, _basic(vr, taken))


def _decided(row: Row, options: Collection[str]) -> tuple[str, str]:
    """The strongest code that an option of the site gives, and that option."""
    given = {code: option for option, code in row.options.items() if option in options}
    return next(((code, given[code]) for code in _STRONGEST if code in given), ("", ""))


def _basic(vr: str, code: str) -> Act:
    if code == "U":
        return actions.inner if vr == "SQ" else actions.uid
    if code == "D" and vr in {"SQ", "UI"}:
        return actions.empty if vr == "SQ" else actions.uid
    return {"X": actions.drop, "Z": actions.empty, "D": actions.dummy}[code]


def _kept(tag: int, vr: str) -> Act:
    """K: as it is, if it is what its VR says; a sequence is cleaned within (PS3.15 E.1)."""
    kinds: Mapping[str, Act] = {"SQ": actions.inner, "UI": actions.copy_uid, **_DATES}
    return kinds.get(vr) or _plain(vr) or (actions.zone if tag == ZONE else actions.copy_text)


def _clean(tag: int, vr: str, code: str) -> Act:
    """C: dates move, sequences are cleaned within, of texts words stay; bulk data goes, for nobody looks at it."""
    if code == "X":
        return actions.drop
    if tag == ZONE:
        return actions.zone
    kinds: Mapping[str, Act] = {"SQ": actions.inner, "UI": actions.uid, **_DATES}
    return kinds.get(vr) or _plain(vr) or (actions.words if vr in _SHORT_TEXTS else actions.drop)


# --- without a row


def _plain(vr: str) -> Act | None:
    """What stays of numbers and code strings."""
    first = vr.partition(" or ")[0]
    if first in {"DS", "IS"}:
        return actions.number
    if first == "CS":
        return actions.code_string
    return actions.binary if first in SIZES and "OW" not in vr.split(" or ") else None


def _without_row(tag: int, vr: str, treatment: str, options: Collection[str]) -> Rule:
    if treatment:
        return _listed(tag, vr, treatment, options)
    option, why, act = _by_kind(vr, options)
    return _rule(tag, vr, "", option, f"no row: {why}", act)


def _by_kind(vr: str, options: Collection[str]) -> tuple[str, str, Act]:
    """The option that decides, why, and what is done."""
    if vr in _DATES:
        moved = "modified_dates" in options
        return ("modified_dates", "as all dates", _DATES[vr]) if moved else ("", "a date, emptied", actions.empty)
    if vr == "UI":
        kept = "retain_uids" in options
        return ("retain_uids", "a UID, stays", actions.copy_uid) if kept else ("", "a UID, keyed", actions.uid)
    if vr == "SQ":
        return "", "a sequence, cleaned within", actions.inner
    act = _plain(vr)
    if act is None:
        return "", "free text or bulk data that is not on the list of safe ones", actions.drop
    return "", "a number or a code string", act


def _listed(tag: int, vr: str, treatment: str, options: Collection[str]) -> Rule:
    """An attribute of `safe_public.csv`."""
    if treatment == "structured":
        if "clean_structured_content" not in options:
            return _rule(tag, vr, "", "", "no row: free text", actions.drop)
        return _rule(tag, vr, "C", "clean_structured_content", "words of the vocabulary stay", actions.words)
    kinds: dict[str, tuple[str, Act]] = {
        "copy": ("on the list of safe texts", actions.copy_text),
        "words": ("on the list of safe texts: words of the vocabulary stay", actions.words),
        "code": ("a code", actions.code),
        "meaning": ("rewritten from the dictionary by its code", actions.code_meaning),
        "binary": ("on the list of safe tables", actions.binary),
    }
    why, act = kinds[treatment]
    return _rule(tag, vr, "", "", f"no row: {why}", act)
