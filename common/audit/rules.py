"""What a check is: a number, a title, and what must hold at an entry and at the end.

Rules:
  * A check looks at the entries in their order and at what stood before each. It changes nothing.
  * What does not hold is told once, at the first entry at which it does not: what is found, and what that means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from locum.common.audit.standing import Standing

#: What must hold when an entry comes, after those before it; raises Wrong.
AtEntry = Callable[[Standing, Any], None]
#: What must hold at the end; in words, what was found. Raises Wrong.
AtEnd = Callable[[Standing], str]


class Wrong(Exception):
    """Something that does not hold.

    Attributes:
        what: what was found, one sentence without its end.
        means: what that means, one sentence without its end.
        entry: the number of the entry that is to blame, from 0; None for the one that is looked at, or for none.
    """

    def __init__(self, what: str, means: str, entry: int | None = None) -> None:
        super().__init__(what, means, entry)
        self.what = what
        self.means = means
        self.entry = entry


@dataclass(frozen=True)
class Rule:
    """A check of what the log says.

    Attributes:
        number: by which the page on the bundle describes it.
        title: what holds if it does.
        at_entry: by kind of entry; those of other runs are not asked about.
        at_end: after the last entry.
    """

    number: int
    title: str
    at_end: AtEnd = field(repr=False)
    at_entry: Mapping[type, AtEntry] = field(default_factory=dict, repr=False)


def some(names: object) -> str:
    """Names for a sentence."""
    return ", ".join(map(str, names)) if isinstance(names, list | tuple | set | frozenset | dict) else str(names)


def shown(text: str, most: int = 2000) -> str:
    """Text out of a bundle for a person: no more than a page, and nothing that a terminal takes for a command."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:most])
