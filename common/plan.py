"""The plan: the YAML that says everything a run will do, identified by the digest of its canonical form.

Rules:
  * The plan is data. Unknown keys, unknown names, dotted paths and `_target_` are errors.
  * Every default is written into the canonical form, so that a digest never depends on a later default.
  * Every error names the file, the line and the key, and says what to do. Errors of form are all shown at once, then
    those of meaning (names, sections that disagree), then those that show only when the parts are built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from locum.common import names
from locum.common.canonical import canonical_json, sha256_hex
from locum.common.errors import PlanError
from locum.common.names import suggestion
from locum.common.units import Millimetres, Seconds
from locum.common.yaml_source import Location, Source, YamlError, parse_yaml, read_yaml

Fold = Literal["train", "validation", "test"]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.+-]{0,63}$")]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
Size = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=2, max_length=3)]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a plan: where, what, and the remedy."""

    location: Location
    message: str
    remedy: str


class ProblemsError(ValueError):
    """Several problems found in one look at a plan."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Part(BaseModel):
    """A named component and its parameters, written flat: `{name: UNet, channels: [16, 32]}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra={"additionalProperties": True})

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict, json_schema_extra={"readOnly": True})

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "name" not in value:
            raise ValueError("a component is written {name: NAME, parameter: value, …}")
        parameters = {key: item for key, item in value.items() if key != "name"}
        return {"name": value["name"], "parameters": parameters}

    @model_serializer
    def _write_flat(self) -> dict[str, Any]:
        return {"name": self.name, **self.parameters}


class Split(_Strict):
    """Shares of patients for training, validation and test; they sum to one."""

    train: float = Field(0.8, gt=0, lt=1)
    validation: float = Field(0.1, ge=0, lt=1)
    test: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares sum to {total:g}, not to 1")
        return self

    @property
    def fractions(self) -> tuple[float, float, float]:
        """The shares in the order train, validation, test."""
        return self.train, self.validation, self.test


class SpacingRange(_Strict):
    """The voxel spacing that a case may have, in mm, along every axis."""

    least: Millimetres = 0.0
    most: Millimetres = 1000.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError("'least' is larger than 'most'")
        return self


class Share(_Strict):
    """Bounds of a share of patients."""

    least: float = Field(0.0, ge=0, le=1)
    most: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError("'least' is larger than 'most'")
        return self


#: Years of age by which patients are told apart: of 90 and more nobody is told the year (45 CFR 164.514(b)(2)(i)(C)).
AGE_BANDS = ("0-17", "18-39", "40-64", "65-89", "90+")


class Stratum(_Strict):
    """A group of patients of which a site must have some: `by` what they are told apart, which value, how many."""

    by: Literal["sex", "age", "manufacturer"]
    value: Word
    least_patients: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _a_value_that_exists(self) -> Self:
        known = {"sex": ("F", "M", "O"), "age": AGE_BANDS}.get(self.by)
        if known is not None and self.value not in known:
            raise ValueError(f"{self.by} is one of {', '.join(known)}")
        return self


#: A month, YYYY-MM: the finest time that a catalog keeps of a study.
Month = Annotated[str, StringConstraints(pattern=r"^\d{4}-(0[1-9]|1[0-2])$")]
#: A standard code, SCHEME:CODE: SCT, RADLEX, ICD10, LOINC or DCM.
Coded = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9]{1,15}:[A-Za-z0-9.-]{1,32}$")]


class Months(_Strict):
    """The first and the last month of the studies, both included; null does not bound."""

    first: Month | None = None
    last: Month | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.first and self.last and self.first > self.last:
            raise ValueError("'first' is after 'last'")
        return self


class Contract(_Strict):
    """What the plan needs of a site's data.

    An image is used if it fits modality, dimensions, spacing, SOP class, body part, orientation, number of slices and
    months; what is left empty fits every image. The rest a site must meet as a whole, or it cannot be selected.

    Attributes:
        sop_classes: SOP Class UIDs.
        body_parts: values of Body Part Examined, as DICOM has them.
        orientation: of the slices, by their nearest plane.
        least_slices: of a volume.
        months: when the studies were made.
        codes: class to the standard codes that mean it: a site whose map gives another code to a class fails.
        prevalence: class to the share of training patients who have it.
        strata: groups of training patients that a site must have.
        deidentified: whether DICOM must have been cleaned with PS3.15's Basic Profile.
        deface: whether the site must declare that faces were removed.
        consent: whether the site must keep a list of withdrawn consent.
    """

    task: names.Task
    modality: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z]{2,16}$")], ...] = ()
    dimensions: Literal[2, 3] = 3
    channels: int = Field(1, ge=1, le=64)
    classes: tuple[Word, ...] = Field(min_length=2, max_length=256)
    spacing: SpacingRange = SpacingRange()
    sop_classes: tuple[Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+){3,20}$")], ...] = ()
    body_parts: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9 _]{0,15}$")], ...] = ()
    orientation: tuple[Literal["axial", "coronal", "sagittal"], ...] = ()
    least_slices: int = Field(1, ge=1)
    months: Months = Months()
    codes: dict[Word, tuple[Coded, ...]] = Field(default_factory=dict)
    prevalence: dict[Word, Share] = Field(default_factory=dict)
    strata: tuple[Stratum, ...] = ()
    deidentified: bool = False
    deface: Literal["none", "required"] = "none"
    consent: Literal["none", "required"] = "none"
    least_patients: int = Field(1, ge=1)
    single_class: Literal["allow", "exclude"] = "allow"
    split: Split = Split()


class Transforms(_Strict):
    """MONAI dictionary transforms: `prepare` is deterministic and cached, `augment` is random."""

    prepare: tuple[Part, ...] = ()
    augment: tuple[Part, ...] = ()


class Tensors(_Strict):
    """What happens to each tensor of the network, by glob over its name.

    `shared` travels, `local` stays at each site (and is kept from round to round), `frozen` never changes. What no
    glob names is shared, except running statistics (they are statistics of the data), which are local, and integer
    buffers, which never travel. A glob given here wins over that; `frozen` over `local` over `shared`.
    """

    shared: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


class Training(_Strict):
    """What one site does in one round."""

    input_size: Size
    batch_size: int = Field(4, ge=1, le=4096)
    local_steps: int | None = Field(None, ge=1)
    local_epochs: int | None = Field(None, ge=1)
    precision: Literal["float32", "mixed"] = "float32"
    gradient_clip: float | None = Field(None, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    sampling: Literal["uniform", "balanced"] = "uniform"

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> Self:
        if (self.local_steps is None) == (self.local_epochs is None):
            raise ValueError("give either local_steps or local_epochs, not both and not neither")
        return self


class Participation(_Strict):
    """How many sites make a round, how long it waits for them, and how much each counts in the mean."""

    quorum: int = Field(2, ge=1)
    deadline: Seconds = 1800.0
    weighting: Literal["cases", "equal"] = "cases"
    attempts: int = Field(3, ge=1, le=100)


class Admission(_Strict):
    """The bounds that an update must keep to be folded in."""

    norm_bound: float = Field(1000.0, gt=0)
    weight_cap: float = Field(10_000.0, gt=0)


class DifferentialPrivacy(_Strict):
    """Patient-level differential privacy of each site's updates, by DP-SGD (Abadi et al., CCS 2016).

    Neighbouring data differ in one patient, whose images count as none (zero-out adjacency): the number of patients is
    not protected, everything else of a patient is.

    Attributes:
        epsilon: of all rounds of a run together, at one site.
        delta: the most that a site may use; it takes 1/(10·N) where that is less. Below 10^-12 nothing is accounted.
        clip: C, the L2 norm at which the gradient of one patient is clipped. Far below the least that it may be
            squares of float32 numbers vanish, far above the most sums overflow.
        images: images of a patient in one step, at most; their mean gradient counts.
        spare_rounds: rounds beyond the plan's for which the noise leaves room: those that are repeated.
        metrics_epsilon: of the released metrics of a fold's patients; None where no metric is released.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(ge=1e-12, lt=1)
    clip: float = Field(ge=1e-9, le=1e9)
    images: int = Field(1, ge=1, le=64)
    spare_rounds: int = Field(1, ge=0, le=1000)
    metrics_epsilon: float | None = Field(None, gt=0)


class SiteNoise(_Strict):
    """Site-level privacy by Skellam noise in a secure sum (Agarwal, Kairouz & Liu, NeurIPS 2021).

    It hides which hospital gave what, from who sees the sums of updates. It is no substitute for patient-level privacy.
    Neighbours differ in one site, which gives its update or nothing but noise (zero-out adjacency).

    Attributes:
        epsilon: of the updates of all rounds of a run together, for one site.
        delta: likewise.
        clip: the L2 norm at which the update of one site is clipped.
        spare_rounds: rounds beyond the plan's for which the noise leaves room: those that are repeated.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    clip: float = Field(gt=0)
    spare_rounds: int = Field(1, ge=0, le=1000)


class Protection(_Strict):
    """How an update is protected on its way and in the sum.

    `ring` is how many bits a coordinate of an update has in a secure sum.
    """

    secure_aggregation: Literal["off", "required"] = "required"
    ring: Literal[32, 64] = 32
    differential_privacy: DifferentialPrivacy | None = None
    site_noise: SiteNoise | None = None


class Subgroup(_Strict):
    """Cases that are measured apart as well, on the test fold.

    Attributes:
        by: what of an image tells them apart.
        values: the values that are told apart, in any letter case; all others together are `other`.
    """

    by: Literal["manufacturer"]
    values: tuple[Word, ...] = Field(min_length=1, max_length=16)


class Evaluation(_Strict):
    """What is measured on the validation fold during the run and on the test fold at its end.

    `rollback`: if the first metric is worse than the best so far by more than this, the next round starts from the
    model that was best.
    """

    metrics: tuple[str, ...] = Field(min_length=1)
    every_rounds: int = Field(1, ge=1)
    select: Literal["last", "best"] = "last"
    rollback: float | None = Field(None, gt=0)
    sliding_window: bool = False
    batch_size: int = Field(8, ge=1, le=4096)
    subgroups: tuple[Subgroup, ...] = ()


Told = Literal["metrics", "training_loss", "case_counts"]


class Release(_Strict):
    """What may leave a site besides the update itself; `metrics: null` means every metric of `evaluation`.

    Under secure aggregation these leave as sums over the sites. `per_site` names those that each site also tells of
    itself, in the clear.
    """

    metrics: tuple[str, ...] | None = None
    training_loss: bool = True
    case_counts: bool = True
    per_site: tuple[Told, ...] = ()


class Plan(_Strict):
    """A whole plan. Build it with :func:`load_plan`, which reports errors by line."""

    locum: Literal[1] = 1
    name: Slug
    purpose: str = Field(min_length=8, max_length=2000)
    contract: Contract
    transforms: Transforms = Transforms()
    network: Part
    tensors: Tensors = Tensors()
    loss: Part
    optimiser: Part
    training: Training
    strategy: Part = Part.model_validate({"name": "FedAvg"})
    rounds: int = Field(ge=1, le=100_000)
    participation: Participation = Participation()
    admission: Admission = Admission()
    protection: Protection = Protection()
    evaluation: Evaluation
    release: Release = Release()
    seed: int = Field(0, ge=0, lt=2**32)
    deterministic: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        from locum.common.plan_checks import problems_of  # it needs the classes of this module

        found = problems_of(self)
        if found:
            raise ProblemsError(found)
        return self

    @property
    def released_metrics(self) -> tuple[str, ...]:
        """The metrics whose sums may leave a site."""
        return self.evaluation.metrics if self.release.metrics is None else self.release.metrics

    @property
    def private(self) -> DifferentialPrivacy | None:
        """The differential privacy of patients, if the plan asks for it."""
        return self.protection.differential_privacy

    @property
    def secured(self) -> bool:
        """Whether updates are summed securely."""
        return self.protection.secure_aggregation == "required"

    def tells(self, what: Told) -> bool:
        """Whether each site tells something of itself, and not only as a part of a secure sum."""
        released = {
            "metrics": bool(self.released_metrics),
            "training_loss": self.release.training_loss,
            "case_counts": self.release.case_counts,
        }
        return released[what] and (not self.secured or what in self.release.per_site)

    def canonical(self) -> bytes:
        """The RFC 8785 canonical JSON of the plan, every default written out."""
        return canonical_json(self.model_dump(mode="json"))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the canonical form: the plan's identity."""
        return sha256_hex(self.canonical())

    def to_yaml(self) -> str:
        """The plan as YAML, every default written out; it loads to the same digest."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load_plan(path: Path) -> Plan:
    """Reads and validates a plan file; raises :class:`PlanError`."""
    try:
        source = read_yaml(path)
    except YamlError as error:
        raise PlanError(str(error), "mend the YAML at that line") from error
    except FileNotFoundError as error:
        raise PlanError(f"there is no plan at {path}", "give the path of a plan.yaml") from error
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}", "give the path of a plan.yaml") from error
    return _validated(source)


def parse_plan(content: bytes, name: str = "plan.yaml") -> Plan:
    """Validates a plan given as YAML bytes; raises :class:`PlanError`."""
    try:
        return _validated(parse_yaml(content, name))
    except YamlError as error:
        raise PlanError(str(error), "mend the YAML at that line") from error


def changed(plan: Plan, **fields: Any) -> Plan:
    """A copy of `plan` with top-level fields replaced, validated again; raises :class:`PlanError`."""
    return _validated(Source({**plan.model_dump(mode="json"), **fields}, name=plan.name))


def plan_error(source: Source, problems: list[Problem]) -> PlanError:
    """One error that tells every problem with its line and remedy."""
    lines = [
        f"{source.name} line {source.line(problem.location)}: {_dotted(problem.location)}: {problem.message}"
        f" — {problem.remedy}"
        for problem in problems
    ]
    return PlanError("\n".join(lines), "mend these and run `locum plan check` again")


def _validated(source: Source) -> Plan:
    if not isinstance(source.data, Mapping):
        raise PlanError(f"{source.name}: a plan is a mapping of sections", "start from a file in configs/plans")
    try:
        return Plan.model_validate(source.data)
    except ValidationError as error:
        raise plan_error(source, _from_pydantic(error)) from error


def _from_pydantic(error: ValidationError) -> list[Problem]:
    found: list[Problem] = []
    for item in error.errors():
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ProblemsError):
            found.extend(inner.problems)
        else:
            found.append(_problem(tuple(item["loc"]), item["type"], item["msg"], item.get("input")))
    return found


def _problem(location: Location, kind: str, message: str, given: Any) -> Problem:
    if kind == "extra_forbidden":
        keys = _fields_at(location[:-1])
        return Problem(location, f"unknown key '{location[-1]}'", suggestion(str(location[-1]), keys))
    if kind == "missing":
        return Problem(location, "this key is missing", f"add '{location[-1]}'")
    text = message.removeprefix("Value error, ")
    shown = "" if isinstance(given, Mapping | list) or repr(given) in text else f" (got {given!r})"
    return Problem(location, text + shown, f"see `locum plan schema` for '{_dotted(location)}'")


def _fields_at(location: Location) -> tuple[str, ...]:
    model: Any = Plan
    for step in location:
        if isinstance(step, int):
            continue
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return tuple(model.model_fields)


def _dotted(location: Location) -> str:
    return ".".join(str(step) for step in location) or "plan"
