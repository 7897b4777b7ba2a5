"""Which items of two reporting guidelines a model card answers, and which only people can.

CLAIM 2024 Update: Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300, 44 items.
TRIPOD+AI: Collins et al., BMJ 2024;385:e078378, 27 items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

CLAIM, TRIPOD = "CLAIM 2024", "TRIPOD+AI 2024"


@dataclass(frozen=True)
class Items:
    """Numbers of items, in the order of each guideline."""

    claim: tuple[str, ...] = ()
    tripod: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The items in one line."""
        parts = [f"{name} {', '.join(own)}" for name, own in ((CLAIM, self.claim), (TRIPOD, self.tripod)) if own]
        return "; ".join(parts)


def _items(claim: str = "", tripod: str = "") -> Items:
    return Items(tuple(claim.split()), tuple(tripod.split()))


#: The parts of a card, and the items that each answers as far as a run knows.
PARTS: Mapping[str, Items] = MappingProxyType(
    {
        "study": _items("1 6", "1 4"),
        "use": _items("3", "3b"),
        "model": _items("22 24", "12c 12g 15 22"),
        "data": _items("7 35", "5a 6a 20a 21"),
        "eligibility": _items("8 11 12", "6b 11"),
        "partitions": _items("19 20 32", "12a"),
        "preparation": _items("9", "7"),
        "training": _items("25 26 27", "12c 13"),
        "results": _items("28 29 37", "12d 12e 23a 23b"),
        "subgroups": _items("37", "23a"),
        "calibration": _items("37", "12e 23a"),
        "taking part": _items("35", "20a"),
        "protection": _items("11"),
        "limits": _items("33 40", "26"),
        "software": _items("23 43", "18f"),
    }
)


@dataclass(frozen=True)
class Unstated:
    """What a run does not know, and a person must add; with the items that ask for it."""

    text: str
    items: Items


def _unstated(text: str, claim: str = "", tripod: str = "") -> Unstated:
    return Unstated(text, _items(claim, tripod))


#: What a plan has no place for, in the order of CLAIM.
NOT_STATED = (
    _unstated("an abstract, the clinical background, and known inequalities in health", "2 3", "2 3a 3c"),
    _unstated("the hypotheses, and whether the images were taken before or after the study was planned", "4 5", "4"),
    _unstated("who is responsible for the model, and how to reach them"),
    _unstated("the hospitals, their setting, and the period of acquisition", "7", "5a 5b 6a"),
    _unstated("the patients: age, sex, ethnicity, indication, treatments, in each partition", "36", "6c 20b"),
    _unstated("how patients and images were selected before they came to the sites' stores", "8 10", "6b"),
    _unstated("the acquisition protocols", "13", "9b"),
    _unstated(
        "how the labels or masks were made, by whom, blind to what, and how well readers agree",
        "14 15 16 17 18",
        "8a 8b 8c 9c",
    ),
    _unstated("how the number of patients was chosen", "21", "10"),
    _unstated("why this network, and what else was tried", "22", "9a 12b 12c"),
    _unstated("robustness, sensitivity to choices, and explanations of single answers", "30 31"),
    _unstated("tests on patients of hospitals that took no part in training", "33", "16 20c"),
    _unstated("a threshold for decisions and its reasons, sensitivity and specificity there", "38", "15"),
    _unstated("an analysis of the cases that it gets wrong", "39"),
    _unstated("what was done for fairness, and updates or recalibration after the test", "", "12f 14 24"),
    _unstated("meaning for practice, users and their skill, bad or missing input, uses it was not made for", "41",
              "25 27a 27b 27c"),
    _unstated("ethical approval or the legal basis of using the images; involvement of patients", "", "17 19"),
    _unstated("registration and protocol", "34 42", "18c 18d"),
    _unstated("the licence of the model, and who can have model, code and data", "43", "18e 18f"),
    _unstated("funding, the funders' role, and competing interests", "44", "18a 18b"),
)  # fmt: skip
