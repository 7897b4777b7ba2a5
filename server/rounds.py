"""A run, round by round. Read this file from `run` down and you have followed one round.

    open the roster → agree on the configuration → for each round:
        send the model → admit and fold each reply as it arrives → quorum and deadline
        → strategy step → commit → evaluate

Under secure aggregation `gathered` and `measured` are those of :mod:`locum.server.secure`: what is folded is masked,
and one more exchange unmasks the sum.

Rules:
  * A site that fails, refuses or is late costs one contribution, and its reason is recorded; never the run.
  * A round below quorum is void: nothing of it is committed, and it is tried again. Between hospitals a run that has
    used up its attempts pauses until sites return or somebody stops it; on one machine it ends with the reasons.
  * A round counts only once it is on disk. Whatever dies, the run goes on from the last committed round.
  * What happens stands in the log; a round that is committed, once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from locum.common import build
from locum.common.errors import MEANING, Code, RunError
from locum.common.log.entries import MetricsEntry, RoundEntry, written
from locum.common.messages import (
    DESCRIBE,
    EVALUATE,
    TRAIN,
    Arrays,
    Carrier,
    DescribeTask,
    Description,
    EvaluateResult,
    EvaluateTask,
    MeasuredFold,
    TrainTask,
    pack,
)
from locum.common.plan import Plan
from locum.common.sums import CASES, Cell, cells_of, metric_lengths
from locum.common.tensor_files import forget_part
from locum.common.updates import l2_norm
from locum.server.admission import Refused, Update, admit, read, reasons
from locum.server.asking import (
    LATE,
    Engine,
    Gathered,
    Measured,
    Roster,
    Told,
    addressed,
    away_of,
    exchange,
    least_sites,
    unanswered,
)
from locum.server.checkpoints import Checkpoints, Committed
from locum.server.fold import Fold
from locum.server.link import Link
from locum.server.readiness import Heard, heard, unable
from locum.server.records import Bounds, CellRecord, Evaluated, Events, Number, RoundRecord
from locum.server.run_log import voided
from locum.server.secure import SecureSums
from locum.server.spending import Release, Statement, is_due, stated
from locum.server.strategies import strategy_of

#: Sums of metrics count cases, or add up fractions and millimetres over them.
_MOST_SUM = 1e12
#: Letters of what a site says of its configuration that a person is shown.
_MOST_SHOWN = 80


@dataclass(frozen=True)
class Finished:
    """A run that reached its last round: the chosen model, its round, the final test, and what was lost.

    `tested` is what the log is told of the test.
    """

    model: Arrays
    round: int
    history: tuple[RoundRecord, ...]
    test: Evaluated
    roster: Roster
    tested: MetricsEntry

    @property
    def losses(self) -> dict[str, list[int]]:
        """The rounds that each site of the roster did not contribute to."""
        lost = {site: [r.round for r in self.history if site not in r.sites] for site in self.roster.nodes}
        return {site: rounds for site, rounds in lost.items() if rounds}

    @property
    def status(self) -> Literal["completed", "completed with losses"]:
        """`completed`, or `completed with losses` if a site missed a round or the test, or could not take part."""
        complete = not (self.losses or self.roster.excluded or untested(self.test))
        return "completed" if complete else "completed with losses"


def run(engine: Engine) -> Finished:
    """Runs a plan from its last committed round to its end; raises RunError and keeps what is committed."""
    plan, events = engine.plan, engine.events
    committed = engine.checkpoints.latest() or commit_initial(plan, engine.checkpoints)
    engine.log.begin(engine.checkpoints.entries(committed.round))
    events.emit("started", plan=plan.name, digest=plan.digest, rounds=plan.rounds, round=committed.round)
    roster = _gathered(engine, committed)
    committed = replace(committed, roster=tuple(roster.nodes))
    committed = _measured(engine, roster, committed)
    while committed.round < plan.rounds:
        committed = _next_round(engine, roster, _rolled_back(engine, committed))
        committed = _measured(engine, roster, committed)
    chosen = _chosen(engine, committed)
    test, tested = _tested(engine, roster, chosen)
    finished = Finished(chosen.model, chosen.round, committed.history, test, roster, tested)
    events.emit("finished", status=finished.status, round=chosen.round, test=test.overall, lost=finished.losses)
    return finished


# --- before round 1


class TooFewError(RunError):
    """There are fewer sites than the quorum."""


def commit_initial(plan: Plan, checkpoints: Checkpoints) -> Committed:
    """Commits round 0, the model that the plan's seed gives. Only this step of a run needs torch at the coordinator."""
    initial = build.shared_tensors(*build.initial_state(plan))
    return checkpoints.commit(Committed(0, initial, strategy_of(plan).start(initial), (), ()))


def _gathered(engine: Engine, committed: Committed) -> Roster:
    """The roster, once there are sites enough for the quorum; raises RunError where nobody waits for more."""
    expected, log = build.configuration(engine.plan, committed.model), engine.log
    while True:
        try:
            roster = _same_roster(engine, committed, open_roster(engine, expected, committed.roster))
        except TooFewError as error:
            engine.link.wait(error, ())
        else:
            agreed = log.roster(roster, expected, number=committed.round, model=committed.model_sha256)
            log.append(*log.readiness(roster.readiness), agreed)
            log.seal()
            return roster


def open_roster(engine: Engine, expected: Mapping[str, str], begun: Collection[str] = ()) -> Roster:
    """Asks every node for its description; those that agree and are able form the roster, by name.

    Of a run that was `begun` with some sites, no other can hold up the rest by what it answers.

    Raises:
        RunError: a site's configuration differs, two nodes have one name, or too few sites are left for the quorum.
    """
    plan = engine.plan
    certified = engine.link.nodes(sorted(engine.grid.get_node_ids()))
    names = {(name or f"node {node}"): node for node, name in certified.items()}
    content = pack(DescribeTask(plan_digest=plan.digest))
    described: dict[str, tuple[int, Description]] = {}
    excluded = dict.fromkeys(names, LATE)
    for name, reply in exchange(engine, DESCRIBE, {name: (node, content) for name, node in names.items()}, group="0"):
        answer = read(reply, Description, plan)
        if isinstance(answer, Refused):
            excluded[name] = answer
            continue
        del excluded[name]
        node, found = names[name], answer[0]
        if certified[node] not in {None, found.site}:
            excluded[name] = Refused(f"it calls itself '{found.site}', which is not the name in its certificate")
            continue
        if found.site in described:
            raise RunError(f"two agents call themselves '{found.site}'", "give every site its own name")
        described[found.site] = (node, found)
    _agree(expected, {site: found for site, (_, found) in described.items() if site in begun or not begun})
    statements, unfit = _said(engine, [found for _, found in described.values()])
    excluded |= unfit
    able = {site: node for site, (node, _) in sorted(described.items()) if site not in excluded}
    _announce(engine, described, excluded)
    if len(able) < least_sites(plan):
        reason = _too_few(able, plan, excluded)
        raise TooFewError(reason, "mend these sites, or lower participation.quorum in the plan")
    policies = {site: found.policy for site, (_, found) in described.items() if site in able and found.policy}
    return Roster(able, excluded, policies, statements)


def _said(engine: Engine, described: Collection[Description]) -> tuple[dict[str, str], dict[str, Refused]]:
    """By site its signed statement of readiness, of those that count; and why sites cannot be selected."""
    statements: dict[str, str] = {}
    unfit: dict[str, Refused] = {}
    for found in described:
        statement = heard(found, engine.link.certificate(found.site), run=engine.log.run)
        refused = statement if isinstance(statement, Refused) else unable(found, statement)
        if isinstance(statement, Heard):
            statements[found.site] = statement.envelope
        if refused is not None:
            unfit[found.site] = refused
    return dict(sorted(statements.items())), unfit


def _too_few(able: Mapping[str, int], plan: Plan, excluded: Mapping[str, Refused]) -> str:
    told = "".join(f"\n  {site}: {refused.reason}" for site, refused in sorted(excluded.items()))
    secure = ", and a secure sum is of three at least" if plan.secured else ""
    return f"{len(able)} sites can take part, the plan's quorum is {plan.participation.quorum}{secure}{told}"


def _agree(expected: Mapping[str, str], described: Mapping[str, Description]) -> None:
    """Every site must resolve the plan to the same things as the coordinator."""
    differences = [
        f"{site}: {topic} is '{_shown(found.configuration.get(topic, 'missing'))}', here it is '{value}'"
        for site, found in sorted(described.items())
        for topic, value in expected.items()
        if found.configuration.get(topic) != value
    ]
    if differences:
        raise RunError(
            "the sites do not agree on the configuration:\n  " + "\n  ".join(differences),
            "install the same versions everywhere, or leave these sites out: locum run DIGEST --without SITE",
        )


def _shown(value: str) -> str:
    """What a site says, as far as a person wants to read it."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in value[:_MOST_SHOWN])


def _announce(
    engine: Engine, described: Mapping[str, tuple[int, Description]], excluded: Mapping[str, Refused]
) -> None:
    cases = {site: found.cases for site, (_, found) in sorted(described.items())}
    notices = {
        site: f"has no training case of {', '.join(found.missing_classes)}; set contract.single_class: exclude "
        "to leave such sites out"
        for site, (_, found) in sorted(described.items())
        if found.missing_classes and site not in excluded
    }
    engine.events.emit("roster", cases=cases, excluded=reasons(excluded), notices=notices)


def _same_roster(engine: Engine, committed: Committed, roster: Roster) -> Roster:
    """The roster that a resumed run began with: a site that is new stays outside, one that is away keeps its place.

    One whose data do not meet the contract any more has lost it.

    Raises:
        RunError: a site is gone, and nobody waits for it.
        TooFewError: too few are left whose data meet the contract.
    """
    if not committed.roster:
        return roster
    nodes = {**roster.nodes, **engine.link.current(committed.roster)}
    unfit = {site for site, refused in roster.excluded.items() if refused.code is Code.NOT_READY}
    kept = [site for site in committed.roster if site not in unfit]
    lost = sorted(set(kept) - set(nodes))
    if lost:
        raise RunError(f"the run was started with sites that are missing now: {', '.join(lost)}", "bring them back")
    if len(kept) < least_sites(engine.plan):
        raise TooFewError(
            _too_few(dict.fromkeys(kept, 0), engine.plan, roster.excluded), "mend the data of these sites"
        )
    outside = Refused("was not there when the run began", why="OUTSIDE")
    late = dict.fromkeys(sorted(set(roster.nodes) - set(committed.roster)), outside)
    excluded = {site: refused for site, refused in roster.excluded.items() if site not in kept}
    policies = {site: policy for site, policy in roster.policies.items() if site in kept}
    return Roster({site: nodes[site] for site in kept}, {**excluded, **late}, policies, roster.readiness)


# --- one round


def _next_round(engine: Engine, roster: Roster, committed: Committed) -> Committed:
    """Tries the next round until it has a quorum; raises RunError where nobody waits for sites to come back."""
    attempt = 0
    while True:
        attempt += 1
        result = one_round(engine, roster, committed, attempt)
        if isinstance(result, Committed):
            return result
        if attempt % engine.plan.participation.attempts == 0:
            engine.link.wait(_below_quorum(engine.plan, committed, result, attempt), sorted(result))


def _below_quorum(plan: Plan, committed: Committed, missing: Mapping[str, Refused], attempts: int) -> RunError:
    told = "".join(f"\n  {site}: {refused.reason}" for site, refused in sorted(missing.items()))
    codes = {refused.code for refused in missing.values() if refused.code is not None}
    remedy = "; ".join(sorted(MEANING[code][1] for code in codes)) or "bring the sites back"
    return TooFewError(
        f"round {committed.round + 1} stayed below its quorum of {plan.participation.quorum} in {attempts} "
        f"attempts; {committed.round} committed rounds are kept{told}",
        f"{remedy}; then resume",
    )


def one_round(engine: Engine, roster: Roster, committed: Committed, attempt: int) -> Committed | dict[str, Refused]:
    """One attempt at a round; returns the committed state, or why each missing site is missing."""
    began, number = time.monotonic(), committed.round + 1
    engine.events.emit("round", round=number, attempt=attempt)
    gather = gathered if engine.secure is None else engine.secure.gathered
    found = gather(engine, roster, committed, attempt)
    if found.totals is None or len(found.told) < engine.plan.participation.quorum:
        engine.events.emit("void", round=number, attempt=attempt, admitted=len(found.told), reason=found.void)
        return _void(engine, number, attempt, found.refused)
    model, strategy = engine.strategy.step(committed.model, found.totals, found.weight, committed.strategy)
    if not np.isfinite(l2_norm(model)):
        engine.events.emit("void", round=number, attempt=attempt, admitted=0, reason="the sum is not finite")
        refused = Refused("the sum is not finite", Code.UPDATE_REFUSED)
        return _void(engine, number, attempt, dict.fromkeys(roster.nodes, refused))
    record = _record(committed, model, found, began=began, attempt=attempt)
    after = Committed(number, model, strategy, committed.roster, (*committed.history, record))
    return _committed(engine, committed, after, found)


def _void(engine: Engine, number: int, attempt: int, refused: Mapping[str, Refused]) -> dict[str, Refused]:
    engine.log.append(engine.log.void(number, attempt, "train", refused))
    return dict(refused)


def _committed(engine: Engine, before: Committed, after: Committed, found: Gathered) -> Committed:
    """Puts a round on the disk and into the log; what a crash leaves out between the two, `begin` writes."""
    log, record, entries = engine.log, after.history[-1], list[RoundEntry]()

    def entry(model: str) -> bytes:
        entries.append(log.round(record, found, start=before.model_sha256, model=model))
        return written(entries[0])

    after = engine.checkpoints.commit(after, keep=_best_round(engine.plan, after.history), entry=entry)
    log.append(*entries)
    log.seal()
    engine.events.emit("committed", round=after.round, loss=record.loss, seconds=record.seconds)
    return after


def gathered(engine: Engine, roster: Roster, committed: Committed, _attempt: int) -> Gathered:
    """Sends the model and folds what comes back, in the clear; the secure way is in :mod:`locum.server.secure`."""
    plan, link, number = engine.plan, engine.link, committed.round + 1
    content = pack(
        TrainTask(plan_digest=plan.digest, round=number, start=committed.start),
        committed.model,
        link.outgoing(committed.model),
    )
    refused = away_of(engine, roster, number)
    outgoing = addressed(engine, roster, {site: content for site in roster.nodes if site not in refused})
    fold = Fold(committed.model, list(roster.nodes))
    told: dict[str, Told] = {}
    for site, reply in exchange(engine, TRAIN, outgoing, group=str(number)):
        verdict = admit(reply, plan, round_number=number, model=committed.model, carrier=link.incoming(site))
        spent = _spent(engine, site, verdict.header.spent, number, "train") if isinstance(verdict, Update) else None
        if isinstance(spent, Refused):
            verdict, spent = spent, None
        fold.offer(site, verdict if isinstance(verdict, Update) else None)
        if isinstance(verdict, Update):
            header = verdict.header
            told[site] = Told(header.weight, header.loss, header.seconds, spent)
            engine.events.emit("update", round=number, site=site, loss=header.loss)
        else:
            refused[site] = verdict
            engine.events.emit("refused", round=number, site=site, reason=verdict.reason)
    refused |= unanswered(engine, [site for site in roster.nodes if site not in told and site not in refused])
    totals = fold.close()
    for site in outgoing:
        link.taken(site)
    size = sum(tensor.nbytes for tensor in committed.model.values())
    return Gathered(totals, fold.weight, mean_loss(told), told, refused, bytes_up=size * len(told))


def _spent(engine: Engine, site: str, envelope: str | None, number: int, purpose: str) -> Statement | Refused | None:
    """The statement of what a site has spent that came with its answer; or why the answer does not count."""
    release = Release(engine.log.run, engine.plan.digest, number, purpose)
    due = is_due(engine.plan, purpose)
    certificate = engine.link.certificate(site) if due else None
    return stated(envelope, certificate, site=site, release=release, due=due)


def mean_loss(told: Mapping[str, Told]) -> float | None:
    """The mean training loss over the sites that told theirs, by weight."""
    known = [(each.weight, each.loss) for each in told.values() if each.loss is not None and each.weight is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * loss for weight, loss in known) / total if total else None


def _record(before: Committed, model: Arrays, found: Gathered, *, began: float, attempt: int) -> RoundRecord:
    size = sum(tensor.nbytes for tensor in model.values())
    told = {site: found.told[site] for site in sorted(found.told)}
    return RoundRecord(
        round=before.round + 1,
        attempt=attempt,
        start=before.start,
        sites=tuple(told),
        weight=found.weight,
        loss=found.loss,
        weights={site: each.weight for site, each in told.items() if each.weight is not None},
        losses={site: each.loss for site, each in told.items()},
        train_seconds={site: each.seconds for site, each in told.items() if each.seconds is not None},
        excluded={site: found.refused[site].reason for site in sorted(found.refused)},
        update_norm=_distance(model, before.model),
        bytes_down=size * (len(told) + len(found.refused)),
        bytes_up=found.bytes_up,
        seconds=time.monotonic() - began,
        secured=found.secured,
        epsilon={site: each.spent.spent.epsilon for site, each in told.items() if each.spent is not None},
    )


def _distance(model: Arrays, other: Arrays) -> float:
    """The L2 norm of the difference, tensor by tensor."""
    found = 0.0
    for name, tensor in model.items():
        found = math.hypot(found, l2_norm({name: tensor - other[name]}))
        forget_part(other[name])
    return found


# --- evaluation


def _measured(engine: Engine, roster: Roster, committed: Committed) -> Committed:
    """Evaluates a committed round on the validation fold if it is due and not yet done."""
    every, last = engine.plan.evaluation.every_rounds, engine.plan.rounds
    due = committed.round > 0 and (committed.round % every == 0 or committed.round in {1, last})
    if not due or committed.history[-1].evaluation is not None:
        return committed
    found, entry = evaluate(engine, roster, committed, "validation")
    engine.checkpoints.add_evaluation(found, written(entry))
    engine.log.append(entry)
    engine.events.emit("evaluated", round=found.round, overall=found.overall, per_site=found.per_site)
    record = committed.history[-1].model_copy(update={"evaluation": found})
    return replace(committed, history=(*committed.history[:-1], record))


def _tested(engine: Engine, roster: Roster, chosen: Committed) -> tuple[Evaluated, MetricsEntry]:
    """The final test; raises RunError where fewer sites than the quorum answer and nobody waits for them."""
    quorum = engine.plan.participation.quorum
    while True:
        test, entry = evaluate(engine, roster, chosen, "test")
        if len(roster.nodes) - len(test.silent) >= quorum:
            return test, entry
        engine.log.append(voided(entry))
        told = "".join(f"\n  {site}: {test.excluded[site]}" for site in test.silent)
        reason = f"fewer sites than the quorum of {quorum} answer in the final test; all rounds are kept{told}"
        engine.link.wait(TooFewError(reason, "bring the sites back; then resume"), test.silent)


def untested(test: Evaluated) -> dict[str, str]:
    """The sites whose numbers are missing, and why; one that has no case of the fold has answered."""
    return {site: reason for site, reason in test.excluded.items() if reason != MEANING[Code.NO_DATA][0]}


def evaluate(
    engine: Engine, roster: Roster, committed: Committed, fold: MeasuredFold
) -> tuple[Evaluated, MetricsEntry]:
    """The plan's metrics of a model on one fold, over all sites by adding up their sums, and per site where told.

    With them what the log is told, once they count.
    """
    plan, number = engine.plan, committed.round
    task = EvaluateTask(plan_digest=plan.digest, round=number, fold=fold)
    measure = measured if engine.secure is None else engine.secure.measured
    found = measure(engine, roster, committed.model, task)
    evaluated = Evaluated(
        round=number,
        fold=fold,
        overall=_values(plan, found.sums),
        per_site={site: _values(plan, found.per_site[site]) for site in sorted(found.per_site)},
        cases=dict(found.cases),
        sites=tuple(sorted(found.cases)),
        total=found.total,
        excluded=reasons(found.excluded),
        silent=found.silent,
        intervals=_intervals(plan, found.sums),
        site_intervals={site: _intervals(plan, found.per_site[site]) for site in sorted(found.per_site)},
        cells=tuple(_cell(plan, cell, found.sums) for cell in cells_of(plan, fold)) if found.sums else (),
    )
    return evaluated, engine.log.metrics(evaluated, found, model=committed.model_sha256)


def measured(engine: Engine, roster: Roster, model: Arrays, task: EvaluateTask) -> Measured:
    """Sends the model and adds up what comes back, in the clear."""
    plan = engine.plan
    content = pack(task, model, engine.link.outgoing(model))
    excluded = away_of(engine, roster, task.round)
    outgoing = addressed(engine, roster, {site: content for site in roster.nodes if site not in excluded})
    sums: dict[str, Arrays] = {}
    cases: dict[str, int | None] = {}
    spent: dict[str, Statement] = {}
    answered: set[str] = set()
    for site, reply in exchange(engine, EVALUATE, outgoing, group=str(task.round)):
        answered.add(site)
        answer = _read_sums(reply, task, plan, engine.link.incoming(site))
        if isinstance(answer, Refused):
            excluded[site] = answer
            continue
        statement = _spent(engine, site, answer[0].spent, task.round, task.fold)
        if isinstance(statement, Refused):
            excluded[site] = statement
            continue
        cases[site], sums[site] = answer[0].cases, answer[1]
        if statement is not None:
            spent[site] = statement
    late = [site for site in roster.nodes if site not in sums and site not in excluded]
    silent = tuple(sorted({*excluded, *late} - answered))
    excluded |= dict.fromkeys(late, LATE)
    for site in outgoing:
        engine.link.taken(site)
    added = _added([sums[site] for site in sorted(sums)])
    return Measured(added, sums, cases, total_of(cases), excluded, silent, spent)


def total_of(cases: Mapping[str, int | None]) -> int | None:
    """The number of cases of all sites; None if one does not tell its own."""
    known = [count for count in cases.values() if count is not None]
    return sum(known) if len(known) == len(cases) else None


def _added(sums: Sequence[Arrays]) -> Arrays:
    """The sums over several sites, in this order."""
    return {name: np.sum([part[name] for part in sums], axis=0) for name in (sums[0] if sums else ())}


def _values(plan: Plan, sums: Arrays) -> dict[str, Number]:
    """The plan's metrics of sums; None where there is nothing to compute them of."""
    classes = len(plan.contract.classes)
    return {name: build.metric_of(name).value(sums[name], classes) if sums else None for name in plan.released_metrics}


def _intervals(plan: Plan, sums: Arrays) -> dict[str, Bounds]:
    """The 95 % intervals of the released metrics that have one; none of sums with noise, which they do not know of."""
    if not sums or plan.private is not None:
        return {}
    classes, found = len(plan.contract.classes), {}
    for name in plan.released_metrics:
        of = build.metric_of(name).interval
        bounds = of(sums[name], classes) if of is not None else None
        if bounds is not None:
            found[name] = bounds
    return found


def _cell(plan: Plan, cell: Cell, sums: Arrays) -> CellRecord:
    """A cell's metrics."""
    own = {name: sums[cell.of(name)] for name in plan.released_metrics}
    count = sums.get(cell.of(CASES))
    return CellRecord(
        by=cell.by,
        value=cell.value,
        cases=None if count is None else round(float(count[0])),
        overall=_values(plan, own),
        intervals=_intervals(plan, own),
    )


def _read_sums(
    reply: Message | None, task: EvaluateTask, plan: Plan, carrier: Carrier
) -> tuple[EvaluateResult, Arrays] | Refused:
    """A site's metric sums: of the released metrics, float64 vectors of each metric's length within `_MOST_SUM`."""
    answer = read(reply, EvaluateResult, plan, carrier)
    if isinstance(answer, Refused):
        return answer
    (header, sums), lengths = answer, metric_lengths(plan, task.fold)
    if (header.round, header.fold) != (task.round, task.fold):
        return Refused(f"metrics of the {header.fold} fold in round {header.round}")
    if set(sums) != set(lengths):
        return Refused("the metrics are not those that the plan releases")
    if not all(array.dtype == np.float64 and ((array >= 0) & (array <= _MOST_SUM)).all() for array in sums.values()):
        return Refused(f"a metric's sums are not float64 numbers from 0 to {_MOST_SUM:g}")
    if any(array.shape != (lengths[name],) for name, array in sums.items()):
        return Refused("a metric's sums have another length")
    return answer


def _best_round(plan: Plan, history: tuple[RoundRecord, ...]) -> int | None:
    """The round whose first metric was best on validation; None if none was measured."""
    metric = build.metric_of(plan.evaluation.metrics[0])
    scored = [
        (metric.better * value, -record.round)
        for record in history
        if record.evaluation is not None and isinstance(value := record.evaluation.overall.get(metric.name), float)
    ]
    return -max(scored)[1] if scored else None


def _chosen(engine: Engine, committed: Committed) -> Committed:
    """The round whose model is the result: the last, or the best on validation if the plan says so."""
    best = _best_round(engine.plan, committed.history)
    if best is None or best == committed.round:
        return committed
    last = engine.plan.evaluation.select == "last" and not _collapsed(engine.plan, committed.history)
    return committed if last else engine.checkpoints.load(best)


def _collapsed(plan: Plan, history: tuple[RoundRecord, ...]) -> bool:
    """Whether the last round is worse on validation than the best one, by more than the plan allows."""
    allowed, metric = plan.evaluation.rollback, build.metric_of(plan.evaluation.metrics[0])
    if allowed is None or not history:
        return False
    values = {r.round: r.evaluation.overall.get(metric.name) for r in history if r.evaluation is not None}
    now, best = values.get(history[-1].round), values.get(_best_round(plan, history) or 0)
    return isinstance(now, float) and isinstance(best, float) and metric.better * (best - now) > allowed


def _rolled_back(engine: Engine, committed: Committed) -> Committed:
    """What the next round starts from: where validation has collapsed, the model and strategy that were best."""
    best = _best_round(engine.plan, committed.history)
    if best is None or not _collapsed(engine.plan, committed.history):
        return committed
    good = engine.checkpoints.load(best)
    engine.events.emit("rolled back", round=committed.round, to=best)
    return replace(committed, model=good.model, strategy=good.strategy, start=best)


def open_engine(plan: Plan, grid: Grid, checkpoints: Checkpoints, events: Events, link: Link) -> Engine:
    """Everything a run of `plan` needs."""
    secure = SecureSums(link.signer()) if plan.secured else None
    return Engine(plan, grid, strategy_of(plan), checkpoints, events, link, link.log(plan), secure)
