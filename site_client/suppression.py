"""Numbers of patients that a site may tell: none of a few, none of nobody, and none from which such a number follows.

Rules:
  * A number is rounded down to a multiple of the least cell. A smaller one is not told: none and few look alike.
  * Each grouping divides the same patients, so the total and what is told of one grouping bound what is not told of
    another. Whether anybody is left over must stay open: the total is lowered until it does, and then what exceeds the
    total (complementary suppression; Hundepool et al., Statistical Disclosure Control, 2012, chapter 4).
  * If others know that a threshold was reached and that alone would tell too much beside the rest, the rest is not
    told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

By = TypeVar("By", bound=str)
#: Of a grouping, by value, a number; None is not told.
Cells = Mapping[str, int | None]


class Told(NamedTuple, Generic[By]):
    """What may be told.

    Attributes:
        patients: of all; a multiple of the least cell, or None.
        groups: by grouping and value, likewise; empty where nothing at all may be told.
    """

    patients: int | None
    groups: dict[By, dict[str, int | None]]


def rounded(count: int, least: int) -> int | None:
    """A number as it may be told by itself."""
    return count - count % least if count >= least else None


def told(patients: int, groups: Mapping[By, Mapping[str, int]], least: int, *, reached: int = 0) -> Told[By]:
    """What may be told of groupings of the same patients.

    Args:
        patients: of all.
        groups: by grouping and value, how many; the values of a grouping sum to `patients`.
        least: the least cell, L.
        reached: a number that others know `patients` to have reached.
    """
    cells = {by: {value: rounded(count, least) for value, count in values.items()} for by, values in groups.items()}
    total = rounded(patients, least) or 0
    most = min((_most(values, least) for values in groups.values()), default=total)
    if -(-reached // least) * least > most:
        return Told(None, {by: {} for by in groups})
    total = min(total, most)
    total -= total % least
    return Told(total or None, {by: _within(values, total, least) for by, values in cells.items()})


def _most(values: Mapping[str, int], least: int) -> int:
    """The largest total that leaves open whether anybody has a value that is not told, in this grouping or another."""
    large = [count - count % least for count in values.values() if count >= least]
    spare = len(large) if len(large) < len(values) else len(large) - 1
    return sum(large) + spare * (least - 1)


def _within(cells: Mapping[str, int | None], total: int, least: int) -> dict[str, int | None]:
    """The cells, the largest of them lowered until they are no more than the total."""
    found = dict(cells)
    while (excess := sum(count or 0 for count in found.values()) - total) > 0:
        value = max((value for value in found if found[value]), key=lambda value: (found[value] or 0, value))
        count = found[value] or 0
        found[value] = max(count - excess, least) if count > least else None
    return found
