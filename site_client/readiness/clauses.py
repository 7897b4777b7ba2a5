"""A site's data held against the contract of a plan, clause by clause: what is asked, what is there, how to mend it.

Rules:
  * Nothing is looked at but the catalog: no image is opened, and a catalog of a hundred thousand cases takes seconds.
  * `passed` is exact and stays at the site. `told` is what may leave: of a clause that says which images are used, a
    site that has too few patients does not say whether it lets none or a few in, or keeps none or a few out.
  * What the patients of a site are is asked only where there are enough of them.
  * Groups of patients are judged by the numbers that may be told: in steps of the least cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from locum.common.envelope import CLAUSES, Clause
from locum.common.plan import Contract, Plan, Share, Stratum
from locum.site_client.imaging.declared import Declared, declared
from locum.site_client.imaging.fitting import OF_IMAGES, Seen, look
from locum.site_client.readiness.people import Person, person
from locum.site_client.suppression import rounded


@dataclass(frozen=True)
class Result:
    """One clause.

    Attributes:
        asked: what the contract asks, in words; empty if nothing.
        measured: what is there, in words and exact numbers: for the steward alone.
        passed: whether it is met; `told` whether it may be called so.
        remedy: of one that is not met, the next thing to do.
    """

    clause: Clause
    asked: str
    measured: str
    passed: bool
    told: bool
    remedy: str = ""


@dataclass(frozen=True)
class Measured:
    """A site's answer to a contract.

    Attributes:
        least_cell: the least number of patients that the site tells apart.
        results: every clause, in the contract's order.
        seen: every case of the site.
        people: the training patients whose images fit, by pseudonym.
    """

    plan: Plan
    least_cell: int
    declared: Declared
    results: tuple[Result, ...]
    seen: tuple[Seen, ...] = field(repr=False)
    people: Mapping[str, Person] = field(repr=False)

    @property
    def ready(self) -> bool:
        """Whether every clause is met."""
        return all(result.told for result in self.results)

    @property
    def clauses(self) -> dict[Clause, bool]:
        """By clause, whether it may be called met."""
        return {result.clause: result.told for result in self.results}

    @property
    def failing(self) -> tuple[Clause, ...]:
        """The clauses that may not."""
        return tuple(result.clause for result in self.results if not result.told)

    @cached_property
    def fitting(self) -> tuple[Seen, ...]:
        """The cases that a run would use."""
        return tuple(seen for seen in self.seen if seen.fits)

    @property
    def profile(self) -> str:
        """How the DICOM that fits was cleaned; empty if it was not, or there is none."""
        found = {seen.facts.profile for seen in self.fitting if seen.facts.sop_class}
        return next(iter(found)) if len(found) == 1 else "several profiles" if len(found) > 1 else ""


def measure(stores: Iterable[Path], plan: Plan, *, least_cell: int) -> Measured:
    """Holds what is in the stores against a plan's contract; raises DataError if a catalog cannot be read."""
    folders = tuple(stores)
    return judged(plan, tuple(look(folders, plan.contract)), declared(folders), least_cell=least_cell)


def judged(plan: Plan, seen: Sequence[Seen], said: Declared, *, least_cell: int) -> Measured:
    """Holds cases against a plan's contract."""
    fitting = [one for one in seen if one.fits]
    people: dict[str, Person] = {}
    for one in sorted(fitting, key=lambda one: one.case.id):
        if one.case.fold == "train":
            people.setdefault(one.case.patient, person(one.facts))
    site = _Site(plan.contract, tuple(seen), tuple(fitting), people, said, least_cell)
    results = {**_of_images(site), **{clause: ask(site) for clause, ask in _OF_SITES.items()}}
    return Measured(plan, least_cell, said, tuple(results[name] for name in CLAUSES), tuple(seen), people)


@dataclass(frozen=True)
class _Site:
    """What the clauses are held against."""

    contract: Contract
    seen: tuple[Seen, ...]
    fitting: tuple[Seen, ...]
    people: Mapping[str, Person]
    declared: Declared
    least_cell: int

    @property
    def enough(self) -> bool:
        return len(self.people) >= self.contract.least_patients

    @cached_property
    def training(self) -> tuple[Seen, ...]:
        return tuple(one for one in self.fitting if one.case.fold == "train")

    @cached_property
    def all_training(self) -> int:
        return len({one.case.patient for one in self.seen if one.case.fold == "train"})


# --- the clauses that say which images are used


def _of_images(site: _Site) -> dict[Clause, Result]:
    patients: dict[Clause, set[str]] = {clause: set() for clause in OF_IMAGES}
    images: dict[Clause, int] = dict.fromkeys(OF_IMAGES, 0)
    for one in site.seen:
        for clause in OF_IMAGES:
            if clause in one.misses:
                images[clause] += 1
            elif one.case.fold == "train":
                patients[clause].add(one.case.patient)
    return {clause: _of_image(site, clause, len(patients[clause]), images[clause]) for clause in OF_IMAGES}


def _of_image(site: _Site, clause: Clause, patients: int, missing: int) -> Result:
    least, kept_out = site.contract.least_patients, site.all_training - patients
    passed = patients >= min(least, site.all_training)
    asked = _ASKED[clause](site.contract)
    few = patients < site.least_cell or (patients < least and kept_out >= site.least_cell)
    told = site.enough or not asked or not few
    measured = (
        f"{patients} of {site.all_training} training patients have such an image; "
        f"{missing} of {_number(len(site.seen), 'image')} {'is' if missing == 1 else 'are'} not used for this"
    )
    return Result(clause, asked, measured if asked else "", passed, told, "" if passed else _REMEDY[clause])


def _spacing(contract: Contract) -> str:
    least, most = contract.spacing.least, contract.spacing.most
    return f"{least:g} to {most:g} mm along every axis" if (least, most) != (0.0, 1000.0) else ""


def _months(contract: Contract) -> str:
    first, last = contract.months.first, contract.months.last
    return " ".join([*([f"from {first}"] if first else []), *([f"to {last}"] if last else [])])


_ASKED: Mapping[Clause, Callable[[Contract], str]] = {
    "modality": lambda contract: ", ".join(contract.modality),
    "dimensions": lambda contract: f"{contract.dimensions} dimensions",
    "spacing": _spacing,
    "sop_classes": lambda contract: ", ".join(contract.sop_classes),
    "body_parts": lambda contract: ", ".join(contract.body_parts),
    "orientation": lambda contract: ", ".join(contract.orientation),
    "least_slices": lambda contract: f"at least {contract.least_slices} slices" if contract.least_slices > 1 else "",
    "months": _months,
}
_REMEDY: Mapping[Clause, str] = {
    "modality": "Ingest images of this modality; of NIfTI and npz, declare it: `modality` of the source in site.yaml.",
    "dimensions": "Ingest volumes where the plan asks for 3 dimensions, and single pictures where it asks for 2.",
    "spacing": "Ingest reconstructions within this range; thicker or thinner slices of the same studies may be there.",
    "sop_classes": "Retrieve objects of these SOP classes; NIfTI and npz have none, and never fit this clause.",
    "body_parts": "Set Body Part Examined at the PACS, or narrow the query to this body part.",
    "orientation": "Ingest series in this plane; derived reformats are not taken.",
    "least_slices": "Retrieve whole series: short ones are often scouts, or cut off on their way.",
    "months": "Widen the dates of the query; a study without a date never fits this clause.",
}


# --- the clauses that a site meets as a whole


def _least_patients(site: _Site) -> Result:
    least, patients = site.contract.least_patients, len(site.people)
    measured = f"{_number(patients, 'training patient')} with images that fit every clause above"
    remedy = (
        ""
        if site.enough
        else "See the clauses above. Where each is met by itself, too few images meet them together."
        if site.all_training >= least
        else f"Ingest more: there are {_number(site.all_training, 'training patient')} in all."
    )
    return Result("least_patients", f"at least {least}", measured, site.enough, site.enough, remedy)


def _classes(site: _Site) -> Result:
    if site.contract.task == "segmentation":
        unknown = sum(not one.facts.masked for one in site.fitting)
        asked, what = "a mask for every image", "no mask"
        remedy = "Add the missing masks, then ingest again: an image without one keeps the site out."
    else:
        unknown = sum(one.facts.label not in site.contract.classes for one in site.fitting)
        asked, what = f"one of {', '.join(site.contract.classes)} for every image", "no label of the plan"
        remedy = "Map the site's codes to the plan's classes: `labels.classes` in site.yaml, or the terminology map."
    measured = f"{unknown} of {_number(len(site.fitting), 'image')} that fit: {what}"
    return _of_fitting(site, "classes", asked, measured, not unknown, remedy)


def _single_class(site: _Site) -> Result:
    if site.contract.single_class == "allow" or site.contract.task == "segmentation":
        return _nothing("single_class")
    if not site.enough:
        return _unseen("single_class", "training images of every class")
    present = {one.facts.label for one in site.training}
    missing = [name for name in site.contract.classes if name not in present]
    measured = f"no training image of {', '.join(missing)}" if missing else "there are training images of every class"
    return _result("single_class", "training images of every class", measured, not missing,
                   "Ingest images of the class that is missing.")  # fmt: skip


def _codes(site: _Site) -> Result:
    asked = site.contract.codes
    if not asked:
        return _result("codes", "", _of_map(site.declared), True, "")
    wrong = {name: _mismatch(site.declared.codes.get(name, ()), codes) for name, codes in asked.items()}
    wrong = {name: why for name, why in wrong.items() if why}
    words = "; ".join(f"{name}: {', '.join(codes)}" for name, codes in asked.items())
    measured = "; ".join(f"{name}: {why}" for name, why in wrong.items()) or "the site's map says the same"
    remedy = (
        "Mend the terminology map so that these classes have the codes that the plan names, or ask the ML team."
        if site.declared.terminology
        else "Write a terminology map, name it in site.yaml (`terminology`), and ingest again."
    )
    return _result("codes", words, measured, not wrong, remedy)


def _mismatch(given: Sequence[str], asked: Sequence[str]) -> str:
    """What a class has for the codes that a plan asks for; a code of another scheme than theirs says nothing."""
    schemes = {code.partition(":")[0] for code in asked}
    own = [code for code in given if code.partition(":")[0] in schemes]
    others = [code for code in own if code not in asked]
    if not own:
        return f"no code of {', '.join(sorted(schemes))}"
    return f"also {', '.join(others)}" if others else ""


def _of_map(declared: Declared) -> str:
    return f"map {declared.terminology[:12]}" if declared.terminology else "the site has no terminology map"


def _prevalence(site: _Site) -> Result:
    bounds = site.contract.prevalence
    if not bounds:
        return _nothing("prevalence")
    asked = "; ".join(f"{name} from {share.least:.0%} to {share.most:.0%}" for name, share in bounds.items())
    if not site.enough:
        return _unseen("prevalence", asked)
    having: dict[str, set[str]] = {name: set() for name in bounds}
    for one in site.training:
        if one.facts.label in having:
            having[one.facts.label].add(one.case.patient)
    total = len(site.people)
    shares = {name: (len(patients), _within(len(patients), total, site.least_cell, bounds[name]))
              for name, patients in having.items()}  # fmt: skip
    measured = "; ".join(f"{name} {count} of {total}" for name, (count, _) in shares.items())
    small = f"A class of fewer than {site.least_cell} patients counts as any number below that."
    remedy = f"Ingest the patients of a whole period, not a selection. {small}"
    return _result("prevalence", asked, measured, all(fine for _, fine in shares.values()), remedy)


def _within(count: int, total: int, least: int, bounds: Share) -> bool:
    """Whether a share of patients is within bounds, for every number that may not be told from the true one."""
    if not total:
        return False
    low, high = (0, least - 1) if count < least else (count, count)
    if total - count < least:
        low, high = (total - least + 1, total) if count >= least else (low, high)
    return bounds.least <= max(low, 0) / total and min(high, total) / total <= bounds.most


def _strata(site: _Site) -> Result:
    if not site.contract.strata:
        return _nothing("strata")
    asked = "; ".join(f"{one.by} {one.value}: at least {one.least_patients}" for one in site.contract.strata)
    if not site.enough:
        return _unseen("strata", asked)
    counts = [(stratum, _having(site.people.values(), stratum)) for stratum in site.contract.strata]
    measured = "; ".join(f"{one.by} {one.value}: {count}" for one, count in counts)
    passed = all((rounded(count, site.least_cell) or 0) >= stratum.least_patients for stratum, count in counts)
    remedy = (
        "Ingest more patients of the group that is too small. Groups count in steps of "
        f"{site.least_cell}, this site's least cell, so {site.least_cell} are the least that count."
    )
    return _result("strata", asked, measured, passed, remedy)


def _having(people: Iterable[Person], stratum: Stratum) -> int:
    value = stratum.value.casefold()
    return sum(getattr(one, stratum.by).casefold() == value for one in people)


def _deidentified(site: _Site) -> Result:
    bare = sum(bool(one.facts.sop_class) and not one.facts.profile for one in site.fitting)
    asked = "DICOM cleaned with the Basic Profile of PS3.15" if site.contract.deidentified else ""
    measured = f"{bare} of {_number(len(site.fitting), 'image')} that fit were not cleaned" if asked else ""
    remedy = "Ingest again with this version: it cleans DICOM as `deidentification` of site.yaml says."
    return _of_fitting(site, "deidentified", asked, measured, not (asked and bare), remedy)


def _deface(site: _Site) -> Result:
    faces = sum(not one.facts.defaced for one in site.fitting)
    asked = "faces were removed" if site.contract.deface == "required" else ""
    measured = f"not declared of {faces} of {_number(len(site.fitting), 'image')} that fit" if asked else ""
    remedy = "Remove the faces, then declare it: `defaced: true` in site.yaml, and ingest again."
    return _of_fitting(site, "deface", asked, measured, not (asked and faces), remedy)


def _consent(site: _Site) -> Result:
    asked = "a list of withdrawn consent" if site.contract.consent == "required" else ""
    withdrawn = f"there is one; {_number(site.declared.withdrawn, 'patient')} of it left out"
    measured = withdrawn if site.declared.consent else "there is none"
    remedy = "Name the list in site.yaml (`consent: {withdrawn: FILE}`, it may be empty), and ingest again."
    return _result("consent", asked, measured, site.declared.consent or not asked, remedy)


def _result(clause: Clause, asked: str, measured: str, passed: bool, remedy: str) -> Result:
    return Result(clause, asked, measured, passed, passed, "" if passed else remedy)


def _of_fitting(site: _Site, clause: Clause, asked: str, measured: str, passed: bool, remedy: str) -> Result:
    """A clause about each image that fits. Of too few patients, that it fails would tell that one of them is there."""
    return Result(clause, asked, measured, passed, passed or not site.enough, "" if passed else remedy)


def _nothing(clause: Clause) -> Result:
    return _result(clause, "", "", True, "")


def _unseen(clause: Clause, asked: str) -> Result:
    """Of a clause about the patients of a site that has too few of them: that is told already."""
    return _result(clause, asked, "not looked at: too few patients have images that fit", True, "")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


_OF_SITES: Mapping[Clause, Callable[[_Site], Result]] = {
    "least_patients": _least_patients,
    "classes": _classes,
    "single_class": _single_class,
    "codes": _codes,
    "prevalence": _prevalence,
    "strata": _strata,
    "deidentified": _deidentified,
    "deface": _deface,
    "consent": _consent,
}
