"""Who the training patients are, as far as a catalog knows: sex, age band, and the maker of the scanner.

Rules:
  * A patient has one value in each grouping, that of the first image by its name, so that a grouping divides them.
  * What is not known is the value `unknown`. A maker is one of a short list, or `other`: no text of a header is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from locum.common.envelope import Group
from locum.common.plan import AGE_BANDS
from locum.site_client.imaging.catalog import Facts

UNKNOWN, OTHER = "unknown", "other"
SEXES = ("F", "M", "O")
#: Makers of scanners, each with the beginnings of what they write into Manufacturer (0008,0070), in small letters.
MAKERS: Mapping[str, tuple[str, ...]] = {
    "Agfa": ("agfa",),
    "Canon": ("canon", "toshiba"),
    "Carestream": ("carestream", "kodak", "eastman"),
    "Esaote": ("esaote",),
    "Fujifilm": ("fuji", "hitachi"),
    "GE": ("ge ", "ge_", "ge-", "general electric", "gems", "imatron"),
    "Hologic": ("hologic", "lorad"),
    "Konica Minolta": ("konica", "minolta"),
    "Mindray": ("mindray",),
    "Neusoft": ("neusoft",),
    "Philips": ("philips", "marconi", "picker", "adac"),
    "Samsung": ("samsung", "medison", "neurologica"),
    "Shimadzu": ("shimadzu",),
    "Siemens": ("siemens", "acuson", "cti"),
    "United Imaging": ("uih", "united imaging"),
}

_STARTS = tuple(int(band.split("-")[0].rstrip("+")) for band in AGE_BANDS)


@dataclass(frozen=True)
class Person:
    """One training patient.

    Attributes:
        sex: F, M, O or unknown.
        age: one of AGE_BANDS, or unknown.
        manufacturer: as the header has it, without the spaces around it; `maker` as it may be told.
    """

    sex: str
    age: str
    manufacturer: str
    maker: str


def person(facts: Facts) -> Person:
    """What an image says of its patient."""
    written = facts.manufacturer.strip()
    return Person(facts.sex if facts.sex in SEXES else UNKNOWN, band_of(facts.age), written, maker_of(written))


def band_of(age: int | None) -> str:
    """The age band of a number of years."""
    if age is None or age < 0:
        return UNKNOWN
    return AGE_BANDS[sum(start <= age for start in _STARTS) - 1]


def maker_of(manufacturer: str) -> str:
    """The maker that a header's words stand for."""
    words = manufacturer.strip().casefold()
    if not words:
        return UNKNOWN
    return next((maker for maker, begins in MAKERS.items() if f"{words} ".startswith(begins)), OTHER)


def groups(people: Iterable[Person]) -> dict[Group, dict[str, int]]:
    """How many have each value of each grouping; values that nobody has are there too, but for makers."""
    everybody = list(people)
    by_sex, by_age = Counter(one.sex for one in everybody), Counter(one.age for one in everybody)
    by_maker = Counter(one.maker for one in everybody)
    return {
        "sex": {value: by_sex[value] for value in (*SEXES, UNKNOWN)},
        "age": {value: by_age[value] for value in (*AGE_BANDS, UNKNOWN)},
        "manufacturer": {value: by_maker[value] for value in (*MAKERS, OTHER, UNKNOWN)},
    }
