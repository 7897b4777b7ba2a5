"""The site's gate: what may come in to run, and what may go out.

Rules:
  * A plan runs only if the site's policy allows every part of it. The policy can only tighten a plan.
  * Everything that leaves a site is made by a function of this module, field by field; what it does not copy stays.
  * A failure leaves as its type and code, and for a policy refusal the clause's name. Its text never leaves.
  * An update is checked here as the coordinator would check it, before it leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Error, RecordDict
from pydantic import BaseModel, ConfigDict, Field

from locum.common import names
from locum.common.errors import Code, SiteFailure
from locum.common.messages import (
    Description,
    EvaluateResult,
    EvaluateTask,
    Tensors,
    TrainResult,
    TrainTask,
    pack,
)
from locum.common.plan import Plan
from locum.common.updates import update_problem


class Policy(BaseModel):
    """What a site allows. Unknown keys are fatal; None means no limit of the site's own.

    Attributes:
        tasks: tasks that may run.
        networks: networks that may be trained.
        metrics: metrics that may be measured and released.
        most_rounds: rounds of one run.
        release_case_counts: whether the number of cases may be told; if not, a plan that weights by it is refused.
        release_training_loss: whether the mean training loss may be told.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[names.Task, ...] = names.BOTH
    networks: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None
    most_rounds: int | None = Field(None, ge=1)
    release_case_counts: bool = True
    release_training_loss: bool = True


class PolicyRefusal(SiteFailure):
    """A plan that the site's policy forbids; `clause` is the policy's key and may leave."""

    def __init__(self, clause: str, detail: str) -> None:
        super().__init__(Code.POLICY_REFUSED, detail)
        self.clause = clause


def admit_plan(policy: Policy, plan: Plan) -> None:
    """Raises :class:`PolicyRefusal` if the policy forbids the plan."""
    if plan.contract.task not in policy.tasks:
        raise PolicyRefusal("tasks", plan.contract.task)
    if policy.networks is not None and plan.network.name not in policy.networks:
        raise PolicyRefusal("networks", plan.network.name)
    forbidden = [name for name in plan.evaluation.metrics if policy.metrics is not None and name not in policy.metrics]
    if forbidden:
        raise PolicyRefusal("metrics", ", ".join(forbidden))
    if policy.most_rounds is not None and plan.rounds > policy.most_rounds:
        raise PolicyRefusal("most_rounds", str(plan.rounds))
    if not policy.release_case_counts and plan.participation.weighting == "cases":
        raise PolicyRefusal("release_case_counts", "an update's weight would be the number of cases")


def release_description(policy: Policy, plan: Plan, site: str, found: Mapping[str, Any]) -> RecordDict:
    """The site's configuration and ability; counts only if plan and policy release them."""
    counts = _counts(policy, plan)
    return pack(
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
    policy: Policy, plan: Plan, task: TrainTask, *, model: Tensors, update: Tensors, done: Mapping[str, Any]
) -> RecordDict:
    """The update, if it is one the coordinator may fold; raises SiteFailure (UPDATE_REFUSED)."""
    problem = update_problem(update, model, plan.admission.norm_bound)
    if problem is not None:
        raise SiteFailure(Code.UPDATE_REFUSED, problem)
    loss = done["loss"] if plan.release.training_loss and policy.release_training_loss else None
    told = _counts(policy, plan) or plan.training.local_steps is not None  # the steps of an epoch tell the cases
    return pack(
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


def release_metrics(policy: Policy, plan: Plan, task: EvaluateTask, *, cases: int, sums: Tensors) -> RecordDict:
    """The sums of the metrics that the plan releases, and of no other."""
    allowed = {name: sums[name] for name in plan.released_metrics}
    told = cases if _counts(policy, plan) else None
    return pack(EvaluateResult(plan_digest=plan.digest, round=task.round, fold=task.fold, cases=told), allowed)


def release_failure(failure: SiteFailure) -> Error:
    """A failure as its code's number and name."""
    clause = f" {failure.clause}" if isinstance(failure, PolicyRefusal) else ""
    return Error(code=int(failure.code), reason=failure.code.name + clause)
