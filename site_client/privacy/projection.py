"""What one more run would do to the ledger, for the steward who decides on it.

Rules:
  * What a run may use counts as a whole, its spare rounds too: a steward hears the most that it can come to.
  * It needs the numbers of patients, and so the stores; where they cannot be read, epsilons are added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from locum.common.errors import DataError
from locum.common.plan import Fold, Plan
from locum.site_client.configuration import FILE, read_configuration, read_policy
from locum.site_client.gate import Policy
from locum.site_client.imaging.fitting import fitting_cases, patients_of
from locum.site_client.privacy.account import Account, Words, account
from locum.site_client.privacy.accountant import epsilon
from locum.site_client.privacy.budget import FOLDS, delta_problem, releases, whole_run
from locum.site_client.privacy.ledger import LedgerError


@dataclass(frozen=True)
class Projection:
    """What a run of a plan with differential privacy would do to an account.

    Attributes:
        spent: before it.
        after: at most, with all its rounds and the spare ones.
        lifetime: the most that it may come to.
        warn: from where on the ledger warns.
        patients: by fold; None if the stores cannot be read, and `after` is then by adding epsilons up.
        problem: why this site would refuse the plan whatever is left; empty if it would not.
    """

    spent: float
    after: float
    lifetime: float
    warn: float
    patients: Mapping[Fold, int] | None
    problem: str = ""

    def words(self) -> Words:
        """For a steward."""
        stands = f"The ledger stands at epsilon {self.spent:.2f} of {self.lifetime:g}."
        return (
            self._of_patients(),
            *([f"REFUSED here: {self.problem}."] if self.problem else []),
            f"{stands} A run of this plan would bring it to {self.after:.2f} at most.",
            self._left(),
            *([f"WARNING: that is above {self.warn:g}."] if self.after > self.warn else []),
        )

    def _left(self) -> str:
        left = self.lifetime - self.after
        if left < 0:
            return f"BEYOND the lifetime's {self.lifetime:g}: this site would refuse the run before its end."
        return f"This plan would leave {left:.1f} of {self.lifetime:g}. Every further run of it counts anew."

    def _of_patients(self) -> str:
        if self.patients is None:
            return "How many patients fit is unknown, for the stores cannot be read here: epsilons are added up."
        numbers = self.patients
        return (
            f"Patients that fit: {numbers['train']} to train, {numbers['validation']} to choose the model, "
            f"{numbers['test']} to test."
        )


def project(found: Account, policy: Policy, plan: Plan, patients: Mapping[Fold, int] | None) -> Projection:
    """What a run of a plan with differential privacy would do to an account."""
    if patients is None:
        after, problem = found.spent + _asked(plan), ""
    else:
        after = epsilon([*found.mechanisms, *whole_run(plan, patients)], found.delta)
        problem = _problem(plan, policy, patients)
    return Projection(found.spent, after, found.lifetime, found.warn, patients, problem)


def _asked(plan: Plan) -> float:
    """All epsilons of a plan, added up."""
    private = plan.private
    if private is None:
        return 0.0
    folds = sum(releases(plan, fold) > 0 for fold in FOLDS if fold != "train")
    return private.epsilon + folds * (private.metrics_epsilon or 0.0)


def _problem(plan: Plan, policy: Policy, patients: Mapping[Fold, int]) -> str:
    found = (delta_problem(plan, policy, patients[fold], fold) for fold in FOLDS if patients[fold])
    return next((problem for problem in found if problem is not None), "")


def projection(home: Path, plan: Plan) -> Projection:
    """What a run of a plan with differential privacy would do in an agent's folder; raises DataError, LedgerError."""
    return project(account(home), read_policy(home / FILE), plan, _patients(home, plan))


def _patients(home: Path, plan: Plan) -> dict[Fold, int] | None:
    """By fold; None if the stores cannot be read, as at a desk that does not reach the images."""
    try:
        return patients_of(fitting_cases(read_configuration(home / FILE).stores, plan))
    except DataError:
        return None


def in_review(home: Path, plan: Plan) -> Words:
    """What a review says of the ledger."""
    if plan.private is None:
        return ("A run of this plan is noted as one without differential privacy: no epsilon says what it tells.",)
    try:
        return projection(home, plan).words()
    except LedgerError as error:
        return (f"REFUSED here as long as the ledger cannot be used: {error.message}; {error.remedy}.",)
