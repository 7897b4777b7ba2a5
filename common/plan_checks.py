"""What is wrong with a plan beyond its form: names that do not resolve, and sections that do not agree.

Nothing is built here; what shows only when the parts are built is checked in :mod:`locum.common.build`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from locum.common import names
from locum.common.names import suggestion
from locum.common.plan import Part, Plan, Problem
from locum.common.secagg import MOST_SITES
from locum.common.yaml_source import Location

#: The cell of all values that a subgroup does not name.
OTHER = "other"
_DOTTED = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")

#: Beyond it a whole number has no exact JSON form (RFC 8785, RFC 7493 section 2.2).
_LARGEST = 2**53 - 1


def problems_of(plan: Plan) -> list[Problem]:
    """Everything wrong with a plan that shows without building anything."""
    return [
        *_number_problems((), plan.model_dump()),
        *_name_problems(plan),
        *_parameter_problems(plan),
        *_metric_problems(plan),
        *_subgroup_problems(plan),
        *_transform_problems(plan),
        *_size_problems(plan),
        *_class_problems(plan),
        *_contract_problems(plan),
        *_release_problems(plan),
        *_sampling_problems(plan),
        *_protection_problems(plan),
        *_privacy_problems(plan),
    ]


def _number_problems(location: Location, value: Any) -> list[Problem]:
    """Numbers that have no canonical form."""
    if isinstance(value, Mapping):
        return [problem for key, item in value.items() for problem in _number_problems((*location, key), item)]
    if isinstance(value, list | tuple):
        return [problem for i, item in enumerate(value) for problem in _number_problems((*location, i), item)]
    too_large = isinstance(value, int) and abs(value) > _LARGEST
    if too_large or (isinstance(value, float) and not math.isfinite(value)):
        return [Problem(location, "this number has no canonical form", "use a finite one, and a whole one below 2^53")]
    return []


def parts_of(plan: Plan) -> list[tuple[Location, Part, str]]:
    """Every component of the plan: where it stands, the component, and its entry-point group."""
    listed = [
        (("transforms", stage, index), part, "locum.transforms")
        for stage, parts in (("prepare", plan.transforms.prepare), ("augment", plan.transforms.augment))
        for index, part in enumerate(parts)
    ]
    return [
        *listed,
        (("network",), plan.network, "locum.networks"),
        (("loss",), plan.loss, "locum.losses"),
        (("strategy",), plan.strategy, "locum.strategies"),
    ]


def _name_problems(plan: Plan) -> list[Problem]:
    found = [
        _unknown((*location, "name"), part.name, names.known(group))
        for location, part, group in parts_of(plan)
        if part.name not in names.known(group)
    ]
    if plan.strategy.name in names.NEED_SINGLE_UPDATES:
        found = [problem for problem in found if problem.location[0] != "strategy"]
        message = f"{plan.strategy.name} compares single updates, and a strategy sees their sum only"
        known = ", ".join(names.known("locum.strategies"))
        remedy = f"use one of: {known}; admission.norm_bound limits what one site can do"
        found.append(Problem(("strategy", "name"), message, remedy))
    if plan.optimiser.name not in names.OPTIMISERS:
        found.append(_unknown(("optimiser", "name"), plan.optimiser.name, tuple(names.OPTIMISERS)))
    for section, part, table in (
        ("network", plan.network, names.NETWORKS),
        ("loss", plan.loss, names.LOSSES),
    ):
        entry = table.get(part.name)
        if entry is not None and plan.contract.task not in entry.tasks:
            fit = [name for name, other in table.items() if plan.contract.task in other.tasks]
            message = f"{part.name} does not serve {plan.contract.task}"
            found.append(Problem((section, "name"), message, "use one of: " + ", ".join(fit)))
    return found


def _unknown(location: Location, name: str, options: tuple[str, ...]) -> Problem:
    if "." in name or "/" in name or ":" in name:
        return Problem(location, f"'{name}' is a path, and a plan names only what is on the allow-list",
                       suggestion(name.replace(":", ".").rsplit(".", 1)[-1], options))  # fmt: skip
    return Problem(location, f"'{name}' is not on the allow-list", suggestion(name, options))


def _parameter_problems(plan: Plan) -> list[Problem]:
    found: list[Problem] = []
    everything = [*parts_of(plan), (("optimiser",), plan.optimiser, "")]
    for location, part, _ in everything:
        for key, value in part.parameters.items():
            found.extend(_value_problems((*location, key), key, value))
    for location, part, group in parts_of(plan):
        entry = names.GROUPS[group].get(part.name)
        fills = getattr(entry, "fills", {})
        fixed = getattr(entry, "fixed", {})
        found.extend(
            Problem((*location, key), f"Locum sets '{key}' of {part.name} itself", "leave it out")
            for key in part.parameters
            if key in fills or key in fixed or (group == "locum.transforms" and key in {"keys", "allow_missing_keys"})
        )
    return found


def _value_problems(location: Location, key: str, value: Any) -> list[Problem]:
    if key.startswith("_"):
        return [Problem(location, f"'{key}' is not a parameter: a plan cannot name code", "remove it")]
    if isinstance(value, Mapping):
        return [p for name, item in value.items() for p in _value_problems((*location, name), str(name), item)]
    if isinstance(value, list | tuple):
        return [p for i, item in enumerate(value) for p in _value_problems((*location, i), "item", item)]
    if isinstance(value, str) and (_DOTTED.match(value) or "/" in value or "\\" in value):
        return [Problem(location, f"'{value}' is a path, and a plan cannot name files or code", "use a plain word")]
    return []


def _metric_problems(plan: Plan) -> list[Problem]:
    found: list[Problem] = []
    for index, name in enumerate(plan.evaluation.metrics):
        entry = names.METRICS.get(name)
        if name not in names.known("locum.metrics"):
            found.append(_unknown(("evaluation", "metrics", index), name, names.known("locum.metrics")))
        elif entry is not None and plan.contract.task not in entry.tasks:
            fit = [other for other, e in names.METRICS.items() if plan.contract.task in e.tasks]
            message = f"{name} does not measure {plan.contract.task}"
            found.append(Problem(("evaluation", "metrics", index), message, "use one of: " + ", ".join(fit)))
    for index, name in enumerate(plan.release.metrics or ()):
        if name not in plan.evaluation.metrics:
            message = f"'{name}' is released but never measured"
            found.append(Problem(("release", "metrics", index), message, "add it to evaluation.metrics"))
    return found


def _subgroup_problems(plan: Plan) -> list[Problem]:
    found: list[Problem] = []
    seen: set[str] = set()
    for index, group in enumerate(plan.evaluation.subgroups):
        location = ("evaluation", "subgroups", index)
        folded = [value.casefold() for value in group.values]
        if group.by in seen:
            found.append(Problem((*location, "by"), f"{group.by} stands twice", "put its values into one list"))
        if len(set(folded)) < len(folded):
            found.append(Problem((*location, "values"), "a value stands twice", "name every value once"))
        if OTHER in folded:
            message = f"'{OTHER}' is what Locum calls all values that are not named"
            found.append(Problem((*location, "values"), message, "leave it out"))
        seen.add(group.by)
    if plan.evaluation.subgroups and plan.private is not None:
        message = "metrics of subgroups would have to be paid for out of the patients' privacy, each by itself"
        found.append(Problem(("evaluation", "subgroups"), message, "remove it"))
    return found


def _transform_problems(plan: Plan) -> list[Problem]:
    found: list[Problem] = []
    for stage, parts in (("prepare", plan.transforms.prepare), ("augment", plan.transforms.augment)):
        for index, part in enumerate(parts):
            entry = names.TRANSFORMS.get(part.name)
            if entry is not None and entry.random != (stage == "augment"):
                kind, where = ("random", "augment") if entry.random else ("deterministic", "prepare")
                location = ("transforms", stage, index, "name")
                found.append(Problem(location, f"{part.name} is {kind}", f"move it to transforms.{where}"))
    return found


def _size_problems(plan: Plan) -> list[Problem]:
    size, dimensions = plan.training.input_size, plan.contract.dimensions
    if len(size) == dimensions:
        return []
    message = f"{len(size)} numbers for images of {dimensions} dimensions"
    return [Problem(("training", "input_size"), message, f"give {dimensions} numbers")]


def _class_problems(plan: Plan) -> list[Problem]:
    contract = plan.contract
    found: list[Problem] = []
    if len(set(contract.classes)) < len(contract.classes):
        found.append(Problem(("contract", "classes"), "a class stands twice", "name every class once"))
    for section in ("codes", "prevalence"):
        for name in getattr(contract, section):
            if name not in contract.classes:
                message = f"'{name}' is none of the plan's classes"
                found.append(Problem(("contract", section, name), message, suggestion(name, contract.classes)))
    return found


def _contract_problems(plan: Plan) -> list[Problem]:
    """What no site's data could meet, or no catalog can tell."""
    contract = plan.contract
    found = [
        Problem(("contract", "codes", name), "no code stands here", "give the standard codes that mean this class")
        for name, codes in contract.codes.items()
        if not codes
    ]
    if contract.dimensions == 2 and contract.least_slices > 1:
        message = "an image of 2 dimensions has one slice"
        found.append(Problem(("contract", "least_slices"), message, "remove it, or set contract.dimensions: 3"))
    if contract.prevalence and contract.task != "classification":
        message = "a catalog does not know which classes a mask has"
        found.append(Problem(("contract", "prevalence"), message, "remove it"))
    return [*found, *_prevalence_problems(plan), *_strata_problems(plan)]


def _prevalence_problems(plan: Plan) -> list[Problem]:
    """Every patient has a class: the shares of all of them cannot stay below one together."""
    bounds = plan.contract.prevalence
    if set(bounds) != set(plan.contract.classes) or sum(share.most for share in bounds.values()) >= 1:
        return []
    message = "every patient has one of the classes, and their largest shares sum to less than 1"
    return [Problem(("contract", "prevalence"), message, "raise 'most' of a class")]


def _strata_problems(plan: Plan) -> list[Problem]:
    """One number a group: several would be several questions about the same patients."""
    found: list[Problem] = []
    seen: set[tuple[str, str]] = set()
    for index, stratum in enumerate(plan.contract.strata):
        key = stratum.by, stratum.value.casefold()
        if key in seen:
            message = f"{stratum.by} {stratum.value} stands twice"
            found.append(Problem(("contract", "strata", index), message, "name every group once"))
        seen.add(key)
    return found


def _release_problems(plan: Plan) -> list[Problem]:
    if plan.release.case_counts or plan.participation.weighting == "equal":
        return []
    message = "weights by cases tell the number of cases, which release.case_counts withholds"
    return [Problem(("participation", "weighting"), message, "set it to 'equal', or release the counts")]


def _sampling_problems(plan: Plan) -> list[Problem]:
    if plan.training.sampling == "uniform" or plan.contract.task == "classification":
        return []
    message = "balanced sampling needs one class a case, and a mask has many"
    return [Problem(("training", "sampling"), message, "use RandCropByLabelClassesd under transforms.augment")]


def _protection_problems(plan: Plan) -> list[Problem]:
    found: list[Problem] = []
    for index, what in enumerate(plan.release.per_site):
        if what != "metrics" and not getattr(plan.release, what):
            message = f"each site is to tell its {what}, which release.{what} withholds"
            found.append(Problem(("release", "per_site", index), message, f"remove it, or set release.{what}: true"))
    if plan.secured and plan.participation.quorum > MOST_SITES:
        message = f"a secure sum has at most {MOST_SITES} sites"
        found.append(Problem(("participation", "quorum"), message, "lower it"))
    if plan.protection.site_noise is not None and not plan.secured:
        message = "site noise is added within a secure sum, and the plan has none"
        remedy = "set protection.secure_aggregation: required, or remove it"
        found.append(Problem(("protection", "site_noise"), message, remedy))
    return found + _site_noise_problems(plan)


def _site_noise_problems(plan: Plan) -> list[Problem]:
    """What a plan with site noise cannot have beside it."""
    noise = plan.protection.site_noise
    if noise is None:
        return []
    found: list[Problem] = []
    if plan.participation.weighting != "equal":
        message = "the sum of the weights has no noise, and would tell of a site's number of cases"
        found.append(Problem(("participation", "weighting"), message, "set it to 'equal'"))
    if plan.release.per_site:
        message = "site noise hides what a site gave, and it is to tell of itself"
        found.append(Problem(("release", "per_site"), message, "remove it"))
    if noise.clip > plan.admission.norm_bound:
        message = f"no update is larger than admission.norm_bound, {plan.admission.norm_bound:g}"
        found.append(Problem(("protection", "site_noise", "clip"), message, "lower it: the noise is in proportion"))
    return found


def _privacy_problems(plan: Plan) -> list[Problem]:
    """What a plan with differential privacy cannot have beside it."""
    if plan.private is None:
        return []
    found: list[Problem] = []
    if plan.release.training_loss:
        message = "the training loss has no noise, and would tell of single patients"
        found.append(Problem(("release", "training_loss"), message, "set it to false"))
    if plan.released_metrics and plan.private.metrics_epsilon is None:
        message = "metrics are released and no budget is set apart for them"
        remedy = "give protection.differential_privacy.metrics_epsilon, or set release.metrics: []"
        found.append(Problem(("release", "metrics"), message, remedy))
    if plan.training.gradient_clip is not None:
        message = "the gradient of each patient is clipped already, at differential_privacy.clip"
        found.append(Problem(("training", "gradient_clip"), message, "remove it"))
    if plan.training.sampling == "balanced":
        message = "patients are drawn independently of their class (Poisson sampling)"
        found.append(Problem(("training", "sampling"), message, "set it to 'uniform'"))
    if plan.training.precision == "mixed":
        message = "gradients of single patients are computed in float32"
        found.append(Problem(("training", "precision"), message, "set it to 'float32'"))
    return found
