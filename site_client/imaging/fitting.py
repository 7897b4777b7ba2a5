"""Which of a site's cases and patients a plan is about: those whose images fit its contract, by fold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

from locum.common.plan import Contract, Fold, Plan
from locum.site_client.imaging.catalog import FILE_NAME, Case, Catalog, Facts
from locum.site_client.imaging.split import FOLDS


def fitting_cases(stores: Iterable[Path], plan: Plan) -> dict[Fold, tuple[Case, ...]]:
    """The cases of all stores that fit; raises DataError if a catalog cannot be read."""
    found = [case for store in stores for case in _of_store(store, plan)]
    return {fold: tuple(case for case in found if case.fold == fold) for fold in FOLDS}


def patients_of(cases: Mapping[Fold, Iterable[Case]]) -> dict[Fold, int]:
    """How many different patients each fold has."""
    return {fold: len({case.patient for case in cases[fold]}) for fold in FOLDS}


def _of_store(store: Path, plan: Plan) -> list[Case]:
    """The cases of a store that the contract asks for; none of one that nothing was ingested into yet."""
    if store.is_dir() and not (store / FILE_NAME).is_file():
        return []
    with closing(Catalog.open(store)) as catalog:
        fits = {fact.id for fact in catalog.facts() if _fits(fact, plan.contract)}
        return [case for case in catalog.cases(plan.contract.split.fractions) if case.id in fits]


def _fits(fact: Facts, contract: Contract) -> bool:
    """Whether an image has the contract's modality and dimensions, and a spacing within its range on every axis."""
    flat = len(fact.shape) == 2 or fact.shape[2] == 1
    sizes = fact.spacing[: contract.dimensions]
    return (
        (not contract.modality or fact.modality in contract.modality)
        and contract.dimensions == (2 if flat else 3)
        and all(contract.spacing.least <= size <= contract.spacing.most for size in sizes)
    )
