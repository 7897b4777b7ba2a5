"""Which numbers of patients may be told, beside all those that were told before.

Rules:
  * A cell of fewer than k patients, none included, is not told: none looks like a few.
  * The patients of the cells that were too small are never what carries a number: no number may need them.
  * A number is told only if no combination of it with the others depends on groups of fewer than k patients alone, and
    if a catalog without any such group would give the same numbers, its other groups still of k or more. So from all
    numbers together nobody can show that such a group has anybody in it. A group is the patients of the same cells.
  * What this does not hold for is not told: neither a number that follows from the others, nor one that nearly does.
    Whether nobody or a few make the difference must look the same.

It is how cells cut the patients apart, not how large they are, that a tracker uses (Denning, Denning and Schwartz, The
tracker, ACM TODS 4, 1979). Linear combinations of counts are audited as by Chin and Özsoyoğlu (Auditing and inference
control in statistical databases, IEEE TSE 8, 1982). That a refusal must not tell what it hides: Kenthapadi, Mishra and
Nissim, Simulatable auditing, PODS 2005.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

#: Rows are cells, columns patients.
Cells = NDArray[np.bool_]
_Floats = NDArray[np.float64]
#: Cells whose membership fits into one number.
_AT_ONCE = 32
#: Whether whole patients give the numbers is looked for so long; what is not found by then is not told.
_MOST_SECONDS = 20.0
_NEARLY = 1e-6
#: Products of numbers below it fit into 64 bits.
_PRIME = (1 << 31) - 1


@dataclass(frozen=True)
class Verdict:
    """What becomes of a cell.

    Attributes:
        state: `told`, or why not: `small`, or `withheld` for what follows from it.
        patients: the number, if it is told.
    """

    state: Literal["told", "small", "withheld"]
    patients: int | None = None


def judged(told: Cells, tainted: NDArray[np.bool_], asked: Cells, least: int) -> list[Verdict]:
    """What becomes of each cell of a table, in order.

    Args:
        told: the cells whose numbers were told, of all questions before.
        tainted: the patients who were in a cell that was too small, before or now.
        asked: the cells of the table.
        least: k.
    """
    sizes = asked.sum(axis=1)
    standing = _Standing.of(told, tainted, least)
    verdicts = [Verdict("withheld" if size >= least else "small") for size in sizes]
    for index in _admitted(standing, asked, [index for index, size in enumerate(sizes) if size >= least]):
        verdicts[index] = Verdict("told", int(sizes[index]))
    return verdicts


def _admitted(standing: _Standing, asked: Cells, wanted: list[int]) -> list[int]:
    """Which of the wanted cells may be told, the first ones first; tried together, and in halves if they may not."""
    waiting, found = [wanted] if wanted else [], list[int]()
    while waiting:
        some = waiting.pop()
        after = standing.with_cells(asked[some])
        if after.may_follow(standing):
            standing = after
            found += some
        elif len(some) > 1:
            half = len(some) // 2
            waiting += [some[half:], some[:half]]
    return found


# --- groups


@dataclass(frozen=True)
class _Standing:
    """The cells that were told, and the groups into which they cut the patients.

    Attributes:
        tainted: the patients who count for no group.
        least: k.
        group: of each patient the number of the group.
        rows: a row a cell, a column a group: whether the group is in the cell.
        counts: the numbers of the cells.
    """

    tainted: NDArray[np.bool_]
    least: int
    group: NDArray[np.int64]
    rows: NDArray[np.bool_]
    counts: _Floats

    @classmethod
    def of(cls, told: Cells, tainted: NDArray[np.bool_], least: int) -> _Standing:
        """After these cells."""
        people = told.shape[1]
        nothing = np.zeros((0, 1), dtype=np.bool_)
        return cls(tainted, least, np.zeros(people, dtype=np.int64), nothing, np.zeros(0)).with_cells(told)

    def with_cells(self, cells: Cells) -> _Standing:
        """After some more."""
        group, rows = self.group, self.rows
        for start in range(0, len(cells), _AT_ONCE):
            some = cells[start : start + _AT_ONCE]
            bits = np.int64(1) << np.arange(len(some), dtype=np.int64)
            kinds, kind = np.unique(bits @ some.astype(np.int64), return_inverse=True)
            pairs, group = np.unique(group * len(kinds) + kind.ravel(), return_inverse=True)
            group = group.ravel()
            added = (kinds[pairs % len(kinds)] & bits[:, None]) > 0
            rows = np.vstack([rows[:, pairs // len(kinds)], added])
        return _Standing(self.tainted, self.least, group, rows, np.append(self.counts, cells.sum(axis=1)))

    @cached_property
    def large(self) -> _Floats:
        """The columns of groups of k or more who are not tainted, and in a cell."""
        free = np.bincount(self.group, weights=~self.tainted, minlength=self.rows.shape[1])
        return self.rows[:, (free >= self.least) & self.rows.any(axis=0)].astype(np.float64)

    def may_follow(self, before: _Standing) -> bool:
        """Whether what came after `before` may be told."""
        known = len(before.rows)
        if _rank(self.large) < _rank(self.large[:known]) + len(self.rows) - known:
            return False
        return self._explained(known)

    def _explained(self, known: int) -> bool:
        """Whether large groups alone give the numbers: of the new cells exactly, of the old as well as without the new.

        What was told before may need a group that has become small since: that is not told anew.
        """
        gap = self._gap(len(self.rows), known)
        if gap is None or gap < 0.5:
            return gap is not None
        before = self._gap(known, known)
        return before is not None and gap <= before + 0.5

    def _gap(self, cells: int, known: int) -> float | None:
        """By how many patients large groups that stay so must miss the first `known` numbers; None if another too.

        Of whole patients: halves would hide that a sum is odd, which tells of a small group. None if it takes too long.
        """
        rows, counts = self.large[:cells], self.counts[:cells]
        if rows.shape[1] == 0:
            return None if cells > known else float(counts.sum())
        found = _least_missed(rows, counts, known, self.least, whole=False)
        if found is None or _is_whole(found):
            return None if found is None else float(found[rows.shape[1] :].sum())
        found = _least_missed(rows, counts, known, self.least, whole=True)
        return None if found is None else float(found[rows.shape[1] :].sum())


def _least_missed(rows: _Floats, counts: _Floats, known: int, least: int, *, whole: bool) -> _Floats | None:
    """Patients of each group, `least` or more, and by how many the first `known` counts are missed, up and down."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, eye, hstack

    slack = eye(len(rows), known)
    groups, slacks = np.ones(rows.shape[1]), np.ones(2 * known)
    found: Any = milp(
        np.concatenate([0 * groups, slacks]),
        constraints=LinearConstraint(hstack([csr_matrix(rows), slack, -slack], format="csc"), counts, counts),
        bounds=Bounds(np.concatenate([least * groups, 0 * slacks]), np.inf),
        integrality=np.concatenate([groups, 0 * slacks]) * whole,
        options={"time_limit": _MOST_SECONDS},
    )
    return found.x if found.status == 0 else None


def _is_whole(numbers: _Floats) -> bool:
    return bool(np.all(np.abs(numbers - np.rint(numbers)) < _NEARLY))


def _rank(rows: _Floats) -> int:
    """The rank of rows of zeros and ones, exact but for a prime that divides by chance: then too low, which is safe."""
    left = np.rint(rows @ rows.T).astype(np.int64)  # of the same rank
    rank = 0
    for column in range(len(left)):
        pivots = np.flatnonzero(left[rank:, column])
        if len(pivots):
            left[[rank, rank + pivots[0]]] = left[[rank + pivots[0], rank]]
            row = left[rank] * pow(int(left[rank, column]), -1, _PRIME) % _PRIME
            left[rank + 1 :] = (left[rank + 1 :] - left[rank + 1 :, column, None] * row) % _PRIME
            rank += 1
    return rank


def no_cells(patients: int) -> Cells:
    """No cell of so many patients."""
    return np.zeros((0, patients), dtype=np.bool_)


def stacked(cells: Sequence[NDArray[np.bool_]], patients: int) -> Cells:
    """Cells as rows."""
    return np.vstack(cells) if cells else no_cells(patients)
