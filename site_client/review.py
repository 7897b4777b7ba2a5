"""A plan in words, for the steward who decides whether it may run here.

Rules:
  * The words are made from the plan and the policy alone, so that what is shown is what the gate does.
  * Where there is no protection, that is said in the first word.
  * Text of other people is shown without control characters: it cannot move a terminal's cursor or hide what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from locum.common.envelope import Approval, Proposal
from locum.common.plan import Contract, DifferentialPrivacy, Part, Plan
from locum.common.secagg import LEAST_SITES
from locum.common.secagg.roster import threshold_of
from locum.common.sums import cells_of
from locum.site_client import gate
from locum.site_client.gate import Policy

Words = tuple[str, ...]


def printable(text: str) -> str:
    """The text with every control, format and line-break character replaced."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def day_and_time(seconds: float) -> str:
    """A time in seconds since 1970, by the clock on the wall."""
    return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d %H:%M}"


@dataclass(frozen=True)
class Held:
    """A proposal that this site holds, and its plan."""

    proposal: Proposal
    plan: Plan

    @property
    def digest(self) -> str:
        """The plan's digest."""
        return self.proposal.digest


@dataclass(frozen=True)
class Standing:
    """Where a plan stands at this site.

    Attributes:
        approvals: since the last revocation, one a steward.
        revoked: the last revocation, if nothing was approved since.
        needed: how many different stewards must approve.
    """

    approvals: tuple[Approval, ...]
    revoked: Approval | None
    needed: int

    @property
    def stands(self) -> bool:
        """Whether enough stewards approve."""
        return len(self.approvals) >= self.needed

    def in_words(self) -> str:
        """One line for a person."""
        names = ", ".join(f"{printable(one.steward)} ({day_and_time(one.at)})" for one in self.approvals)
        if self.stands:
            return f"approved by {names}"
        if self.approvals:
            return f"waits for another steward; approved by {names}"
        if self.revoked is not None:
            return f"revoked by {printable(self.revoked.steward)} ({day_and_time(self.revoked.at)})"
        return "not approved"

    def as_dict(self) -> dict[str, Any]:
        """The same for scripts."""
        return {
            "stands": self.stands,
            "stewards_needed": self.needed,
            "approvals": [{"steward": one.steward, "at": one.at} for one in self.approvals],
            "revoked_at": None if self.revoked is None else self.revoked.at,
        }


@dataclass(frozen=True)
class Review:
    """A proposal in words.

    Attributes:
        held: the proposal.
        standing: what this site said to it.
        policy: what the site allows.
        ledger: what the site's privacy ledger would say of a run; empty if it was not asked.
    """

    held: Held
    standing: Standing
    policy: Policy
    ledger: Words = ()

    @property
    def sections(self) -> dict[str, Words]:
        """What the plan does, and what policy and ledger say to it, under headings."""
        plan = self.held.plan
        ledger = {"This site's ledger": self.ledger} if self.ledger else {}
        policy = {"This site's policy": policy_in_words(self.policy, plan)}
        return {**plan_in_words(plan, self.policy), **ledger, **policy}

    def text(self) -> str:
        """All of it, for a terminal."""
        proposal, plan = self.held.proposal, self.held.plan
        head = [
            f"plan {plan.name}  {proposal.digest}",
            f"proposed by {printable(proposal.by)}, {day_and_time(proposal.proposed_at)}",
            f"purpose: {printable(plan.purpose)}",
        ]
        body = [line for title, words in self.sections.items() for line in ("", title, *(f"  {one}" for one in words))]
        return "\n".join([*head, *body, "", f"State: {self.standing.in_words()}"])

    def as_dict(self) -> dict[str, Any]:
        """All of it, for scripts."""
        proposal, plan, standing = self.held.proposal, self.held.plan, self.standing
        return {
            "digest": proposal.digest,
            "name": plan.name,
            "purpose": plan.purpose,
            "proposed_by": proposal.by,
            "proposed_at": proposal.proposed_at,
            **standing.as_dict(),
            "sections": {title: list(words) for title, words in self.sections.items()},
        }


def plan_in_words(plan: Plan, policy: Policy) -> dict[str, Words]:
    """What the plan does with a site's data, under headings; `policy` may keep back what the plan would release."""
    return {
        "Data": _data(plan),
        "Network": _network(plan),
        "Rounds": _rounds(plan),
        "What leaves this site": _leaves(plan, policy),
        "What stays": _stays(plan, policy),
        "Privacy": _privacy(plan, policy),
    }


def policy_in_words(policy: Policy, plan: Plan) -> Words:
    """What the site's policy says to the plan."""
    forbidden = tuple(f"Forbids it ({refusal.clause}): {refusal.detail}." for refusal in gate.refusals(policy, plan))
    hours = f"Lets it run in these hours: {_listed(map(str, policy.hours))}." if policy.hours is not None else ""
    stewards = f"Asks for the approval of {policy.stewards} different stewards." if policy.stewards > 1 else ""
    idle = policy.min_sites > LEAST_SITES and not plan.secured
    sites = f"Its min_sites of {policy.min_sites} is for secure sums, and this plan has none." if idle else ""
    return _kept(*(forbidden or ("Allows it.",)), sites, hours, stewards)


def _data(plan: Plan) -> Words:
    contract = plan.contract
    spacing, split = contract.spacing, contract.split
    narrowed = (spacing.least, spacing.most) != (0.0, 1000.0)
    return _kept(
        f"Task: {contract.task} of {_listed(contract.modality) or 'images of any modality'}, "
        f"{contract.dimensions}D, {_number(contract.channels, 'channel')}.",
        f"Classes: {_listed(contract.classes)}.",
        f"Voxel spacing from {spacing.least:g} to {spacing.most:g} mm." if narrowed else "",
        *_of_images(contract),
        f"At least {_number(contract.least_patients, 'patient')} for training.",
        *_of_patients_asked(contract),
        "A site whose cases are all of one class is left out." if contract.single_class == "exclude" else "",
        f"Patients: {split.train:.0%} to train, {split.validation:.0%} to choose the model, {split.test:.0%} to test.",
        f"Prepared by: {_parts(plan.transforms.prepare) or 'nothing'}.",
        f"Varied at random by: {_parts(plan.transforms.augment) or 'nothing'}.",
    )


def _of_images(contract: Contract) -> Words:
    """Which images are used, beyond modality and spacing."""
    first, last = contract.months.first, contract.months.last
    months = f"{f' from {first}' if first else ''}{f' to {last}' if last else ''}"
    return _kept(
        f"SOP classes: {_listed(contract.sop_classes)}." if contract.sop_classes else "",
        f"Body parts: {_listed(contract.body_parts)}." if contract.body_parts else "",
        f"Orientation: {_listed(contract.orientation)}." if contract.orientation else "",
        f"At least {contract.least_slices} slices." if contract.least_slices > 1 else "",
        f"Studies{months}." if months else "",
    )


def _of_patients_asked(contract: Contract) -> Words:
    """What the site must have or declare as a whole."""
    strata = [f"{one.by} {one.value}, {_number(one.least_patients, 'patient')}" for one in contract.strata]
    shares = [f"{name} {share.least:.0%} to {share.most:.0%}" for name, share in contract.prevalence.items()]
    codes = [f"{name} {', '.join(known)}" for name, known in contract.codes.items()]
    return _kept(
        f"At least of each group: {_listed(strata)}." if strata else "",
        f"Shares of patients: {_listed(shares)}." if shares else "",
        f"Codes that classes must have in this site's terminology map: {_listed(codes)}." if codes else "",
        "DICOM must have been cleaned with the Basic Profile of PS3.15." if contract.deidentified else "",
        "Faces must have been removed." if contract.deface == "required" else "",
        "This site must keep a list of withdrawn consent." if contract.consent == "required" else "",
    )


def _network(plan: Plan) -> Words:
    roles = plan.tensors
    return _kept(
        f"{_parts([plan.network])}, with new weights drawn from the seed {plan.seed}.",
        f"Loss: {_parts([plan.loss])}. Optimiser: {_parts([plan.optimiser])}.",
        f"Weights that never change: {_listed(roles.frozen)}." if roles.frozen else "",
    )


def _rounds(plan: Plan) -> Words:
    training, taking_part = plan.training, plan.participation
    work = f"{_number(training.local_steps, 'step')}" if training.local_steps else f"{training.local_epochs} epochs"
    return (
        f"{_number(plan.rounds, 'round')} of {plan.strategy.name}; in each, {work} of {training.batch_size} cases.",
        f"A round counts with the updates of at least {_number(taking_part.quorum, 'site')}.",
        f"It waits up to {taking_part.deadline / 60:g} min for a site.",
        "Until it is revoked, an approval is for any number of runs of this plan, and for a round as often as asked.",
    )


def _leaves(plan: Plan, policy: Policy) -> Words:
    counts = plan.tells("case_counts") and policy.release_case_counts
    shared, bare = plan.tensors.shared, plan.private is None
    return _kept(
        "Before round 1: versions of the installed packages, names and shapes of the network's tensors, and which "
        "clauses of the contract this site's data meet, signed.",
        _told_of_patients(plan, policy),
        "Before round 1: the number of cases in each fold, and classes without a case." if counts and bare else "",
        *(_given_to_sums(plan) + _told_beside(plan, policy) if plan.secured else _given_plain(plan, policy)),
        *_subgroups(plan, policy),
        "" if bare else "With update and metrics: this site's signed statement of the epsilon that the run has spent.",
        f"Shared by name, running statistics too where a name covers them: {_listed(shared)}." if shared else "",
        "When something fails: a code, no text.",
    )


def _told_of_patients(plan: Plan, policy: Policy) -> str:
    """What the statement of readiness tells in numbers."""
    if plan.private is not None or not plan.release.case_counts or not policy.release_case_counts:
        return f"It counts no patients but those whose consent was withdrawn, in steps of {policy.least_cell}."
    return (
        "With it, if they meet all: how many training patients there are, also by sex, age band and maker of the "
        f"scanner, in steps of {policy.least_cell}: of fewer than that nothing is said."
    )


def _subgroups(plan: Plan, policy: Policy) -> Words:
    """What is summed apart in the final test, and whom that can show."""
    if not cells_of(plan, "test"):
        return ()
    named = _listed([f"{group.by} {value}" for group in plan.evaluation.subgroups for value in group.values])
    only = " Where no other site has such cases, a sum over the sites shows this site's own." if plan.secured else ""
    few = f"if it has {policy.least_cell} patients or more of it, and over all others"
    return (f"At the end, the same sums also over the cases of {named}, {few}.{only}",)


def _given_plain(plan: Plan, policy: Policy) -> Words:
    by_cases = plan.participation.weighting == "cases"
    return _kept(
        f"After each round: {_update(plan)}{'' if plan.private else ', and the seconds it took'}.",
        f"After each round: the number of training {_counted(plan)}, as the update's weight." if by_cases else "",
        "After each round: the mean training loss." if _tells_loss(plan, policy) else "",
        _own_metrics(plan) if plan.released_metrics else "",
    )


def _given_to_sums(plan: Plan) -> Words:
    """What leaves under masks; the policy has no say in it, for nobody sees it of one site."""
    cap, by_cases = plan.admission.weight_cap, plan.participation.weighting == "cases"
    counted = f" (its number of training {_counted(plan)}, up to {cap:g})" if by_cases else ""
    weight = f"this site's weight{counted}"
    loss = ", and the mean training loss" if plan.release.training_loss else ""
    cases = f", and the number of {_counted(plan)}" if plan.release.case_counts else ""
    metrics = f"the sums over the cases from which {_listed(plan.released_metrics)} {_is(plan)} computed"
    measured = metrics + cases if plan.released_metrics else cases.removeprefix(", and ")
    return _kept(
        "Before round 1, and when the sites change: public keys, this site's certificate, and a secret for each other "
        "site, sealed to it.",
        f"After each round, under masks that come off the sum over the sites alone: {_update(plan)}; {weight}{loss}.",
        f"{_when_measured(plan)}, under such masks: {measured}." if measured else "",
        "When a sum is closed: shares of the keys that take the masks off it, once for each sum.",
    )


def _told_beside(plan: Plan, policy: Policy) -> Words:
    """What a site tells of itself although sums are secure."""
    counts = plan.tells("case_counts") and policy.release_case_counts
    return _kept(
        f"IN THE CLEAR, each time it gives to a sum: this site's own number of {_counted(plan)}." if counts else "",
        "IN THE CLEAR, after each round: this site's own mean training loss." if _tells_loss(plan, policy) else "",
        f"IN THE CLEAR, of this site alone: {_own_metrics(plan)}" if _tells_metrics(plan, policy) else "",
    )


def _update(plan: Plan) -> str:
    noise = " with noise" if plan.private is not None else ""
    bound = f"L2 norm up to {plan.admission.norm_bound:g}"
    return f"the update, which is the change of the shared weights{noise} ({bound})"


def _counted(plan: Plan) -> str:
    """What numbers are told of: with differential privacy those of patients are not protected, those of images are."""
    return "patients" if plan.private is not None else "cases"


def _own_metrics(plan: Plan) -> str:
    bare = "they tell the number of cases, and where there are few they can tell of single ones"
    return (
        f"{_when_measured(plan)}: sums over the cases from which {_listed(plan.released_metrics)} {_is(plan)} "
        f"computed; {bare if plan.private is None else 'they have noise'}."
    )


def _is(plan: Plan) -> str:
    return "is" if len(plan.released_metrics) == 1 else "are"


def _when_measured(plan: Plan) -> str:
    return f"{_every(plan.evaluation.every_rounds)} and at the end"


def _tells_loss(plan: Plan, policy: Policy) -> bool:
    return plan.tells("training_loss") and policy.release_training_loss


def _tells_metrics(plan: Plan, policy: Policy) -> bool:
    return plan.tells("metrics") and (not plan.secured or policy.release_site_metrics)


def _stays(plan: Plan, policy: Policy) -> Words:
    metrics = _tells_metrics(plan, policy)
    counted = (plan.tells("case_counts") and policy.release_case_counts) or metrics
    local, only = plan.tensors.local, " of this site by itself" if plan.secured else ""
    return _kept(
        "Images, masks, labels, results of single cases, identifiers of patients, file names, texts of errors.",
        "The update of this site by itself." if plan.secured else "",
        "Running statistics of normalisation layers." if not plan.tensors.shared else "",
        f"Weights that the plan keeps at each site: {_listed(local)}." if local else "",
        f"The number of cases{only}." if not counted else "",
        f"The mean training loss{only}." if not _tells_loss(plan, policy) else "",
        f"The metrics{only}." if plan.secured and not metrics else "",
    )


def _privacy(plan: Plan, policy: Policy) -> Words:
    clipped = plan.training.gradient_clip is not None and plan.private is None
    return _kept(
        *(_of_patients(plan.private, plan) if plan.private is not None else (_BARE,)),
        *(_secure(policy) if plan.secured else (_PLAIN,)),
        *_site_noise(plan),
        "Gradients are clipped; that is not differential privacy." if clipped else "",
    )


def _of_patients(private: DifferentialPrivacy, plan: Plan) -> Words:
    """What differential privacy promises a patient, and what it does not."""
    measured = private.metrics_epsilon is not None and bool(plan.released_metrics)
    several = f"; of up to {private.images} images of a patient in a step the mean counts" if private.images > 1 else ""
    return _kept(
        f"Differential privacy per patient: epsilon {private.epsilon:g}, delta {private.delta:g} or a tenth of one in "
        "the number of patients, of all updates of a run together.",
        f"Of the metrics: epsilon {private.metrics_epsilon:g} more for each fold that is measured." if measured else "",
        f"The gradient of each patient is clipped to a norm of {private.clip:g}{several}.",
        f"A run may repeat {_number(private.spare_rounds, 'round')}; more than that is refused here.",
        "More runs add up: this site's ledger keeps count, and refuses what would pass the lifetime's epsilon.",
        "NOT protected: how many patients there are, and whether the contract is met.",
    )


_BARE = "NONE in the update: no differential privacy. An update can give away something of single images."


def _site_noise(plan: Plan) -> Words:
    """What noise on the site's own update hides, and what it does not."""
    noise = plan.protection.site_noise
    if noise is None:
        return ()
    bare = [
        *plan.released_metrics,
        *(["the training loss"] if plan.release.training_loss else []),
        *(["the numbers of cases"] if plan.release.case_counts else []),
    ]
    return _kept(
        f"Noise that hides which site gave what: epsilon {noise.epsilon:g}, delta {noise.delta:g} for this site, of "
        f"all its updates of one run together; more runs add up. Its update is clipped to a norm of {noise.clip:g}.",
        f"NOT covered by that noise: the sums of {_listed(bare)}." if bare else "",
        "NOT a protection of patients: it hides this site among the sites. Of patients only differential privacy per "
        "patient says anything.",
    )


_PLAIN = "NONE towards the coordinator: no secure aggregation. It sees this site's update by itself."


def _secure(policy: Policy) -> Words:
    """What secure aggregation does, and what it does not."""
    examples = ", ".join(f"{threshold_of(sites)} of {sites}" for sites in (3, 5, 10))
    sites = f"This site gives to sums of at least {policy.min_sites} sites, itself among them (min_sites)."
    enough = f"Of the n sites of a set-up at least \N{LEFT FLOOR}2n/3\N{RIGHT FLOOR} + 1 must give: {examples}."
    others = (
        "NOT excluded: sites that work together with the coordinator know their own part of a sum and take it away."
    )
    enrolled = "Whoever runs the federation's authority can enrol such sites."
    return (
        "Secure aggregation: the coordinator sees the sum over sites, not this site's update.",
        f"{sites} {enough} Of fewer nobody sees the sum.",
        "NOT hidden: the sum. Of few sites, or beside a sum of other sites, it can tell of one of them.",
        f"{others} {enrolled}",
        "NOT reviewed yet by cryptographers from outside.",
    )


def _parts(parts: Sequence[Part]) -> str:
    return ", ".join(map(_part, parts))


def _part(part: Part) -> str:
    parameters = ", ".join(f"{key} {_value(value)}" for key, value in part.parameters.items())
    return printable(f"{part.name} ({parameters})" if parameters else part.name)


def _value(value: object) -> str:
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, list | tuple) else str(value)


def _listed(items: Iterable[str]) -> str:
    return printable(", ".join(items))


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _every(rounds: int) -> str:
    return "After each round" if rounds == 1 else f"Every {rounds} rounds"


def _kept(*sentences: str) -> Words:
    return tuple(sentence for sentence in sentences if sentence)
