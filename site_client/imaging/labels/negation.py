"""Whether a finding that a report names is there: affirmed, negated or possible; now or then; in the patient or not.

The method is NegEx (Chapman et al., J Biomed Inform 34, 2001) with the further questions of ConText (Harkema et al.,
J Biomed Inform 42, 2009): words before or after a finding decide, up to where their scope ends.

Rules:
  * The words are data (`configs/terminology/negation.en.yaml`): another language is another file.
  * At each place the longest phrase counts, and each word counts once: "no increase in" is no negation of what follows.
  * A scope ends with the sentence, at a word that ends it, at the next heading, and after so many words.
  * Of two scopes that both reach a finding, the nearer decides whether it is there.
  * Words inside the finding itself say nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from locum.common.errors import DataError
from locum.common.yaml_source import YamlError, parse_yaml, read_yaml

Certainty = Literal["affirmed", "negated", "possible"]
Temporality = Literal["recent", "historical", "hypothetical"]
Experiencer = Literal["patient", "other"]

Span = tuple[int, int]

_STRICT = ConfigDict(extra="forbid", frozen=True)
_Phrase = Annotated[str, StringConstraints(min_length=1)]
#: A word, with what hyphens, strokes and apostrophes join to it, or a mark.
_WORD = re.compile(r"-ve\b|\w+(?:['/-]\w+)*|[^\w\s]")
#: What ends a sentence: a full stop and the like before a new beginning, or an empty line.
_STOP = re.compile(
    r"""(?<![.!?])[.!?]++["')\]]*+(?=\s++["'(\[*]*+[\w*]|\s*+$)|\n\s*\n|\n(?=[ \t]*+(?:[-*•]|\d{1,3}[.)])\s)"""
)
#: The word before a full stop.
_BEFORE = re.compile(r"[^\s(\[\"']{1,16}$")
#: How much of a sentence is looked at on each side of a finding: characters, more than the widest window has.
_SIDE = 600
#: A heading: up to five words with a colon, which begin a line or a sentence, or follow a wide gap.
_HEADING = re.compile(r"(?:^[ \t]*+|(?<=[.;]\s)|(?<=\s\s))(?P<name>[A-Z][A-Za-z/()&' -]{1,48}?):(?=\s|$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Status:
    """What a report says of one mention of a finding."""

    certainty: Certainty = "affirmed"
    temporality: Temporality = "recent"
    experiencer: Experiencer = "patient"


class Sides(BaseModel):
    """Phrases that stand before a finding, and those that stand after it."""

    model_config = _STRICT
    before: tuple[_Phrase, ...] = ()
    after: tuple[_Phrase, ...] = ()


class Ends(BaseModel):
    """Phrases at which the scopes of the words of a kind end; `certainty` is for negated and possible."""

    model_config = _STRICT
    certainty: tuple[_Phrase, ...] = ()
    historical: tuple[_Phrase, ...] = ()
    hypothetical: tuple[_Phrase, ...] = ()
    someone_else: tuple[_Phrase, ...] = ()


class Words(BaseModel):
    """The words of a language, as its file has them.

    Attributes:
        window: words that may stand between a phrase and the finding.
        nothing: phrases that contain one of the others and do not say what it says.
        abbreviations: words whose full stop ends no sentence.
        skipped_sections: headings of the parts of a report that tell no finding of this study.
    """

    model_config = _STRICT
    name: str
    version: str
    language: str
    window: Annotated[int, Field(ge=1, le=60)] = 40
    negated: Sides
    possible: Sides
    evidence: Sides
    historical: Sides
    hypothetical: Sides
    someone_else: Sides
    nothing: tuple[_Phrase, ...] = ()
    ends: Ends
    abbreviations: tuple[str, ...] = ()
    skipped_sections: tuple[str, ...] = ()


#: A kind of word and the side of the finding on which it stands; or `end`, and of which scopes.
_Use = tuple[str, str]


@dataclass(slots=True)
class _Tree:
    """Phrases that begin with the same words.

    Attributes:
        below: by the next word.
        uses: what the phrase that ends here is; None if none ends here.
    """

    below: dict[str, _Tree] = field(default_factory=dict)
    uses: frozenset[_Use] | None = None

    def leaf(self, phrase: str) -> _Tree:
        """Where a phrase ends."""
        branch = self
        for word in _WORD.findall(phrase):
            branch = branch.below.setdefault(word, _Tree())
        return branch


@dataclass(frozen=True, slots=True)
class _Found:
    """A phrase in a sentence: what it is, and where."""

    uses: frozenset[_Use]
    start: int
    end: int


_KINDS = ("negated", "possible", "evidence", "historical", "hypothetical", "someone_else")


class Rules:
    """Words, made ready to be looked for."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self._tree = _tree(words)
        self._skipped = frozenset(words.skipped_sections)

    def status(self, sentence: str, concept: str) -> Status | None:
        """What a sentence says of the first mention of a finding; None if it does not mention it."""
        found = re.search(_pattern(plain(concept)), _lower(sentence))
        return self.at(sentence, found.span()) if found else None

    def at(self, text: str, span: Span) -> Status:
        """What a text says of the finding that stands at `span` (start, end), in characters."""
        sentences = list(self._sentences(text))
        start = max((first for first, _ in sentences if first <= span[0]), default=0)
        end = min((last for _, last in sentences if last >= span[1]), default=len(text))
        return self._within(text[start:end], (span[0] - start, span[1] - start))

    def mentions(self, report: str, phrases: re.Pattern[str]) -> Iterator[tuple[str, Status]]:
        """Each mention of a phrase in the sections of a report that tell of this study, and its status.

        `phrases` is what :func:`looked_for` made.
        """
        for section in self._sections(report):
            for start, end in self._sentences(section):
                sentence = section[start:end]
                for found in phrases.finditer(_lower(sentence)):
                    yield plain(found[0]), self._within(sentence, found.span())

    def _sections(self, report: str) -> Iterator[str]:
        """The parts of a report between headings, the heading included, without those to be skipped."""
        starts = [(found.start("name"), found["name"]) for found in _HEADING.finditer(report)]
        cuts = [0, *(start for start, _ in starts), len(report)]
        names = ["", *(" ".join(name.lower().split()) for _, name in starts)]
        for name, start, end in zip(names, cuts[:-1], cuts[1:], strict=True):
            if name not in self._skipped and start < end:
                yield report[start:end]

    def _sentences(self, text: str) -> Iterator[Span]:
        """Where the sentences of a text begin and end."""
        start = 0
        for stop in _STOP.finditer(text):
            word = _BEFORE.search(text, max(start, stop.start() - 17), stop.start())
            if word is None or not self._is_short(word[0].lower(), first=not text[start : word.start()].strip()):
                yield start, stop.end()
                start = stop.end()
        if start < len(text):
            yield start, len(text)

    def _is_short(self, word: str, *, first: bool) -> bool:
        """Whether the full stop after a word ends no sentence: an abbreviation, or the number or letter of a list."""
        return word in self.words.abbreviations or (first and (len(word) == 1 or word.isdecimal()))

    def _within(self, sentence: str, span: Span) -> Status:
        first = max(0, span[0] - _SIDE)
        sentence = sentence[first : span[1] + _SIDE]
        start, end = span[0] - first, span[1] - first
        masked = _lower(sentence[:start]) + "\0" * (end - start) + _lower(sentence[end:])
        reach = _Reach(masked, (start, end), tuple(self._found(masked)), self.words.window)
        other = reach.nearest("someone_else", "someone_else") is not None
        return Status(_certainty(reach), _temporality(reach), "other" if other else "patient")

    def _found(self, sentence: str) -> Iterator[_Found]:
        """The phrases of a sentence, from left to right, the longest at each place; none overlaps another."""
        words = list(_WORD.finditer(sentence))
        at = 0
        while at < len(words):
            length, uses = _longest(self._tree, words, at)
            if uses:
                yield _Found(uses, words[at].start(), words[at + length - 1].end())
            at += max(1, length)


def _longest(tree: _Tree, words: Sequence[re.Match[str]], at: int) -> tuple[int, frozenset[_Use]]:
    """How many words the longest phrase has that begins at a word, and what it is; none has no words."""
    length, uses, branch = 0, frozenset[_Use](), tree
    for number, word in enumerate(words[at:], start=1):
        below = branch.below.get(word[0])
        if below is None:
            break
        branch = below
        if branch.uses is not None:
            length, uses = number, branch.uses
    return length, uses


def _certainty(reach: _Reach) -> Certainty:
    """The nearest of negation, doubt and evidence; evidence that a negation reaches is none."""
    near: list[tuple[int, int, Certainty]] = []
    if (negated := reach.nearest("negated")) is not None:
        near.append((negated, 0, "negated"))
    if (possible := reach.nearest("possible")) is not None:
        near.append((possible, 1, "possible"))
    if (evidence := reach.evidence()) is not None:
        near.append((evidence[0], 2, "negated" if evidence[1] else "possible"))
    return min(near)[2] if near else "affirmed"


def _temporality(reach: _Reach) -> Temporality:
    if reach.nearest("hypothetical", "hypothetical") is not None:
        return "hypothetical"
    return "recent" if reach.nearest("historical", "historical") is None else "historical"


@dataclass(frozen=True)
class _Reach:
    """Which of the phrases of a sentence reach the finding at `span`."""

    sentence: str
    span: Span
    found: Sequence[_Found]
    window: int

    def nearest(self, kind: str, ends: str = "certainty") -> int | None:
        """The characters between the finding and the nearest phrase of a kind that reaches it; None if none does."""
        distances = [self._distance(each, kind, ends) for each in self.found]
        return min((each for each in distances if each is not None), default=None)

    def evidence(self) -> tuple[int, bool] | None:
        """Of the nearest word for evidence that reaches the finding: the distance, and whether it is negated."""
        near = [
            (gap, each) for each in self.found if (gap := self._distance(each, "evidence", "certainty")) is not None
        ]
        if not near:
            return None
        gap, word = min(near, key=lambda pair: pair[0])
        of_word = _Reach(self.sentence, (word.start, word.end), self.found, self.window)
        return gap, of_word.nearest("negated") is not None

    def _distance(self, phrase: _Found, kind: str, ends: str) -> int | None:
        start, end = self.span
        if (kind, "before") in phrase.uses and phrase.end <= start:
            return self._gap(phrase.end, start, ends)
        if (kind, "after") in phrase.uses and phrase.start >= end:
            return self._gap(end, phrase.start, ends)
        return None

    def _gap(self, start: int, end: int, ends: str) -> int | None:
        between = self.sentence[start:end]
        if len(between.split()) > self.window or ":" in between.strip().removeprefix(":"):
            return None
        if any(("end", ends) in each.uses and start <= each.start < end for each in self.found):
            return None
        return end - start


def plain(phrase: str) -> str:
    """A phrase as it is compared: lower case, one blank between words, straight apostrophes."""
    return " ".join(_lower(phrase).split())


def looked_for(phrases: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds whole words only, the longest phrase first, with any white space between its words."""
    listed = sorted(map(plain, phrases), key=len, reverse=True)
    return re.compile("|".join(_pattern(phrase) for phrase in listed))


def rules(file: Path | None = None) -> Rules:
    """The rules by the words of a file; by those that ship for English unless told.

    Raises:
        DataError: the file cannot be read or is not as described.
    """
    if file is None:
        return _shipped()
    try:
        document = read_yaml(file)
    except OSError as error:
        raise DataError(
            f"the words {file} cannot be read: {error.strerror}", "check the path in the site file"
        ) from None
    except YamlError as error:
        raise DataError(f"the words {file} are no YAML: {error}", "mend that line") from None
    try:
        return Rules(Words.model_validate(document.data))
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        line, key = document.line(first["loc"]), ".".join(map(str, first["loc"])) or "the file as a whole"
        raise DataError(f"{file}, line {line}, {key}: {first['msg']}", "mend it in the file") from None


@lru_cache(maxsize=1)
def _shipped() -> Rules:
    path = files("locum.configs").joinpath("terminology", "negation.en.yaml")
    return Rules(Words.model_validate(parse_yaml(path.read_bytes(), path.name).data))


def _tree(words: Words) -> _Tree:
    """All phrases of the language, word by word."""
    tree = _Tree()
    for use, phrase in _each_use(words):
        leaf = tree.leaf(phrase)
        leaf.uses = (leaf.uses or frozenset()) | {use}
    for phrase in _all(words.nothing):
        tree.leaf(phrase).uses = frozenset()
    return tree


def _each_use(words: Words) -> Iterator[tuple[_Use, str]]:
    for kind in _KINDS:
        sides: Sides = getattr(words, kind)
        for side in ("before", "after"):
            yield from (((kind, side), phrase) for phrase in _all(getattr(sides, side)))
    for kind, listed in words.ends:
        yield from ((("end", kind), phrase) for phrase in _all(listed))


def _all(written: Iterable[str]) -> Iterator[str]:
    """Every phrase that is meant: a word may be several, a|b, and one of them may be empty."""
    for phrase in written:
        for choice in product(*(word.split("|") for word in phrase.split())):
            text = " ".join(filter(None, choice))
            if text:
                yield text


def _pattern(phrase: str) -> str:
    """A regular expression for a phrase: whole words, any white space between them."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    before = r"(?<!\w)" if phrase[:1].isalnum() else ""
    after = r"(?!\w)" if phrase[-1:].isalnum() else ""
    return f"{before}{words}{after}"


def _lower(text: str) -> str:
    """Lower case, character for character, with straight apostrophes."""
    return "".join(low if len(low := char.lower()) == 1 else char for char in text.replace("’", "'"))
