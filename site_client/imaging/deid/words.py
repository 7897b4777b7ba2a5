"""Words that may stay: of free text those that describe images, of a code the meaning that its dictionary gives.

Rules:
  * A word stays only if it is in the vocabulary: the meanings of the code dictionary, and `configs/deid/words.txt`.
  * A number stays if it is short and stands alone: two in a row may be a date or a telephone number, one beside "years"
    or "street" an age or an address.
  * A meaning is never that of the file: it is the dictionary's, or else the code itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from importlib.resources import files

from pydicom.sr._concepts_dict import concepts
from pydicom.sr._snomed_dict import mapping

_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.]*")
_SMALL = re.compile(r"(?<![A-Za-z'])[a-z]+(?![A-Za-z])")
_NUMBER = re.compile(r"\d{1,3}(\.\d{1,3})?(mm|cm|ms|s|mg|ml|kv|t)?")
#: A word of the vocabulary with a number beside it: "lesion1".
_NUMBERED = re.compile(r"([a-z]+)\d{1,2}")


@lru_cache(maxsize=1)
def sections() -> dict[str, frozenset[str]]:
    """The sections of `configs/deid/words.txt`: makers, codes, protocols, never."""
    text = files("locum.configs").joinpath("deid", "words.txt").read_text(encoding="utf-8")
    found: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("["):
            name = line.strip("[] ")
        elif line and not line.startswith("#"):
            found.setdefault(name, set()).update(line.split())
    return {name: frozenset(words) for name, words in found.items()}


@lru_cache(maxsize=1)
def common() -> frozenset[str]:
    """Words that name no patient where a scanner writes them: makers and code strings."""
    return sections()["makers"] | sections()["codes"]


@lru_cache(maxsize=1)
def vocabulary() -> frozenset[str]:
    """All words that may stay in a text that is cleaned.

    Of the meanings only words that stand there in small letters: one that never does may be somebody's name (Miller's
    view, the circle of Willis).
    """
    texts = [text for text in _meanings().values() if "breed" not in text]  # of dogs: half of them are surnames
    coded = {word for text in texts for word in _SMALL.findall(text) if len(word) > 2}
    return frozenset(coded | frozenset().union(*sections().values())) - sections()["never"]


@lru_cache(maxsize=1)
def _meanings() -> dict[tuple[str, str], str]:
    """(Coding scheme, code) to meaning: the code dictionary of pydicom, made from PS3.16; of several the shortest."""
    found: dict[tuple[str, str], str] = {}
    for scheme, names in concepts.items():
        for code, (meaning, _) in (item for codes in names.values() for item in codes.items()):
            known = found.get((scheme, code), meaning)
            found[scheme, code] = min(known, meaning, key=lambda text: (len(text), text))
    return found


@lru_cache(maxsize=1)
def schemes() -> frozenset[str]:
    """The coding schemes of the dictionary: their names name no patient."""
    return frozenset(concepts) | {"SRT", "SNM3", "99SDM"}


def meaning(scheme: str, code: str) -> str:
    """What a code means, by its dictionary; the code itself if none knows it."""
    if scheme in {"SRT", "99SDM", "SNM3"}:
        scheme, code = "SCT", mapping["SRT"].get(code, code)
    return _meanings().get((scheme, code), code)[:64]


def cleaned(text: str, names: Collection[str] = ()) -> str:
    """The words of a text that may stay, one blank between them; `names` (in small letters) never do."""
    tokens = [(token, _kind(token.lower(), names)) for token in _TOKEN.findall(text)]
    kept = []
    for at, (token, kind) in enumerate(tokens):
        neighbours = {tokens[other][1] for other in (at - 1, at + 1) if 0 <= other < len(tokens)}
        if kind == "word" or (kind == "number" and not neighbours & {"number", "long", "never"}):
            kept.append(token)
    return " ".join(kept)


def _kind(token: str, names: Collection[str]) -> str:
    token = token.strip(".")
    numbered = _NUMBERED.fullmatch(token)
    bare = numbered[1] if numbered else token
    if token in names or bare in names:
        return "name"
    if token in sections()["never"]:
        return "never"
    if token in vocabulary() or bare in vocabulary():
        return "word"
    if _NUMBER.fullmatch(token):
        return "number"
    return "long" if token[:1].isdigit() else "name"
