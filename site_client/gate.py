"""The site's gate: what may come in to run, and what may go out.

Rules:
  * A plan runs only if the site's policy allows every part of it. The policy can only tighten a plan.
  * Over the wire it runs only if the site's stewards approved it too, and only in the site's hours.
  * Everything that leaves a site is made by a function of this module, field by field; what it does not copy stays.
  * A failure leaves as its type and code, and for a policy refusal the clause's name. Its text never leaves.
  * An update is checked here as the coordinator would check it, before it leaves; under secure aggregation before it is
    masked, for nobody can look at it then.
  * Of a site's data leaves whether each clause of the contract is met, and numbers of patients as `suppression.py` has
    them: rounded down, none below the least cell.
  * Of a plan with differential privacy only what has noise leaves, and numbers of patients, which are not protected: no
    loss, no number of images, no missing class. The statement of what was spent is made last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from flwr.app import Error
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from locum.common import names
from locum.common.canonical import digest
from locum.common.cohort import Answer, Told
from locum.common.envelope import Clause, Readiness
from locum.common.errors import Code, SiteFailure
from locum.common.messages import (
    Arrays,
    Description,
    EvaluateResult,
    EvaluateTask,
    Header,
    MaskedResult,
    TrainResult,
    TrainTask,
)
from locum.common.plan import Fold, Plan
from locum.common.plan_checks import OTHER
from locum.common.secagg import LEAST_SITES
from locum.common.secagg.upload import TOLD, Given
from locum.common.sums import CASES, LOSS, WEIGHT, Cell, cells_of, metric_lengths, weight_cap
from locum.common.tensor_files import Sendable
from locum.common.updates import l2_norm, update_problem
from locum.site_client import suppression
from locum.site_client.hours import Hours, open_at
from locum.site_client.readiness.clauses import Measured
from locum.site_client.readiness.people import groups


class Policy(BaseModel):
    """What a site allows. Unknown keys are fatal; None means no limit of the site's own.

    Attributes:
        tasks: tasks that may run.
        networks: networks that may be trained.
        metrics: metrics that may be measured and released.
        most_rounds: rounds of one run.
        min_sites: the least sites of a roster and of a secure sum, this one among them.
        require_secure_aggregation: whether a plan that shows the coordinator each site's update is refused.
        release_case_counts: whether this site's number of cases may be told, and how many patients of which group it
            has; if not, a plan is refused in which its weight or its metrics, seen by themselves, would tell it. As a
            part of a secure sum they do not.
        release_training_loss: whether this site's mean training loss may be told.
        release_site_metrics: whether this site's own metrics may be told where the plan asks for them beside a sum; if
            not, a plan with subgroups is refused, for this may be the only site that has one.
        hours: when the site works for others, by its own clock.
        stewards: how many different stewards must approve a plan.
        least_cell: the least patients of a subgroup who are told apart, and of all the others together; numbers of
            patients are told in steps of it.
        require_differential_privacy: whether a plan without differential privacy is refused.
        most_epsilon: the most epsilon that one plan may ask for, metrics included; None for what the lifetime leaves.
        lifetime_epsilon: of all runs together, for one patient, at `ledger_delta`.
        warn_epsilon: from here on the ledger warns.
        ledger_delta: the delta at which the ledger composes all runs.
        cohort: whether cohort questions are answered, with numbers of patients of `least_cell` or more.
        cohort_questions_a_day: how many of them in 24 hours; the next ones wait.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[names.Task, ...] = names.BOTH
    networks: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None
    most_rounds: int | None = Field(None, ge=1)
    min_sites: int = Field(LEAST_SITES, ge=LEAST_SITES)
    require_secure_aggregation: bool = False
    release_case_counts: bool = True
    release_training_loss: bool = True
    release_site_metrics: bool = True
    hours: Hours | None = None
    stewards: Literal[1, 2] = 1
    least_cell: int = Field(10, ge=1)
    require_differential_privacy: bool = False
    most_epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    lifetime_epsilon: float = Field(8.0, gt=0, allow_inf_nan=False)
    warn_epsilon: float = Field(3.0, gt=0, allow_inf_nan=False)
    ledger_delta: float = Field(1e-5, gt=0, lt=1)
    cohort: Literal["off", "on"] = "off"
    cohort_questions_a_day: int = Field(20, ge=1)


class PolicyRefusal(SiteFailure):
    """A plan that the site's policy forbids; `clause` is the policy's key and may leave."""

    def __init__(self, clause: str, detail: str) -> None:
        super().__init__(Code.POLICY_REFUSED, detail)
        self.clause = clause


def refusals(policy: Policy, plan: Plan) -> Iterator[PolicyRefusal]:
    """Every clause of the policy that forbids the plan, with why; whether it is approved is another matter."""
    if plan.contract.task not in policy.tasks:
        yield PolicyRefusal("tasks", f"the task is {plan.contract.task}")
    if policy.networks is not None and plan.network.name not in policy.networks:
        yield PolicyRefusal("networks", f"the network is {plan.network.name}")
    forbidden = [name for name in plan.evaluation.metrics if policy.metrics is not None and name not in policy.metrics]
    if forbidden:
        yield PolicyRefusal("metrics", f"it measures {', '.join(forbidden)}")
    if policy.most_rounds is not None and plan.rounds > policy.most_rounds:
        yield PolicyRefusal("most_rounds", f"it has {plan.rounds} rounds, {policy.most_rounds} are allowed")
    if policy.require_secure_aggregation and not plan.secured:
        yield PolicyRefusal("require_secure_aggregation", "the coordinator would see each site's update")
    yield from _privacy_refusals(policy, plan)
    if plan.secured and not policy.release_site_metrics and cells_of(plan, "test"):
        yield PolicyRefusal("release_site_metrics", "of a subgroup that no other site has, the sum is this site's own")
    if not policy.release_case_counts and not plan.secured and plan.participation.weighting == "cases":
        yield PolicyRefusal("release_case_counts", "an update's weight would be the number of cases")
    if not policy.release_case_counts and not plan.secured and plan.released_metrics:
        metrics = ", ".join(plan.released_metrics)
        yield PolicyRefusal("release_case_counts", f"the sums of {metrics} would tell the number of cases")


def _privacy_refusals(policy: Policy, plan: Plan) -> Iterator[PolicyRefusal]:
    if policy.require_differential_privacy and plan.private is None:
        yield PolicyRefusal("require_differential_privacy", "nothing bounds what its updates tell of a patient")
    if plan.private is not None and policy.most_epsilon is not None:
        asked = max(plan.private.epsilon, plan.private.metrics_epsilon or 0.0)
        if asked > policy.most_epsilon:
            yield PolicyRefusal("most_epsilon", f"it asks for epsilon {asked:g}, {policy.most_epsilon:g} is allowed")


def admit_plan(policy: Policy, plan: Plan) -> None:
    """Raises :class:`PolicyRefusal` for the first clause that forbids the plan."""
    for refusal in refusals(policy, plan):
        raise refusal


def admit_release(policy: Policy, plan: Plan, *, approved: bool) -> None:
    """Whether what was made for a plan may leave; raises as :func:`admit_run`. The hours do not matter for it."""
    if not approved:
        raise SiteFailure(Code.NOT_APPROVED, plan.digest)
    admit_plan(policy, plan)


def admit_run(policy: Policy, plan: Plan, *, approved: bool, now: datetime) -> None:
    """Whether a run of the plan may ask this site for something now; for every message that comes over the wire.

    Args:
        policy: what the site allows.
        plan: the run's plan.
        approved: whether the site's approval of this plan stands.
        now: the site's local time.

    Raises:
        SiteFailure: NOT_APPROVED; a plan that nobody approved learns no more.
        PolicyRefusal: the policy forbids the plan, or it is outside the hours.
    """
    admit_release(policy, plan, approved=approved)
    if policy.hours is not None and not open_at(policy.hours, now):
        raise PolicyRefusal("hours", f"it is {now:%a %H:%M}; the hours are {', '.join(map(str, policy.hours))}")


class Release(NamedTuple):
    """What may leave the site in answer to one message: a header, or what makes it, and tensors (see `pack`)."""

    header: Header | Callable[[str], Header]
    tensors: Sendable = MappingProxyType({})


#: Notes that a release is about to leave, and makes the statement of what the run has spent with it.
Spend = Callable[[], str | None]


def nothing_spent() -> None:
    """Makes no statement: of what has no differential privacy, or uses no patient."""


def policy_digest(policy: Policy) -> str:
    """What a policy is called in the log: the SHA-256 of its canonical JSON, every default written out."""
    return digest(policy.model_dump(mode="json"))


class Ready(NamedTuple):
    """What a site says of its data: the statement, and its envelope if the site has a key."""

    said: Readiness
    envelope: str | None


def release_description(
    policy: Policy, plan: Plan, site: str, found: Mapping[str, Any], ready: Ready | None = None
) -> Release:
    """The site's configuration and ability; counts only if plan and policy release them, and they are no images'.

    None of data that are not ready: beside clauses that fail they would tell what the statement rounds.
    """
    failing = ready.said.failing if ready is not None else ()
    counts = _counts(policy, plan) and plan.private is None and not failing
    return Release(
        Description(
            plan_digest=plan.digest,
            site=site,
            configuration=found["configuration"],
            cases=found["cases"] if counts else None,
            missing_classes=tuple(found["missing_classes"]) if counts else (),
            able=found["able"] and not failing,
            reason=(found["reason"] if counts else "") or _unmet(found["able"] and not failing, failing),
            policy=policy_digest(policy),
            readiness=ready.envelope if ready is not None else None,
        )
    )


def _unmet(able: bool, failing: Sequence[Clause]) -> str:
    """Which clauses a site does not meet, by their names."""
    if able:
        return ""
    return "the contract is not met" + (f": {', '.join(failing)}" if failing else "")


def readiness(policy: Policy, plan: Plan, measured: Measured, *, site: str, run: str | None, at: float) -> Readiness:
    """What a site says of its data.

    Numbers of patients only of data that are ready, for a plan without differential privacy, and if plan and policy
    let the numbers of cases be told.
    """
    counts = measured.ready and plan.private is None and plan.release.case_counts and policy.release_case_counts
    told = suppression.told(
        len(measured.people) if counts else 0,
        groups(measured.people.values() if counts else ()),
        policy.least_cell,
        reached=plan.contract.least_patients if counts else 0,
    )
    return Readiness(
        site=site,
        run=run,
        plan=plan.digest,
        at=at,
        ready=measured.ready,
        clauses=measured.clauses,
        step=policy.least_cell,
        patients=told.patients,
        strata={by: {v: n for v, n in cells.items() if n is not None} for by, cells in told.groups.items()},
        terminology=measured.declared.terminology or None,
        profile=measured.profile,
        consent=measured.declared.consent,
        withdrawn=suppression.rounded(measured.declared.withdrawn, policy.least_cell),
    )


class Made(NamedTuple):
    """What the worker made for one task.

    Attributes:
        tensors: the update, or the sums of the metrics by name.
        told: what it says of it: `cases`; of an update `steps`, `loss` and `seconds` too; of metrics `cells`, by
            cell of the plan's subgroups the numbers of the patients who have cases in it.
        spent: makes the statement of what was spent.
    """

    tensors: Arrays
    told: Mapping[str, Any]
    spent: Spend = nothing_spent


def release_update(policy: Policy, plan: Plan, task: TrainTask, *, model: Arrays, made: Made) -> Release:
    """The update, if it is one the coordinator may fold; raises SiteFailure (UPDATE_REFUSED)."""
    _check_update(plan, model, made.tensors)
    done = made.told
    told = _counts(policy, plan) or plan.training.local_steps is not None  # the steps of an epoch tell the cases
    header = TrainResult(
        plan_digest=plan.digest,
        round=task.round,
        weight=_weight(plan, done["cases"]),
        steps=done["steps"] if told else None,
        loss=_loss(policy, plan, done),
        seconds=done["seconds"] if plan.private is None else None,  # it tells how many patients were drawn
        spent=made.spent(),
    )
    return Release(header, made.tensors)


def _check_update(plan: Plan, model: Arrays, update: Arrays) -> None:
    problem = update_problem(update, model, plan.admission.norm_bound)
    if problem is not None:
        raise SiteFailure(Code.UPDATE_REFUSED, problem)


def _counts(policy: Policy, plan: Plan) -> bool:
    """Whether plan and policy let the site tell its numbers of cases."""
    return plan.tells("case_counts") and policy.release_case_counts


def _weight(plan: Plan, cases: int) -> float:
    return 1.0 if plan.participation.weighting == "equal" else min(float(cases), plan.admission.weight_cap)


def _loss(policy: Policy, plan: Plan, done: Mapping[str, Any]) -> float | None:
    """The training loss, if it may be told of this site; it has no noise."""
    told = plan.tells("training_loss") and policy.release_training_loss and plan.private is None
    return done["loss"] if told else None


def release_metrics(policy: Policy, plan: Plan, task: EvaluateTask, made: Made) -> Release:
    """The sums of the metrics that the plan releases, and of no other; a small cell is a part of all others."""
    allowed = _allowed(policy, plan, task.fold, made)
    told = made.told["cases"] if _counts(policy, plan) else None
    header = EvaluateResult(plan_digest=plan.digest, round=task.round, fold=task.fold, cases=told, spent=made.spent())
    return Release(header, allowed)


def _allowed(policy: Policy, plan: Plan, fold: Fold, made: Made) -> dict[str, NDArray[Any]]:
    """The sums that may leave; all zeros of a site without a case."""
    lengths = metric_lengths(plan, fold)
    if not made.told["cases"]:
        return {name: np.zeros(length) for name, length in lengths.items()}
    found = {name: made.tensors[name] for name in lengths}
    for group in plan.evaluation.subgroups:
        cells = [cell for cell in cells_of(plan, fold) if cell.by == group.by]
        patients = {cell.value: frozenset(made.told.get("cells", {}).get(cell.key, ())) for cell in cells}
        _merge(cells, told_cells(patients, policy.least_cell), found)
    return found


def _merge(cells: Sequence[Cell], told: Collection[str], sums: dict[str, NDArray[Any]]) -> None:
    """Adds the sums of the cells of a subgroup that are not told to those of all other cases."""
    for name in {name.partition("@")[0] for name in sums if "@" in name}:
        kept = [cell.of(name) for cell in cells if cell.value not in told]
        together = np.sum([sums[one] for one in kept], axis=0)
        sums |= {one: np.zeros_like(sums[one]) for one in kept}
        sums[Cell(cells[0].by, OTHER).of(name)] = together


def told_cells(cells: Mapping[str, frozenset[int]], least: int) -> set[str]:
    """The values of a subgroup that a site tells apart from all others, by the patients of each.

    None of them has fewer than `least` patients; nor have the others together, unless there are none or all are there
    (complementary suppression: Hundepool et al., Statistical Disclosure Control, 2012, chapter 4).
    """
    told = {value for value, patients in cells.items() if value != OTHER and len(patients) >= least}
    while told and 0 < len(_others(cells, told)) < least:
        told.remove(min(told, key=lambda value: (len(cells[value]), value)))
    return told


def _others(cells: Mapping[str, frozenset[int]], told: Collection[str]) -> frozenset[int]:
    return frozenset[int]().union(*(patients for value, patients in cells.items() if value not in told))


# --- cohort questions


def release_answer(
    policy: Policy, question: str, site: str, cells: Iterable[Told], *, at: float, refused: str | None
) -> Answer:
    """What a site answers to a cohort question: numbers of its least cell or more, if the policy allows any."""
    told = [Told(table=cell.table, key=cell.key, patients=_large(policy, cell.patients)) for cell in cells]
    allowed = policy.cohort == "on" and refused is None
    return Answer(
        site=site,
        question=question,
        at=at,
        least_cell=policy.least_cell,
        cells=tuple(told) if allowed else (),
        refused=refused if policy.cohort == "on" else "cohort",
    )


def _large(policy: Policy, patients: int | None) -> int | None:
    return None if patients is None or patients < policy.least_cell else patients


# --- under secure aggregation


def admit_roster(policy: Policy, sites: int) -> None:
    """Raises :class:`PolicyRefusal` if a roster or a sum has too few sites."""
    if sites < policy.min_sites:
        raise PolicyRefusal("min_sites", f"{sites} sites, {policy.min_sites} are the least")


class Masked(NamedTuple):
    """What a site may give to a secure sum, and what it tells of itself beside it."""

    given: Given
    header: Callable[[str], MaskedResult]
    told: Arrays = MappingProxyType({})

    def release(self, tensors: Sendable, signed: Callable[[str], str]) -> Release:
        """What leaves: the masked tensors under a header that is signed over the SHA-256 of their file."""
        return Release(lambda body: self.header(signed(body)), {**tensors, **self.told})


def mask_update(policy: Policy, plan: Plan, *, model: Arrays, made: Made) -> Masked:
    """An update that may go into a secure sum; raises SiteFailure (UPDATE_REFUSED)."""
    _check_update(plan, model, made.tensors)
    done = made.told
    weight = _weight(plan, done["cases"]) / weight_cap(plan)
    factor = weight * _shrunk(plan, made.tensors)
    loss = done["loss"] if plan.private is None else 0.0
    scalars = {WEIGHT: np.array([weight]), LOSS: np.array([weight * loss])}
    cases = done["cases"] if _counts(policy, plan) else None
    header = partial(MaskedResult, plan_digest=plan.digest, loss=_loss(policy, plan, done), cases=cases)
    return Masked(Given(made.tensors, factor, scalars), lambda upload: header(upload=upload, spent=made.spent()))


def _shrunk(plan: Plan, update: Arrays) -> float:
    """By what an update is multiplied so that its norm is at most the clip of the site noise: 1 where it is."""
    noise = plan.protection.site_noise
    if noise is None:
        return 1.0
    norm = l2_norm(update)
    return 1.0 if norm <= noise.clip else noise.clip / norm


def mask_metrics(policy: Policy, plan: Plan, task: EvaluateTask, made: Made) -> Masked:
    """The sums of the metrics that the plan releases, and of no other; those of a site without a case are zeros."""
    allowed, cases = _allowed(policy, plan, task.fold, made), made.told["cases"]
    told = plan.tells("metrics") and policy.release_site_metrics
    header = partial(MaskedResult, plan_digest=plan.digest, cases=cases if _counts(policy, plan) else None)
    scalars = {**allowed, CASES: np.array([float(cases)])}
    beside = {f"{TOLD}{name}": allowed[name] for name in plan.released_metrics} if told else {}
    return Masked(Given({}, 1.0, scalars), lambda upload: header(upload=upload, spent=made.spent()), beside)


def release_failure(failure: SiteFailure) -> Error:
    """A failure as its code's number and name."""
    clause = f" {failure.clause}" if isinstance(failure, PolicyRefusal) else ""
    return Error(code=int(failure.code), reason=failure.code.name + clause)
