"""An empirical check of a model's privacy, where the patients are: membership inference, and canaries.

Rules:
  * It is asked for by the site's own staff or by a simulation. No message type leads to it, and nothing of it leaves:
    so nothing is reserved in the ledger.
  * Canaries take part in a real private round from the model on, whose result is thrown away.
  * What it finds is told with what it cannot show.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from locum.common.messages import Arrays
from locum.common.metrics import Floats, join
from locum.common.plan import Fold, Plan
from locum.site_client.privacy.attacks import FAILED, FALSE_ALARMS, Attack, Estimate, attack, patient_losses
from locum.site_client.privacy.budget import one_release
from locum.site_client.privacy.noise import NoiseSource
from locum.site_client.privacy.one_run import Audit, audit
from locum.site_client.session import Session, at_model, measure, open_session, patients
from locum.site_client.settings import Settings
from locum.site_client.training.canaries import Canaries
from locum.site_client.training.private import Engine, Setting, train_privately

#: A delta above this makes the bound from canaries say nothing.
_DELTA = 1e-5

#: What a check can say and what not, for whoever reads its numbers.
LIMITS = (
    "A low result proves nothing: stronger attacks exist, and one patient can be found where most are not.",
    "An area clearly above 0.5 shows that the model remembers whom it was trained on, if chance alone drew the folds.",
    "It is of the patients of a few hospitals: with fewer than 100 who were not trained on, 1 % of them is nobody.",
)
CANARY_LIMITS = (
    "Canaries test the noise and the clipping of the code that trains, in one round.",
    "A lower bound above the claim proves a fault; one below it proves no correctness.",
    "The observer of the canaries sees every step of the round; a coordinator sees its end only.",
)


@dataclass(frozen=True)
class Losses:
    """The loss of each patient: of the training fold, and of the two others."""

    members: Floats
    others: Floats


@dataclass(frozen=True)
class Finding:
    """What the check found at one site, or over several.

    Attributes:
        membership: the attack; None where one side has nobody.
        canaries: None for a plan without differential privacy, or over several sites.
    """

    membership: Attack | None
    canaries: Audit | None = None

    @property
    def failed(self) -> str:
        """What fault was proved; empty if none was."""
        return self.canaries.failed if self.canaries is not None else ""

    def as_dict(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def audit_of(content: Mapping[str, Any] | None) -> Audit | None:
    """An audit from its fields, as a worker tells them."""
    return None if content is None else Audit(**{**content, "auc": Estimate(**content["auc"])})


def check(settings: Settings, plan: Plan, model: Arrays) -> Finding:
    """The check of a model at one site, in this process; raises SiteFailure, LocumError."""
    session = open_session(settings, plan)
    at_model(session, model, plan.rounds)
    losses = losses_at(session)
    return Finding(attack(losses.members, losses.others), canaries_at(session))


def losses_at(session: Session) -> Losses:
    """The losses of the network as it stands, on every fold that has cases."""
    return Losses(_losses(session, ("train",)), _losses(session, ("validation", "test")))


def _losses(session: Session, folds: Sequence[Fold]) -> Floats:
    found = [measure(session, fold) for fold in folds if session.cases[fold]]
    return patient_losses(join(found)) if found else np.zeros(0)


def canaries_at(session: Session, *, noise: NoiseSource | None = None) -> Audit | None:
    """One private round with canaries from the network as it stands, which is then as it was before.

    None for a plan without differential privacy, and for a site without patients to train on. `noise` is the source
    that trains; a new one unless given.

    Raises:
        SiteFailure: as :func:`locum.site_client.training.private.train_privately` does.
    """
    plan, count = session.plan, patients(session)["train"]
    if plan.private is None or not count:
        return None
    mechanism, limit = one_release(plan, "train", count)
    engine = Engine(plan, copy.deepcopy(session.network), together=session.admitted())
    numbers = sum(parameter.numel() for parameter in engine.trainable.values())
    canaries = Canaries(numbers, mechanism, clip=plan.private.clip, noise=noise)
    setting = Setting(mechanism.noise, mechanism.rate)
    train_privately(plan, engine, session.people(), round_number=1, setting=setting, canaries=canaries)
    return audit(canaries.scores, canaries.included, mechanism, min(_DELTA, limit.delta))


# --- in words


def words_of(plan: Plan, finding: Finding) -> dict[str, str]:
    """What was found, by topic."""
    return {"Membership inference": of_attack(finding.membership), "Canaries": of_canaries(plan, finding.canaries)}


def limits_of(plan: Plan) -> tuple[str, ...]:
    """What the check of a plan's model can show and what not."""
    return LIMITS if plan.private is None else (*LIMITS, *CANARY_LIMITS)


def of_attack(found: Attack | None) -> str:
    """What membership inference found."""
    if found is None:
        return "cannot be tried: there must be patients that were trained on, and patients that were not"
    rates = "; ".join(
        f"{100 * one.value:.0f} % of the members are found at {100 * rate:.0f} % false alarms "
        f"({100 * one.low:.0f} % to {100 * one.high:.0f} %)"
        for rate, one in zip(FALSE_ALARMS, found.found, strict=True)
    )
    told = f"by their loss, {found.members} members and {found.others} others are told apart with an area of"
    return f"{told} {found.auc}, {_meaning(found.auc)}; {rates}"


def _meaning(area: Estimate) -> str:
    if area.low > 0.5:
        return "so the loss tells members from others"
    if area.high < 0.5:
        return "so members have the larger loss, and the folds differ by something else"
    return "which is what guessing has"


def of_canaries(plan: Plan, found: Audit | None) -> str:
    """What canaries showed."""
    if plan.private is None:
        return "do not apply: the plan has no differential privacy, and claims no epsilon"
    if found is None:
        return "were not tried"
    told = (
        f"of {found.canaries}, {found.included} were in; an observer of one round told them apart with an area of "
        f"{found.auc}, and the noise claimed predicts {found.predicted:.3f}. Epsilon of the round is at least "
        f"{found.bound:.2f} (95 % confidence), and {found.claimed:.2f} is claimed, both at delta {found.delta:.1g}"
    )
    return f"{FAILED}: {found.failed}. {told}" if found.failed else f"{told}: no fault was found"
