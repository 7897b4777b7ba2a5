"""Which of a site's cases and patients a plan is about: those whose images fit its contract, by fold.

Rules:
  * The clauses of the contract that an image is used by are here and nowhere else: training and readiness ask here.
  * What a clause asks and the catalog does not know does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from locum.common.envelope import Clause
from locum.common.plan import Contract, Fold, Plan
from locum.site_client.imaging.catalog import FILE_NAME, Case, Catalog, Facts
from locum.site_client.imaging.split import FOLDS


@dataclass(frozen=True)
class Seen:
    """One case of a site.

    Attributes:
        misses: the clauses of the contract that its image does not meet; if there is one, it is not used.
    """

    case: Case
    facts: Facts
    misses: tuple[Clause, ...]

    @property
    def fits(self) -> bool:
        """Whether a run of the plan uses it."""
        return not self.misses


def fitting_cases(stores: Iterable[Path], plan: Plan) -> dict[Fold, tuple[Case, ...]]:
    """The cases of all stores that fit; raises DataError if a catalog cannot be read."""
    found = [seen.case for seen in look(stores, plan.contract) if seen.fits]
    return {fold: tuple(case for case in found if case.fold == fold) for fold in FOLDS}


def patients_of(cases: Mapping[Fold, Iterable[Case]]) -> dict[Fold, int]:
    """How many different patients each fold has."""
    return {fold: len({case.patient for case in cases[fold]}) for fold in FOLDS}


def look(stores: Iterable[Path], contract: Contract) -> Iterator[Seen]:
    """Every case of all stores, against a contract; none of a store that nothing was ingested into yet.

    Raises:
        DataError: a catalog cannot be read, or its last ingest did not finish.
    """
    for store in stores:
        if not store.is_dir() or (store / FILE_NAME).is_file():
            with closing(Catalog.open(store)) as catalog:
                facts = {fact.id: fact for fact in catalog.facts()}
                for case in catalog.cases(contract.split.fractions):
                    if case.id in facts:  # one that an ingest adds between the two is seen the next time
                        yield Seen(case, facts[case.id], misses(facts[case.id], contract))


def misses(facts: Facts, contract: Contract) -> tuple[Clause, ...]:
    """The clauses of a contract that an image does not meet, in the contract's order."""
    return tuple(name for name, fits in OF_IMAGES.items() if not fits(facts, contract))


def is_flat(facts: Facts) -> bool:
    """Whether an image has two dimensions."""
    return len(facts.shape) == 2 or facts.shape[2] == 1


def _spacing(facts: Facts, contract: Contract) -> bool:
    sizes = facts.spacing[: contract.dimensions]
    return all(contract.spacing.least <= size <= contract.spacing.most for size in sizes)


def _months(facts: Facts, contract: Contract) -> bool:
    first, last = contract.months.first, contract.months.last
    if first is None and last is None:
        return True
    return bool(facts.month) and (first or "") <= facts.month and (last is None or facts.month <= last)


#: The clauses by which an image is used or not. What is left empty fits every image.
OF_IMAGES: Mapping[Clause, Callable[[Facts, Contract], bool]] = {
    "modality": lambda facts, contract: not contract.modality or facts.modality in contract.modality,
    "dimensions": lambda facts, contract: contract.dimensions == (2 if is_flat(facts) else 3),
    "spacing": _spacing,
    "sop_classes": lambda facts, contract: not contract.sop_classes or facts.sop_class in contract.sop_classes,
    "body_parts": lambda facts, contract: not contract.body_parts or facts.body_part in contract.body_parts,
    "orientation": lambda facts, contract: not contract.orientation or facts.orientation in contract.orientation,
    "least_slices": lambda facts, contract: facts.slices >= contract.least_slices,
    "months": _months,
}
