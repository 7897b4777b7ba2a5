"""Which fold a patient belongs to: train, validation or test.

Rules:
  * The patient is divided, never the image: all images of one patient are in one fold.
  * The place is a keyed hash of the patient: the same at every ingest, whatever else the site holds.
  * A fold that the site's table states wins over the hash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from locum.common.errors import DataError

Fold = Literal["train", "validation", "test"]
FOLDS: tuple[Fold, ...] = get_args(Fold)

#: Shares of train, validation and test; they add up to 1.
Shares = tuple[float, float, float]


def check_shares(split: Shares) -> None:
    """Raise DataError unless the three shares are at least 0 and add up to 1."""
    if min(split) < 0 or not math.isclose(sum(split), 1.0, abs_tol=1e-6):
        raise DataError(f"the split {split} does not add up to 1", "give three shares such as [0.8, 0.1, 0.1]")


def fold_of(u: float, stated: Fold | None, split: Shares, *, table_folds: Iterable[str] = ()) -> Fold:
    """The fold of a patient at `u`, or the one that the table states for it.

    Args:
        u: the patient's place in [0, 1).
        stated: the fold of the site's table, if it gives one for this patient.
        split: shares of train, validation and test.
        table_folds: every fold that the table uses. A table with train and test only leaves the validation
            set to us: it is cut out of train, in the proportion validation / (train + validation).
    """
    train, validation, _ = split
    if stated is None:
        return _by_share(u, train, train + validation)
    if stated == "train" and "validation" not in table_folds and train + validation > 0:
        return _by_share(u, train / (train + validation), 1.0)
    return stated


def _by_share(u: float, train_end: float, validation_end: float) -> Fold:
    if u < train_end:
        return "train"
    return "validation" if u < validation_end else "test"
