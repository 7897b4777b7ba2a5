"""What a plan with differential privacy may use of a site's patients: how much noise, how often, and whether at all.

Rules:
  * δ = min(the plan's, 1/(10·N)) for the N patients of the fold. A δ above 1/N would let a whole patient be published,
    and is refused.
  * The noise is such that all releases that the plan makes of a fold, and its spare ones, come to the plan's epsilon.
    Each try is a reservation of its own, so a coordinator that asks more often is refused, not served with less noise.
  * Refused is what the run's own epsilon or the population's lifetime does not allow (BUDGET_SPENT), and everything if
    the ledger cannot be trusted (PRIVACY_REFUSED).
  * What was spent is told as a statement that the site signs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec

from locum.common.envelope import Spent, seal_spent
from locum.common.errors import Code, SiteFailure
from locum.common.plan import DifferentialPrivacy, Fold, Plan
from locum.site_client.gate import Policy
from locum.site_client.privacy.accountant import Mechanism, noise_for
from locum.site_client.privacy.ledger import Ledger, LedgerError, Limit, Reservation, SpentError, State, Use
from locum.site_client.privacy.sampling import rate_of, steps_of

FOLDS: tuple[Fold, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Signer:
    """In whose name a statement is made."""

    site: str
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Reserved:
    """What one release may use.

    Attributes:
        use: what for.
        mechanism: the noise multiplier, the rate at which patients are drawn, and the steps.
        patients: N, of the fold.
        delta: of the run, for this fold.
        reservation: what the ledger says.
    """

    use: Use
    mechanism: Mechanism
    patients: int
    delta: float
    reservation: Reservation

    @property
    def request(self) -> dict[str, float]:
        """What the worker is told."""
        noise = {"noise": self.mechanism.noise}
        return {**noise, "rate": self.mechanism.rate} if self.use.purpose == "train" else noise


@dataclass(frozen=True)
class Budget:
    """The agent's face of the ledger.

    Attributes:
        ledger: the file.
        population: the steward's name for the patients behind this site's stores.
        policy: the limits over all runs.
        signer: who signs; renewal and enrolment replace the key.
        now: the time, by the coordinator's clock.
    """

    ledger: Ledger
    population: str
    policy: Policy
    signer: Callable[[], Signer]
    now: Callable[[], datetime]

    def reserve(self, plan: Plan, *, run: str, round_number: int, purpose: Fold, patients: int) -> Reserved:
        """Reserves one release of a fold of so many patients; raises SiteFailure (NO_DATA and see the rules)."""
        if patients == 0:
            raise SiteFailure(Code.NO_DATA, f"no patient in the {purpose} fold")
        _check_deltas(plan, self.policy, patients, purpose)
        mechanism, limit = one_release(plan, purpose, patients)
        use = Use(self.population, run, plan.digest, round_number, purpose)
        lifetime = Limit(self.policy.lifetime_epsilon, self.policy.ledger_delta)
        try:
            made = self.ledger.reserve(use, mechanism, run=limit, lifetime=lifetime)
        except SpentError as error:
            raise SiteFailure(Code.BUDGET_SPENT, f"{error.message}; {error.remedy}") from error
        except LedgerError as error:
            raise SiteFailure(Code.PRIVACY_REFUSED, f"{error.message}; {error.remedy}") from error
        return Reserved(use, mechanism, patients, limit.delta, made)

    def commit(self, reserved: Reserved) -> str:
        """Notes that a release is about to leave; returns the signed statement of what the run has spent with it.

        Raises SiteFailure (PRIVACY_REFUSED) if the ledger cannot be trusted any more.
        """
        try:
            self.ledger.commit(reserved.reservation.id)
        except LedgerError as error:
            raise SiteFailure(Code.PRIVACY_REFUSED, f"{error.message}; {error.remedy}") from error
        return self._statement(reserved.use, reserved.reservation.of_run, reserved.delta)

    def nothing(self, plan: Plan, *, run: str, round_number: int, purpose: Fold) -> str:
        """The statement about a fold without a patient: epsilon 0."""
        use = Use(self.population, run, plan.digest, round_number, purpose)
        return self._statement(use, 0.0, _private(plan).delta)

    def _statement(self, use: Use, epsilon: float, delta: float) -> str:
        signer = self.signer()
        spent = Spent(
            site=signer.site,
            run=use.run,
            plan=use.plan,
            round=use.round,
            purpose=use.purpose,
            at=self.now().timestamp(),
            epsilon=epsilon,
            delta=delta,
        )
        return seal_spent(spent, signer.key).decode()

    def note_unprotected(self, plan: Plan, *, run: str, round_number: int, purpose: Fold) -> None:
        """Notes, once a run, that a plan without differential privacy uses the patients; raises LedgerError."""
        self.ledger.note_unprotected(Use(self.population, run, plan.digest, round_number, purpose))


def state_of(budget: Budget) -> State | None:
    """How far the ledger has come; None for one that cannot be used."""
    try:
        return budget.ledger.state()
    except LedgerError:
        return None


# --- what a plan uses


def releases(plan: Plan, purpose: Fold) -> int:
    """How many releases of a fold the noise leaves room for, spare ones included; 0 of a fold that is not released."""
    private = _private(plan)
    if purpose == "train":
        return plan.rounds + private.spare_rounds
    if not plan.released_metrics:
        return 0
    if purpose == "test":
        return 1 + private.spare_rounds
    every, last = plan.evaluation.every_rounds, plan.rounds
    due = [number for number in range(1, last + 1) if number % every == 0 or number in {1, last}]
    return len(due) + private.spare_rounds


def one_release(plan: Plan, purpose: Fold, patients: int) -> tuple[Mechanism, Limit]:
    """The mechanism of one release of a fold, and what all of a run may come to."""
    private, times = _private(plan), releases(plan, purpose)
    rate, steps = drawing(plan, patients) if purpose == "train" else (1.0, 1)
    limit = Limit(_asked(private, purpose), min(private.delta, 1 / (10 * patients)))
    return Mechanism(noise_for(limit.epsilon, limit.delta, rate=rate, steps=steps * times), rate, steps), limit


def drawing(plan: Plan, patients: int) -> tuple[float, int]:
    """The rate q and the steps of one round."""
    rate = rate_of(plan, patients)
    return rate, steps_of(plan, rate)


def whole_run(plan: Plan, patients: Mapping[Fold, int]) -> tuple[Mechanism, ...]:
    """Everything that a run of a plan may use, spare rounds included."""
    found = []
    for purpose in FOLDS:
        times = releases(plan, purpose)
        if times and patients[purpose]:
            one, _ = one_release(plan, purpose, patients[purpose])
            found.append(Mechanism(one.noise, one.rate, one.steps * times))
    return tuple(found)


def delta_problem(plan: Plan, policy: Policy, patients: int, purpose: Fold) -> str | None:
    """Why a delta protects nobody among N patients, in words with the numbers; None if it does."""
    private = _private(plan)
    for delta, whose in ((private.delta, "the plan's delta"), (policy.ledger_delta, "the policy's ledger_delta")):
        if delta > 1 / patients:
            where = f"1/N = {1 / patients:.2g} of the {patients} patients of the {purpose} fold"
            return f"{whose} {delta:g} is above {where}; {1 / (10 * patients):.2g} would do"
    return None


def _check_deltas(plan: Plan, policy: Policy, patients: int, purpose: Fold) -> None:
    problem = delta_problem(plan, policy, patients, purpose)
    if problem is not None:
        raise SiteFailure(Code.PRIVACY_REFUSED, problem)


def _private(plan: Plan) -> DifferentialPrivacy:
    if plan.private is None:
        raise ValueError(f"plan {plan.digest[:12]} has no differential privacy")
    return plan.private


def _asked(private: DifferentialPrivacy, purpose: Fold) -> float:
    if purpose == "train":
        return private.epsilon
    if private.metrics_epsilon is None:
        raise SiteFailure(Code.PRIVACY_REFUSED, "the plan releases metrics and sets no budget apart for them")
    return private.metrics_epsilon
