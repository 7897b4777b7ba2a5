"""The site's gate: what may come in to run, and what may go out.

Rules:
  * A plan runs only if the site's policy allows every part of it. The policy can only tighten a plan.
  * Over the wire it runs only if the site's stewards approved it too, and only in the site's hours.
  * Everything that leaves a site is made by a function of this module, field by field; what it does not copy stays.
  * A failure leaves as its type and code, and for a policy refusal the clause's name. Its text never leaves.
  * An update is checked here as the coordinator would check it, before it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from flwr.app import Error
from pydantic import BaseModel, ConfigDict, Field

from locum.common import names
from locum.common.errors import Code, SiteFailure
from locum.common.messages import (
    Arrays,
    Description,
    EvaluateResult,
    EvaluateTask,
    Header,
    TrainResult,
    TrainTask,
)
from locum.common.plan import Plan
from locum.common.updates import update_problem
from locum.site_client.hours import Hours, open_at


class Policy(BaseModel):
    """What a site allows. Unknown keys are fatal; None means no limit of the site's own.

    Attributes:
        tasks: tasks that may run.
        networks: networks that may be trained.
        metrics: metrics that may be measured and released.
        most_rounds: rounds of one run.
        least_sites: the sites that a plan must ask for in every sum; its quorum is at least that.
        release_case_counts: whether the number of cases may be told; if not, a plan that weights by it is refused, and
            one that releases metrics, for each of their sums tells how many cases went into it.
        release_training_loss: whether the mean training loss may be told.
        hours: when the site works for others, by its own clock.
        stewards: how many different stewards must approve a plan.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[names.Task, ...] = names.BOTH
    networks: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None
    most_rounds: int | None = Field(None, ge=1)
    least_sites: int | None = Field(None, ge=1)
    release_case_counts: bool = True
    release_training_loss: bool = True
    hours: Hours | None = None
    stewards: Literal[1, 2] = 1


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
    if policy.least_sites is not None and plan.participation.quorum < policy.least_sites:
        quorum = plan.participation.quorum
        yield PolicyRefusal("least_sites", f"a sum may be of {quorum} sites, {policy.least_sites} are the least")
    if not policy.release_case_counts and plan.participation.weighting == "cases":
        yield PolicyRefusal("release_case_counts", "an update's weight would be the number of cases")
    if not policy.release_case_counts and plan.released_metrics:
        metrics = ", ".join(plan.released_metrics)
        yield PolicyRefusal("release_case_counts", f"the sums of {metrics} would tell the number of cases")


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
    """What may leave the site in answer to one message: a header, and tensors."""

    header: Header
    tensors: Arrays = MappingProxyType({})


def release_description(policy: Policy, plan: Plan, site: str, found: Mapping[str, Any]) -> Release:
    """The site's configuration and ability; counts only if plan and policy release them."""
    counts = _counts(policy, plan)
    return Release(
        Description(
            plan_digest=plan.digest,
            site=site,
            configuration=found["configuration"],
            cases=found["cases"] if counts else None,
            missing_classes=tuple(found["missing_classes"]) if counts else (),
            able=found["able"],
            reason=found["reason"] if counts else ("" if found["able"] else "the contract is not met"),
        )
    )


def release_update(
    policy: Policy, plan: Plan, task: TrainTask, *, model: Arrays, update: Arrays, done: Mapping[str, Any]
) -> Release:
    """The update, if it is one the coordinator may fold; raises SiteFailure (UPDATE_REFUSED)."""
    problem = update_problem(update, model, plan.admission.norm_bound)
    if problem is not None:
        raise SiteFailure(Code.UPDATE_REFUSED, problem)
    loss = done["loss"] if plan.release.training_loss and policy.release_training_loss else None
    told = _counts(policy, plan) or plan.training.local_steps is not None  # the steps of an epoch tell the cases
    return Release(
        TrainResult(
            plan_digest=plan.digest,
            round=task.round,
            weight=_weight(plan, done["cases"]),
            steps=done["steps"] if told else None,
            loss=loss,
            seconds=done["seconds"],
        ),
        update,
    )


def _counts(policy: Policy, plan: Plan) -> bool:
    """Whether plan and policy let the site tell its numbers of cases."""
    return plan.release.case_counts and policy.release_case_counts


def _weight(plan: Plan, cases: int) -> float:
    return 1.0 if plan.participation.weighting == "equal" else min(float(cases), plan.admission.weight_cap)


def release_metrics(policy: Policy, plan: Plan, task: EvaluateTask, *, cases: int, sums: Arrays) -> Release:
    """The sums of the metrics that the plan releases, and of no other."""
    allowed = {name: sums[name] for name in plan.released_metrics}
    told = cases if _counts(policy, plan) else None
    return Release(EvaluateResult(plan_digest=plan.digest, round=task.round, fold=task.fold, cases=told), allowed)


def release_failure(failure: SiteFailure) -> Error:
    """A failure as its code's number and name."""
    clause = f" {failure.clause}" if isinstance(failure, PolicyRefusal) else ""
    return Error(code=int(failure.code), reason=failure.code.name + clause)
