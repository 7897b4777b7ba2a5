"""Who has read every answer of a site and knows which patients cannot exist: what follows from the numbers.

He knows of every cell that was asked which others it can overlap with (more than anybody could: exactly those
combinations that there are), and all numbers that were told. What he learns of a group is the least and the most that a
linear programme over the combinations leaves possible.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy.optimize import linprog

People = frozenset[str]


@dataclass(frozen=True)
class Cell:
    """A cell that was asked, who was in it then, and what was told of it."""

    people: People
    told: int | None


def least(cells: Sequence[Cell], target: People, most: dict[People, int] | None = None) -> float:
    """The least number of patients that `target` can have had; `most` bounds cells of which nothing was told."""
    everybody = sorted(frozenset[str]().union(target, *(cell.people for cell in cells)))
    bounded = most or {}
    named = [*(cell.people for cell in cells), *bounded, target]
    signatures = {person: tuple(person in people for people in named) for person in everybody}
    kinds = sorted(set(signatures.values()))
    told = [(index, cell.told) for index, cell in enumerate(cells) if cell.told is not None]
    caps = list(enumerate(bounded.values(), start=len(cells)))
    found = linprog(
        [float(kind[-1]) for kind in kinds],
        A_eq=np.array([[float(kind[index]) for kind in kinds] for index, _ in told]) if told else None,
        b_eq=[number for _, number in told] if told else None,
        A_ub=np.array([[float(kind[index]) for kind in kinds] for index, _ in caps]) if caps else None,
        b_ub=[number for _, number in caps] if caps else None,
        bounds=(0, None),
        method="highs",
    )
    assert found.status == 0, found.message
    return float(found.fun)


def small_groups(cells: Sequence[Cell], k: int) -> Iterator[People]:
    """Groups of 1 to k − 1 patients that somebody could ask about: cells, what two cells have in common or not."""
    seen: set[People] = set()
    told = {cell.people for cell in cells if cell.told is not None}
    candidates: list[Collection[str]] = [cell.people for cell in cells]
    for one, other in permutations(told, 2):
        candidates += [one & other, one - other]
    for one in told:
        inside = frozenset[str]().union(*(other for other in told if other < one))
        candidates.append(one - inside)
    for group in map(frozenset, candidates):
        if 0 < len(group) < k and group not in seen:
            seen.add(group)
            yield group
