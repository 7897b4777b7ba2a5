"""What a PACS is to the loop that retrieves from it, whatever it speaks.

Rules:
  * UIDs here are the PACS's own; they stay in memory, and nothing that is written or told holds one.
  * What trying again may mend is an :class:`AwayError`; what concerns one series alone is a :class:`SeriesError`; a
    refusal that a person has to mend is a DataError at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Protocol

from locum.common.errors import RunError
from locum.site_client.imaging.sources import Query

#: An instance larger than this is not taken: it would have to be held in memory.
MAX_INSTANCE = 512 << 20
#: PS3.5 9.1, without its ban on leading zeros, which real UIDs break.
_UID = re.compile(r"[0-9][0-9.]{0,63}")

#: Takes one instance as a Part 10 file (PS3.10), and returns when there is room for the next.
Take = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Study:
    """A study that a query names.

    Attributes:
        said: NumberOfStudyRelatedInstances, or None if it is not told.
        accession: its accession number, if it is told; `asked` is the one that was asked for, if one was.
    """

    uid: str
    said: int | None = None
    day: date | None = None
    accession: str = ""
    asked: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """A series of a study; `said` is NumberOfSeriesRelatedInstances; what is not told is empty or None."""

    study: str
    uid: str
    modality: str = ""
    body_part: str = ""
    said: int | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance of a series."""

    uid: str
    sop_class: str = ""


@dataclass(frozen=True, slots=True)
class Want:
    """What is to be fetched: a series, or single instances of it."""

    series: Series
    instances: tuple[Instance, ...] | None = None


class AwayError(RunError):
    """The PACS does not answer as it should now; it may a little later.

    Attributes:
        wait: seconds that it asks to be left alone.
    """

    def __init__(self, message: str, remedy: str, *, wait: float = 0.0) -> None:
        super().__init__(message, remedy)
        self.wait = wait


class SeriesError(Exception):
    """One series is not given, or not as it should be; the text names no patient and no UID."""


class Pacs(Protocol):
    """A PACS. Every method may raise DataError and AwayError; those of one series SeriesError.

    Attributes:
        name: host and port, for a person.
        at_once: how many fetches may run at the same time, each in a thread of its own.
        when_nothing_comes: what to do if it names series and gives none.
    """

    name: str
    at_once: int
    when_nothing_comes: str

    def greet(self) -> None:
        """Find out whether it answers and lets this site in."""

    def studies(self, query: Query) -> Iterator[Study]:
        """The studies that a query names, perhaps several times, and perhaps others (see `query.py`)."""

    def series(self, study: Study) -> Sequence[Series]:
        """All series of a study."""

    def instances(self, series: Series) -> Sequence[Instance]:
        """All instances of a series; none if it does not answer at this level."""

    def fetch(self, want: Want, take: Take) -> None:
        """Hand over each instance as it comes. Returning says that all came that it would give."""

    def close(self) -> None:
        """Take leave."""


def proper_uid(text: str, pacs: str) -> str:
    """A UID as a PACS gives it; it becomes part of addresses and identifiers.

    Raises:
        AwayError: it is none.
    """
    if not _UID.fullmatch(text):
        raise AwayError(f"{pacs} answers a query with something that is no UID", "ask its vendor")
    return text


def day_of(written: str) -> date | None:
    """A date (DA) as a PACS gives it, or None."""
    try:
        return datetime.strptime(written, "%Y%m%d").date()
    except ValueError:
        return None
