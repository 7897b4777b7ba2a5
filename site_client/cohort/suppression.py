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
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

#: Rows are cells, columns patients.
Cells = NDArray[np.bool_]
_Floats = NDArray[np.float64]


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
    large = [index for index, size in enumerate(sizes) if size >= least]
    verdicts = {index: Verdict("small") for index in range(len(asked)) if index not in set(large)}
    if _may(told, tainted, asked[large], least):
        verdicts |= {index: Verdict("told", int(sizes[index])) for index in large}
        return [verdicts[index] for index in range(len(asked))]
    for index in large:
        cell = asked[index : index + 1]
        if _may(told, tainted, cell, least):
            verdicts[index] = Verdict("told", int(sizes[index]))
            told = np.vstack([told, cell])
        else:
            verdicts[index] = Verdict("withheld")
    return [verdicts[index] for index in range(len(asked))]


# --- groups


@dataclass(frozen=True)
class _Groups:
    """The groups that are large: in which of the cells each is, and the numbers of the cells."""

    rows: _Floats
    counts: _Floats


def _groups(cells: Cells, tainted: NDArray[np.bool_], least: int) -> _Groups:
    """Groups with `least` patients or more who were in no cell that was too small."""
    packed = np.ascontiguousarray(np.packbits(cells, axis=0).T)
    _, first, of = np.unique(packed.view([("", packed.dtype, packed.shape[1])]), return_index=True, return_inverse=True)
    free = np.bincount(of.ravel(), weights=~tainted, minlength=len(first))
    large = first[free >= least]
    rows = cells[:, large].astype(np.float64)
    return _Groups(rows[:, rows.any(axis=0)], cells.sum(axis=1).astype(np.float64))


def _may(told: Cells, tainted: NDArray[np.bool_], new: Cells, least: int) -> bool:
    """Whether all of the new cells may be told as they are."""
    if not len(new):
        return True
    groups = _groups(np.vstack([told, new]), tainted, least)
    known = len(told)
    if _rank(groups.rows) < _rank(groups.rows[:known]) + len(new):
        return False
    return _explained(groups, known, least)


def _rank(rows: _Floats) -> int:
    return int(np.linalg.matrix_rank(rows)) if rows.size else 0


def _explained(groups: _Groups, known: int, least: int) -> bool:
    """Whether large groups alone give the numbers: of the new cells to one, of those before as well as without the new.

    What was told before may need a group that has become small since: that is not told anew.
    """
    gap = _gap(groups.rows, groups.counts, known, least)
    if gap is None or gap < 0.5:
        return gap is not None
    before = _gap(groups.rows[:known], groups.counts[:known], known, least)
    return before is not None and gap <= before + 0.5


def _gap(rows: _Floats, counts: _Floats, known: int, least: int) -> float | None:
    """By how many patients large groups that stay large must miss the first `known` numbers; None if another too."""
    from scipy.optimize import linprog

    if rows.shape[1] == 0:
        return None if len(rows) > known else float(counts.sum())
    cells, groups = rows.shape
    slack = np.zeros((cells, known))
    slack[:known] = np.eye(known)
    found: Any = linprog(
        np.concatenate([np.zeros(groups), np.ones(2 * known)]),
        A_eq=np.hstack([rows, slack, -slack]),
        b_eq=counts,
        bounds=(least, None),
        method="highs",
    )
    return float(found.fun) if found.status == 0 else None


def no_cells(patients: int) -> Cells:
    """No cell of so many patients."""
    return np.zeros((0, patients), dtype=np.bool_)


def stacked(cells: Sequence[NDArray[np.bool_]], patients: int) -> Cells:
    """Cells as rows."""
    return np.vstack(cells) if cells else no_cells(patients)
