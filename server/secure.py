"""Secure sums at the coordinator: a set-up once in a while, and two exchanges a sum. Read `gathered` first.

    set up:   keys of every site → the signed roster → a secret of each pair, which the coordinator cannot read
    a sum:    the sealed model goes out → masked uploads are folded as they come → who gave is told to those who gave
              → their shares unmask the sum, and nothing else

Rules:
  * A site that is lost before it gives is left out. One that is lost after it gave is in the sum, as long as t sites
    of the roster answer.
  * A sum that cannot be unmasked, or fails its check, is void. It is never tried over fewer sites: the round trains
    again.
  * Sites that are not in the roster are asked for keys again after 1, 2, 4, … attempts at a round; a site that has lost
    its keys at once.
  * After a void sum keys are set up anew, without the sites that did not give to it, if enough others are there: so t
    sites of the roster may be more than the quorum, and those who are lost for good cost the run nothing.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from locum.common.canonical import sha256_hex
from locum.common.errors import MEANING, Code
from locum.common.identity import base64url
from locum.common.messages import (
    BLOB_THRESHOLD,
    EVALUATE,
    INLINE,
    TRAIN,
    UNMASK,
    Arrays,
    EvaluateTask,
    Fields,
    Header,
    MaskedResult,
    Secured,
    TrainTask,
    UnmaskResult,
    UnmaskTask,
    assemble,
    body_of,
    pack,
)
from locum.common.plan import Plan
from locum.common.secagg import LEAST_SITES, MOST_SITES, keys
from locum.common.secagg.aggregator import SecureSum
from locum.common.secagg.calibration import HEADROOM
from locum.common.secagg.ring import Ring, read_scalars
from locum.common.secagg.roster import (
    Context,
    Purpose,
    SecureRefusal,
    sign,
)
from locum.common.secagg.roster import Roster as SignedRoster
from locum.common.secagg.site import model_purpose
from locum.common.secagg.upload import TOLD, Layout
from locum.common.sums import CASES, LOSS, MOST_SUM, WEIGHT, metric_lengths, metrics_layout, training_layout, weight_cap
from locum.common.tensor_files import Mapped
from locum.server.admission import Refused, read
from locum.server.asking import (
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
from locum.server.checkpoints import Committed
from locum.server.records import SecureRecord
from locum.server.setup import Party, SetUp
from locum.server.signer import Signer
from locum.server.spending import Release, Statement, is_due, stated

_BLOCK = 1 << 16
#: What rounding and floating point may add to a norm.
_SLACK = 1e-6


@dataclass
class Session:
    """What holds from one set-up to the next.

    Attributes:
        roster: the signed sites.
        parties: by site, what it announced.
        private: the key to which answers are sealed; it is in this process only.
        outside: the run's sites that are not in the roster, and why.
        forgotten: whether keys are to be set up anew before the next sum.
        lost: the sites that did not give to a sum that was void, and why.
    """

    roster: SignedRoster
    parties: Mapping[str, Party]
    private: bytes = field(repr=False)
    outside: Mapping[str, Refused]
    step: int = 0
    forgotten: bool = False
    lost: Mapping[str, Refused] = field(default_factory=dict)
    _sealed: tuple[str, Fields, dict[str, str]] | None = None

    def next(self, purpose: Purpose, number: int, attempt: int, model: Mapped) -> Context:
        """The context of one more sum."""
        self.step += 1
        return Context(
            roster=self.roster.digest,
            step=self.step,
            purpose=purpose,
            round=number,
            attempt=attempt,
            model=model.sha256,
        )

    def give_up(self, lost: Mapping[str, Refused]) -> None:
        """A sum was void, to which these sites did not give."""
        self.forgotten, self.lost = True, dict(lost)

    def sealed(self, engine: Engine, model: Mapped) -> tuple[Fields, dict[str, str]]:
        """The fields that carry the model, encrypted, and by site its content key; made once for each model."""
        if self._sealed is None or self._sealed[0] != model.sha256:
            key, purpose = secrets.token_bytes(keys.KEY_BYTES), model_purpose(self.roster, model.sha256)
            fields = engine.link.outgoing(model).seal(model, key)
            sealed = {
                site: base64url(keys.seal(party.keys.models, purpose, key)) for site, party in self.parties.items()
            }
            self._sealed = model.sha256, fields, sealed
        return self._sealed[1], self._sealed[2]


class SecureSums:
    """The coordinator's part in the secure sums of a run."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer
        self._session: Session | None = None
        # Attempts at a round until sites outside are asked again, and how many that will be the next time.
        self._patience = 0
        self._next_patience = 1

    def gathered(self, engine: Engine, roster: Roster, committed: Committed, attempt: int) -> Gathered:
        """Sends the model, folds masked updates, and unmasks their sum."""
        number, plan, model = committed.round + 1, engine.plan, _mapped(committed.model)
        self._patience -= 1
        session = self._ready(engine, roster, number)
        if not isinstance(session, Session):
            return Gathered(None, 0.0, None, {}, session, "too few sites have set up keys")
        size = sum(tensor.size for tensor in model.values())
        layout = training_layout(plan, session.roster, size)
        asked = self._opened(engine, roster, session, session.next("train", number, attempt, model), layout)
        asked.collect(
            TRAIN,
            TrainTask(plan_digest=plan.digest, round=number, start=committed.start, secured=asked.secured(model)),
            model,
        )
        void = asked.unmask() or _bad_update(asked.total, plan)
        told = {
            site: Told(loss=header.loss, weight=_weight(plan, header), spent=asked.spent.get(site))
            for site, (header, _) in asked.told.items()
        }
        if void:
            session.give_up(asked.refused)
            return Gathered(None, 0.0, None, told, asked.missing(void), void)
        sums, cap = asked.sums(), weight_cap(plan)
        weight = float(sums[WEIGHT][0])
        loss = float(sums[LOSS][0]) / weight if LOSS in sums else None
        totals = RingTotals(asked.total.update, layout.ring, model, scale=cap)
        bytes_up = layout.bytes * len(told)
        return Gathered(totals, weight * cap, loss, told, asked.refused, "", _record(asked.total), bytes_up)

    def measured(self, engine: Engine, roster: Roster, model: Arrays, task: EvaluateTask) -> Measured:
        """Sends the model, folds masked metric sums, and unmasks their sum."""
        of, plan = _mapped(model), engine.plan
        session = self._ready(engine, roster, task.round)
        if not isinstance(session, Session):
            return Measured({}, {}, {}, None, session, tuple(sorted(session)))
        context, layout = session.next(task.fold, task.round, 1, of), metrics_layout(plan, session.roster, task.fold)
        asked = self._opened(engine, roster, session, context, layout)
        asked.collect(EVALUATE, task.model_copy(update={"secured": asked.secured(of)}), of)
        void = asked.unmask() or _bad_metrics(asked)
        if void:
            engine.events.emit(
                "void", round=task.round, attempt=1, admitted=len(asked.told), reason=void, fold=task.fold
            )
            session.give_up(asked.refused)
            excluded = asked.missing(void)
            # The same sum over other sites is refused again, however often it is asked for.
            silent = asked.silent if asked.refused_for_good else tuple(sorted(excluded))
            return Measured({}, {}, {}, None, excluded, silent)
        sums = asked.sums()
        count = sums.pop(CASES, None)
        return Measured(
            sums=sums,
            per_site={site: told for site, (_, told) in asked.told.items() if told},
            cases={site: header.cases for site, (header, _) in asked.told.items()},
            total=None if count is None else round(float(count[0])),
            excluded=asked.refused,
            silent=asked.silent,
            spent=asked.spent,
        )

    def _opened(self, engine: Engine, roster: Roster, session: Session, context: Context, layout: Layout) -> _Asked:
        certificates = {site: party.certificate for site, party in session.parties.items()}
        total = SecureSum(context, layout, certificates, session.private)
        return _Asked(engine, roster, session, total, sign(context, self._signer.key))

    # --- set-up

    def _ready(self, engine: Engine, roster: Roster, number: int) -> Session | dict[str, Refused]:
        """The session that holds, or a new one where sites have lost their keys or are to be taken in."""
        session = self._session
        if session is not None and not session.forgotten and not self._is_time(engine, session):
            return session
        found = self._set_up(engine, roster, number, session.lost if session else {})
        if isinstance(found, Session):
            self._session = found
            engine.events.emit(
                "keys",
                sites=list(found.parties),
                threshold=found.roster.threshold,
                roster=found.roster.digest,
                excluded={site: refused.reason for site, refused in found.outside.items()},
            )
            self._patience = self._next_patience
        else:
            self._session = None
        return found

    def _is_time(self, engine: Engine, session: Session) -> bool:
        """Whether sites outside the roster, which are there, are asked for keys again."""
        there = set(session.outside) - set(engine.link.away(session.outside))
        if not there or self._patience > 0:
            return False
        self._next_patience = 2 * self._next_patience
        return True

    def _set_up(
        self, engine: Engine, roster: Roster, number: int, lost: Mapping[str, Refused]
    ) -> Session | dict[str, Refused]:
        """Keys, roster, pairs; what a site fails at leaves it out, and the others begin anew without it."""
        outside = away_of(engine, roster, number)
        least = least_sites(engine.plan)
        if len(roster.nodes.keys() - outside.keys() - lost.keys()) >= least:
            outside |= lost
        beyond = [site for site in roster.nodes if site not in outside][MOST_SITES:]
        outside |= dict.fromkeys(beyond, Refused(f"a secure sum has at most {MOST_SITES} sites", why="OUTSIDE"))
        while True:
            steps = SetUp(engine, roster, self._signer, str(number))
            parties = steps.keys([site for site in roster.nodes if site not in outside])
            if len(parties) < least:
                few = Refused(f"{len(parties)} sites have set up keys, {least} are needed", why="OUTSIDE")
                alone = dict.fromkeys(parties, few)
                return {**outside, **steps.refused, **alone}
            found = steps.roster(parties)
            if not steps.refused.keys() & parties.keys():
                return Session(found, parties, steps.private, {**outside, **steps.refused})
            outside |= steps.refused


# --- a sum


@dataclass
class _Asked:
    """One sum on its way: what was asked of whom, and what has come of it.

    Attributes:
        context: the signed envelope of the sum's context.
        told: by site in the sum, what it tells of itself: its header, and its own metric sums.
        refused: by site that is not in the sum, why.
        spent: by site in the sum, its signed statement of what it has spent.
        answered: the sites that have answered the first exchange.
        refused_for_good: whether so many sites refused to unmask that it makes no difference who else answers.
    """

    engine: Engine
    sites: Roster
    session: Session
    total: SecureSum
    context: str
    told: dict[str, tuple[MaskedResult, Arrays]] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)
    spent: dict[str, Statement] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    refused_for_good: bool = False

    @property
    def silent(self) -> tuple[str, ...]:
        """The sites that did not answer."""
        return tuple(site for site in self.sites.nodes if site not in self.answered)

    def secured(self, model: Mapped) -> Secured:
        """What makes a task one of this sum."""
        return Secured(context=self.context, keys=self.session.sealed(self.engine, model)[1])

    def sums(self) -> dict[str, NDArray[np.float64]]:
        """The scalars of the unmasked sum."""
        return read_scalars(self.total.layout.lane, self.total.scalars, len(self.session.roster.members))

    def missing(self, void: str) -> dict[str, Refused]:
        """Why each site is not in a sum that is void."""
        return {**dict.fromkeys(self.told, Refused(void, Code.SECURE_SUM_REFUSED)), **self.refused}

    def collect(self, kind: str, task: Header, model: Mapped) -> None:
        """The first exchange: the model out, masked uploads in."""
        engine, number = self.engine, self.total.context.round
        content = assemble(task, self.session.sealed(engine, model)[0])
        away = away_of(engine, self.sites, number)
        self.refused = {**self.session.outside, **away}
        contents = {site: content for site in self.session.parties if site not in away}
        for site, reply in exchange(engine, kind, addressed(engine, self.sites, contents), group=str(number)):
            self.answered.add(site)
            self._take(site, self._admitted(site, reply))
            engine.link.taken(site)
        self.refused |= unanswered(engine, [site for site in contents if site not in self.answered])

    def _admitted(self, site: str, reply: Message | None) -> tuple[MaskedResult, Arrays] | Refused:
        """A masked upload that was folded in, with what the site tells of itself; or why not."""
        plan, context = self.engine.plan, self.total.context
        answer = read(reply, MaskedResult, plan, self.engine.link.incoming(site))
        if isinstance(answer, Refused) or reply is None:
            return answer if isinstance(answer, Refused) else Refused("no reply")
        header, tensors = answer
        told = {name.removeprefix(TOLD): array for name, array in tensors.items() if name.startswith(TOLD)}
        reason = _beyond_release(plan, self.total, header, told)
        if reason:
            return Refused(reason, Code.MESSAGE_UNREADABLE)
        release = Release(self.engine.log.run, plan.digest, context.round, context.purpose)
        certificate, due = self.session.parties[site].certificate, is_due(plan, context.purpose)
        spent = stated(header.spent, certificate, site=site, release=release, due=due)
        if isinstance(spent, Refused):
            return spent
        try:
            self.total.fold(site, header.upload, body_of(reply.content), tensors)
        except SecureRefusal as refusal:
            return Refused(str(refusal), Code.SECURE_SUM_REFUSED)
        if spent is not None:
            self.spent[site] = spent
        return header, {name: np.array(array) for name, array in told.items()}

    def _take(self, site: str, admitted: tuple[MaskedResult, Arrays] | Refused) -> None:
        number, events = self.total.context.round, self.engine.events
        if isinstance(admitted, Refused):
            self.refused[site] = admitted
            self.session.forgotten |= admitted.code is Code.SETUP_UNKNOWN
            events.emit("refused", round=number, site=site, reason=admitted.reason)
        else:
            self.told[site] = admitted
            if self.total.context.purpose == "train":
                events.emit("update", round=number, site=site, loss=admitted[0].loss)

    def unmask(self) -> str:
        """The second exchange: who gave is told to those who gave, and their shares unmask the sum; why it cannot."""
        engine, total, survivors = self.engine, self.total, self.total.survivors
        least = max(self.session.roster.threshold, engine.plan.participation.quorum)
        if len(survivors) < least:
            return f"{len(survivors)} sites gave to the sum, and {least} must"
        contents = self._requests()
        number, reasons = total.context.round, dict.fromkeys(survivors, "no answer by the deadline")
        for site, reply in exchange(engine, UNMASK, addressed(engine, self.sites, contents), group=str(number)):
            reasons[site] = _taken(total, engine.plan, site, reply)
            if reasons[site]:
                engine.events.emit("refused", round=number, site=site, reason=reasons[site])
            elif total.enough and self._is_open(reasons, site):
                return ""
        told = "".join(f"\n  {site}: {reason}" for site, reason in sorted(reasons.items()) if reason)
        threshold = self.session.roster.threshold
        refusing = sum(reason == MEANING[Code.SECURE_SUM_REFUSED][0] for reason in reasons.values())
        self.refused_for_good = refusing > len(self.session.roster.members) - threshold
        return f"the sum of {len(survivors)} sites could not be unmasked: {threshold} must answer{told}"

    def _requests(self) -> dict[str, RecordDict]:
        """The message to each survivor: one for all where it is small, for its parts are then carried once."""
        total, survivors, plan = self.total, self.total.survivors, self.engine.plan.digest
        boxes = {site: total.boxes_for(site) for site in survivors}
        small = sum(rows.nbytes for rows in boxes.values()) <= BLOB_THRESHOLD
        found: dict[str, RecordDict] = {}
        for receivers in [survivors] if small else [(site,) for site in survivors]:
            task = UnmaskTask(plan_digest=plan, context=self.context, uploads=total.headers, receivers=receivers)
            content = pack(task, {"boxes": np.concatenate([boxes[site] for site in receivers])})
            found |= dict.fromkeys(receivers, content)
        return found

    def _is_open(self, reasons: dict[str, str], site: str) -> bool:
        """Whether the shares that are here unmask the sum."""
        try:
            liars = self.total.unmask(LEAST_SITES)
        except SecureRefusal as refusal:
            reasons[site] = str(refusal)
            return False
        for liar in liars:
            reason = "its shares do not fit those of the others"
            self.engine.events.emit("refused", round=self.total.context.round, site=liar, reason=reason)
        return True


def _beyond_release(plan: Plan, total: SecureSum, header: MaskedResult, told: Arrays) -> str:
    """Why what a site tells of itself beside its upload is not what the plan releases; empty if it is."""
    lengths = metric_lengths(plan, "validation") if total.context.purpose != "train" and plan.tells("metrics") else {}
    if (header.loss is not None and not plan.tells("training_loss")) or (
        header.cases is not None and not plan.tells("case_counts")
    ):
        return "it tells more of itself than the plan releases"
    for name, array in told.items():
        if array.dtype != np.float64 or array.shape != (lengths.get(name, -1),):
            return "it tells metrics that the plan does not release"
        if not ((array >= 0) & (array <= MOST_SUM)).all():
            return f"a metric's sums are not numbers from 0 to {MOST_SUM:g}"
    return ""


def _weight(plan: Plan, header: MaskedResult) -> float | None:
    """A site's weight, if it tells its number of cases."""
    if plan.participation.weighting == "equal":
        return 1.0
    return None if header.cases is None else min(float(header.cases), plan.admission.weight_cap)


def _taken(total: SecureSum, plan: Plan, site: str, reply: Message | None) -> str:
    """Takes a survivor's shares; why not, or nothing."""
    answer = read(reply, UnmaskResult, plan, INLINE)
    if isinstance(answer, Refused):
        return answer.reason
    sealed = answer[1].get("sealed")
    if set(answer[1]) != {"sealed"} or sealed is None or sealed.dtype != np.uint8 or sealed.ndim != 1:
        return "its answer is not sealed shares"
    try:
        total.take(site, sealed.tobytes())
    except SecureRefusal as refusal:
        return str(refusal)
    return ""


# --- the sum


class RingTotals:
    """Σ wᵢ·Δᵢ of an unmasked sum, read tensor by tensor when it is taken."""

    def __init__(self, total: NDArray[Any], ring: Ring, model: Arrays, *, scale: float) -> None:
        self._total, self._ring, self._scale = total, ring, scale
        self._places, start = {}, 0
        for name in sorted(model):
            self._places[name] = slice(start, start + model[name].size), model[name].shape
            start += model[name].size

    def pop(self, name: str, /) -> NDArray[np.float64]:
        """The sum of one tensor."""
        place, shape = self._places.pop(name)
        found = self._ring.read(self._total[place])
        found *= self._scale
        return found.reshape(shape)


def _bad_metrics(asked: _Asked) -> str:
    """Why an unmasked sum cannot be one of metrics; empty if it can."""
    most = MOST_SUM * len(asked.told)
    bad = any(not ((values >= 0) & (values <= most)).all() for values in asked.sums().values())
    return "the sum of the metrics failed its check" if bad else ""


def _bad_update(total: SecureSum, plan: Plan) -> str:
    """Why an unmasked sum cannot be one of updates within the plan's bounds; empty if it can."""
    sites = len(total.layout.roster.members)
    sums = read_scalars(total.layout.lane, total.scalars, sites)
    weight, given = float(sums[WEIGHT][0]), len(total.survivors)
    if not 0 < weight <= given * (1 + _SLACK):
        return f"the sum failed its check: its weight is {weight:.6g} of at most {given}"
    if LOSS in sums and not math.isfinite(float(sums[LOSS][0])):
        return "the sum failed its check: its loss is not finite"
    ring = total.layout.ring
    norm = math.sqrt(sum(map(_squares, (ring.read(total.update[piece]) for piece in _blocks(total.update.size)))))
    # Each ‖wᵢ·Δᵢ‖ is at most wᵢ·C; rounding adds less than a step to each coordinate of each site.
    bound, root = _bound(plan), math.sqrt(total.update.size)
    most = bound * weight * (1 + _SLACK) + given * root / ring.scale
    if total.layout.noise:
        # ‖Σ + N‖² ≤ ‖Σ‖² + 2·x·σ‖Σ‖ + (σ√d + x·σ)² but for x standard deviations, and that is below this.
        deviation = math.sqrt(given * total.layout.noise) / ring.scale
        most = math.hypot(most, deviation * root) + math.sqrt(2) * HEADROOM * deviation
    return "" if norm <= most else f"the sum failed its check: its norm is {norm:.4g}, and {most:.4g} is the most"


def _bound(plan: Plan) -> float:
    """The largest norm of what a site gives."""
    noise = plan.protection.site_noise
    return plan.admission.norm_bound if noise is None else noise.clip


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _squares(values: NDArray[np.float64]) -> float:
    return float(np.square(values, out=values).sum())


def _record(total: SecureSum) -> SecureRecord:
    return SecureRecord(
        roster=total.context.roster,
        context=total.context.digest,
        sites=len(total.layout.roster.members),
        threshold=total.layout.roster.threshold,
        uploads={site: sha256_hex(header.encode()) for site, header in total.headers.items()},
        total=sha256_hex(total.update.data),
        noise=math.sqrt(total.layout.noise / len(total.survivors)) / total.layout.ring.scale,
    )


def _mapped(model: Arrays) -> Mapped:
    """A committed model, which lies in a file and has its digest."""
    if not isinstance(model, Mapped):
        raise TypeError("only a committed model goes out sealed")
    return model
