"""A run in words: its status, its plan, what was lost and why, what protected it and what did not.

Rules:
  * What is not in force is said as plainly as what is.
  * Nothing here judges; a sentence states what was measured or configured.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from locum.common.plan import DifferentialPrivacy, Part, Plan, SiteNoise, Told
from locum.common.secagg.ring import Ring, mean_error
from locum.common.secagg.roster import tolerated
from locum.common.sums import weight_cap
from locum.server.event_file import Event
from locum.server.records import RoundRecord, RunSummary, SecureRecord
from locum.server.report_results import Results, Score


def many(count: int, noun: str) -> str:
    """`1 case`, `2 cases`, `1,000 cases`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(words: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    items = list(words)
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def seconds(value: float) -> str:
    """A duration for a person."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = {"h": hours, "min": minutes, "s": 0 if hours else rest}
    return " ".join(f"{count} {unit}" for unit, count in parts.items() if count)


def size(value: float) -> str:
    """A number of bytes for a person, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def spans(rounds: Iterable[int]) -> list[tuple[int, int]]:
    """Round numbers as runs without a gap, first and last of each."""
    found: list[tuple[int, int]] = []
    for number in sorted(rounds):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def ranges(rounds: Iterable[int]) -> str:
    """Round numbers with runs joined: `3–5, 8`."""
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in spans(rounds))


# --- what happened


def set_up(event: Event) -> str:
    """An event `keys` in words: how many sites sum securely, and who is not among them."""
    without = [f"{site} ({reason})" for site, reason in sorted(event["excluded"].items())]
    text = f"{many(len(event['sites']), 'site')}, of which {event['threshold']} must answer to unmask a sum"
    return f"{text}; without {listed(without)}" if without else text


def rolled_back(event: Event) -> str:
    """An event `rolled back` in words."""
    number, best = event["round"], event["to"]
    return f"validation has collapsed after round {number}: the next one starts from the model of round {best}"


def void_of(event: Event, verb: str) -> str:
    """An event `void` in words; the verb is `is` or `was`."""
    reason = "; ".join(line.strip() for line in event.get("reason", "").splitlines())
    number, attempt = event["round"], event["attempt"]
    if "fold" in event:
        return f"the metrics of the {event['fold']} fold after round {number} have no sum: {reason}"
    if reason:
        return f"round {number} {verb} void (attempt {attempt}): {reason}"
    return f"round {number} {verb} below its quorum (attempt {attempt})"


# --- what was lost


@dataclass(frozen=True)
class Loss:
    """Contributions of one site that a run did without.

    Attributes:
        step: `training`, `validation` or `final test`; `the whole run` for a site left out.
        rounds: in words.
    """

    site: str
    step: str
    rounds: str
    reason: str


def losses_of(summary: RunSummary) -> list[Loss]:
    """Everything that a site did not contribute, with the reason: first sites left out, then rounds, then tests."""
    out = [Loss(site, "the whole run", "all", reason) for site, reason in sorted(summary.excluded.items())]
    missed: dict[tuple[str, str, str], list[int]] = {}
    for record in summary.history:
        for site, reason in record.excluded.items():
            missed.setdefault((site, "training", reason), []).append(record.round)
        for site, reason in (record.evaluation.excluded if record.evaluation else {}).items():
            missed.setdefault((site, "validation", reason), []).append(record.round)
    for site, reason in summary.test.excluded.items():
        missed.setdefault((site, "final test", reason), []).append(summary.test.round)
    rows = [Loss(site, step, ranges(rounds), reason) for (site, step, reason), rounds in missed.items()]
    return out + sorted(rows, key=lambda row: (row.step != "training", row.site))


def repeated(summary: RunSummary) -> str:
    """Rounds that needed several attempts, in words; empty if none did."""
    again = [f"round {record.round} ({record.attempt} attempts)" for record in summary.history if record.attempt > 1]
    return f"Below quorum and tried again: {listed(again)}." if again else ""


def status_of(summary: RunSummary) -> str:
    """The status of a run that has ended, with who was lost when, in words."""
    rounds = many(len(summary.history), "round")
    if not summary.lost and not summary.excluded:
        return f"Completed: all {len(summary.sites)} sites contributed to all of {rounds}."
    parts = [
        f"{site} missed {'round' if len(missed) == 1 else 'rounds'} {ranges(missed)} of {len(summary.history)}"
        for site, missed in sorted(summary.lost.items())
    ]
    parts += [f"{site} could not take part" for site in sorted(summary.excluded)]
    return f"Completed with losses: {'; '.join(parts)}."


# --- what came out


def headline(results: Results, fold: str = "test") -> str:
    """The first metric of the federated model, overall and at the worst site."""
    if not results.metrics:
        return ""
    score = results.federated.scores[0]
    name = results.metrics[0].name.replace("_", " ")
    told = f"the {fold} cases" if results.cases is None else many(results.cases, f"{fold} case")
    text = f"{name} {score.full_text} on {told} of {many(len(results.sites), 'site')}."
    if results.worst is not None:
        worst = results.worst
        cases = "" if worst.cases is None else f", {many(worst.cases, 'case')}"
        text += f" The worst site is {worst.site} with {worst.scores[0].full_text}{cases}."
    return text


def comparison(results: Results) -> str:
    """How the federated model stands to pooled data and to each site alone, in words; empty without baselines."""
    alone = [row.scores[0] for row in results.alone if row.scores[0].value is not None] if results.metrics else []
    score = results.federated.scores[0] if results.metrics else None
    if score is None or score.value is None or not alone:
        return ""
    beaten = sum(score.rank > other.rank for other in alone)
    text = f"The federated model is better than {beaten} of {many(len(alone), 'model')} that sites trained alone"
    pooled = results.pooled.scores[0] if results.pooled else None
    return f"{text}{_against(score, pooled)}."


def _against(score: Score, pooled: Score | None) -> str:
    if pooled is None or pooled.value is None or score.value is None:
        return ""
    gain = score.metric.better * (score.value - pooled.value)
    return f", and {abs(gain):.3f} {'better' if gain > 0 else 'worse'} than one trained on all data in one place"


# --- the plan


def _part(part: Part) -> str:
    parameters = ", ".join(f"{name} {_value(value)}" for name, value in part.parameters.items())
    return f"{part.name} ({parameters})" if parameters else part.name


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parts(parts: Iterable[Part]) -> str:
    return "; ".join(map(_part, parts)) or "none"


def _data_words(plan: Plan) -> dict[str, str]:
    contract, split = plan.contract, plan.contract.split
    modality = " or ".join(contract.modality) or "any modality"
    return {
        "Task": f"{contract.task} of {contract.dimensions}D images ({modality}, {many(contract.channels, 'channel')})",
        "Classes": ", ".join(contract.classes),
        "Needed of a site": f"at least {many(contract.least_patients, 'training patient')}; "
        f"voxel spacing {contract.spacing.least:g} to {contract.spacing.most:g} mm",
        "Folds": f"by patient: {split.train:.0%} training, {split.validation:.0%} validation, {split.test:.0%} test "
        "where no table says otherwise",
        "Preparation": _parts(plan.transforms.prepare),
        "Augmentation": _parts(plan.transforms.augment),
    }


def _training_words(plan: Plan) -> dict[str, str]:
    training = plan.training
    amount = many(training.local_steps, "step") if training.local_steps else many(training.local_epochs or 0, "epoch")
    weighting = "its number of training cases" if plan.participation.weighting == "cases" else "an equal weight"
    clip = f", gradients clipped at norm {training.gradient_clip:g}" if training.gradient_clip else ""
    return {
        "Network": f"{_part(plan.network)}, input {' × '.join(map(str, training.input_size))}",
        "Loss": _part(plan.loss),
        "Optimiser": f"{_part(plan.optimiser)}, {training.schedule} rate",
        "In one round": f"each site trains {amount} of {many(training.batch_size, 'case')}, {training.sampling} "
        f"sampling, {training.precision}{clip}",
        "Strategy": f"{_part(plan.strategy)}; a site counts with {weighting}",
    }


def _run_words(plan: Plan) -> dict[str, str]:
    participation, evaluation = plan.participation, plan.evaluation
    return {
        "Rounds": f"{plan.rounds}; quorum {many(participation.quorum, 'site')}, deadline "
        f"{seconds(participation.deadline)}, up to {many(participation.attempts, 'attempt')}",
        "Measured": f"{', '.join(evaluation.metrics)}; on validation cases every "
        f"{'round' if evaluation.every_rounds == 1 else many(evaluation.every_rounds, 'round')}{_apart(plan)}",
        "Chosen model": "of the last round" if evaluation.select == "last" else "of the best round on validation cases",
        "Released by a site": _release_words(plan),
        "Admission": f"an update's norm at most {plan.admission.norm_bound:g}, weight at most "
        f"{plan.admission.weight_cap:g}, all values finite",
        "Seed": f"{plan.seed}; {'deterministic' if plan.deterministic else 'not deterministic'}",
    }


def _apart(plan: Plan) -> str:
    named = [f"{group.by} ({', '.join(group.values)}, other)" for group in plan.evaluation.subgroups]
    return f"; on test cases also by {listed(named)}" if named else ""


_TOLD: Mapping[Told, str] = {"metrics": "metric sums", "training_loss": "training loss", "case_counts": "case counts"}


def _release_words(plan: Plan) -> str:
    """What leaves a site; under secure aggregation, what of it can be seen by itself."""
    release = plan.release
    told = [*(["training loss"] if release.training_loss else []), *(["case counts"] if release.case_counts else [])]
    everything = ", ".join(["its update", *(f"{metric} sums" for metric in plan.released_metrics), *told])
    if not plan.secured:
        return everything
    own = [words for what, words in _TOLD.items() if plan.tells(what)]
    return f"as parts of sums over the sites: {everything}; by themselves: {listed(own) or 'none of these'}"


def plan_words(plan: Plan) -> dict[str, str]:
    """The plan, a topic to a line."""
    return {**_data_words(plan), **_training_words(plan), **_run_words(plan)}


# --- protection


def protection_words(plan: Plan, history: Sequence[RoundRecord]) -> list[tuple[str, str]]:
    """What protects the sites' data in this run, and what does not: a short name and a sentence each."""
    update = "the masked update" if plan.secured else "the update"
    return [
        ("Images stay at the site", f"Only {update}, and the numbers that the plan releases, leave a site."),
        *(_secure_aggregation(plan, history) if plan.secured else [("No secure aggregation", _NOT_SECURED)]),
        _differential_privacy(plan, history),
        ("Admission", _admission(plan)),
    ]


_NOT_SECURED = (
    "Updates were not encrypted against the aggregator: the coordinator has seen each site's update, and an update can "
    "reveal something of the images it was made from."
)


def _secure_aggregation(plan: Plan, history: Sequence[RoundRecord]) -> list[tuple[str, str]]:
    own = [words for what, words in _TOLD.items() if plan.tells(what)]
    beside = f", beside the {listed(own)} that the plan has each site tell" if own else ""
    masked = (
        "Each site masks what it gives before it leaves. The coordinator has seen sums over the sites, of updates and "
        f"of numbers, and nothing of a single site{beside}. {_rosters(history)}"
    )
    still = (
        "Secure aggregation hides who gave what. It does not make the sum private, nor the model: only differential "
        "privacy does. This combination needs outside cryptographic review before it protects real patients."
    )
    noise = plan.protection.site_noise
    return [
        ("Secure aggregation", masked),
        ("Rounding", _rounding(plan, history)) if noise is None else ("Site noise", _site_noise(noise, history)),
        ("What a sum still tells", still),
    ]


def _site_noise(noise: SiteNoise, history: Sequence[RoundRecord]) -> str:
    """What the noise of the sites hides, what it does not, and how large it was."""
    sizes = [record.secured.noise for record in history if record.secured is not None]
    large = f"; in a round's mean its standard deviation was up to {max(sizes):.2g} a number" if sizes else ""
    return (
        f"Each site clipped its update to a norm of {noise.clip:g} and added noise of Skellam's distribution before it "
        f"masked it{large}. It hides which site gave what: of all updates of this run, epsilon {noise.epsilon:g} at "
        f"delta {noise.delta:g} for one site. Sums of losses, metrics and counts have no such noise. It is no "
        "differential privacy of patients, and not in place of it."
    )


def _rosters(history: Sequence[RoundRecord]) -> str:
    """The sizes of the rosters, and what they withstand."""
    sums = [record.secured for record in history if record.secured is not None]
    return " ".join(dict.fromkeys(map(_roster, sums)))


def _roster(of: SecureRecord) -> str:
    together = tolerated(of.sites)
    return (
        f"A roster of {many(of.sites, 'site')}: {of.threshold} of them had to answer, for one set of sites, before a "
        f"sum was unmasked; {many(together, 'site')} that worked together with the coordinator could not see more."
    )


def _rounding(plan: Plan, history: Sequence[RoundRecord]) -> str:
    bits, bound, cap = plan.protection.ring, plan.admission.norm_bound, weight_cap(plan)
    errors = [
        mean_error(Ring(bits, record.secured.sites, bound), cap, record.weight)
        for record in history
        if record.secured is not None
    ]
    most = f": no number of a round's mean update is off by more than {max(errors):.1e}" if errors else ""
    return f"Updates are summed in fixed point, {bits} bits a number, for a norm of at most {bound:g}{most}."


def _admission(plan: Plan) -> str:
    bound = f"finite, of the right form, and of norm at most {plan.admission.norm_bound:g}"
    if not plan.secured:
        return (
            f"An update is refused unless it is {bound}. This bounds one site's influence; it is not differential "
            "privacy."
        )
    return (
        f"Each site checks before it masks that its update is {bound}; the coordinator checks that the sum is one that "
        "such updates can have. This is not differential privacy."
    )


#: The source of noise of every site of this version.
NOISE = "a Gaussian by Box–Muller from AES-256-CTR, seeded by the operating system"


def _differential_privacy(plan: Plan, history: Sequence[RoundRecord]) -> tuple[str, str]:
    privacy = plan.private
    if privacy is None:
        clip = plan.training.gradient_clip
        clipped = f" Gradients are clipped at norm {clip:g}: clipping, not differential privacy." if clip else ""
        sentence = (
            "Nothing bounds what the model, or an update, reveals of a single patient. Whether a patient was in the "
            f"training data may be inferred from the model.{clipped}"
        )
        return "No differential privacy", sentence
    return "Differential privacy, by PATIENT", _bounded(privacy, spent_of(history))


def _bounded(privacy: DifferentialPrivacy, spent: Mapping[str, float]) -> str:
    metrics = (
        "no metric is released" if privacy.metrics_epsilon is None else
        f"the released metrics of a fold epsilon {privacy.metrics_epsilon:g}"
    )  # fmt: skip
    stated = listed(f"{site} {epsilon:.3g}" for site, epsilon in sorted(spent.items()))
    told = f" What the sites have signed to have spent in this run: {stated}." if spent else ""
    return (
        f"The unit is the PATIENT, with all images of one. All updates of this run together cost a patient of a site "
        f"at most epsilon {privacy.epsilon:g} at delta {privacy.delta:g}, or at 1/(10·N) for N patients of the site "
        f"where that is less; {metrics}. The gradient of each patient was clipped at norm {privacy.clip:g} (DP-SGD, "
        f"Abadi 2016; a patient's images count as none), and the noise was {NOISE}. The numbers of patients are not "
        f"protected.{told}"
    )


def spent_of(history: Sequence[RoundRecord]) -> dict[str, float]:
    """By site, the last epsilon that it has signed to have spent on updates."""
    return {site: epsilon for record in history for site, epsilon in record.epsilon.items()}


def versions() -> Mapping[str, str]:
    """The software that ran."""
    packages = ("locum", "torch", "monai", "flwr", "numpy")
    return {**{name: version(name) for name in packages}, "Python": platform.python_version()}
