"""Admission: the checks a site's update passes before it is folded in. Refusal is per site, with a reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message

from locum.common.errors import MEANING, Code
from locum.common.messages import INLINE, Arrays, Carrier, H, Header, MessageError, TrainResult, unpack
from locum.common.plan import Plan
from locum.common.updates import update_problem

#: What the log says of a refusal that has no code (see :data:`locum.common.log.entries.Word`).
Why = Literal["NOT_ADMITTED", "AWAY", "LATE", "OUTSIDE", "INTERNAL"]


@dataclass(frozen=True)
class Refused:
    """Why a site's reply does not count, in words that hold nothing of the site's data."""

    reason: str
    code: Code | None = None
    why: Why = "NOT_ADMITTED"

    @property
    def word(self) -> str:
        """The one word that stands in the log."""
        return self.why if self.code is None else self.code.name


def reasons(refused: Mapping[str, Refused]) -> dict[str, str]:
    """By site, why, as people read it."""
    return {site: found.reason for site, found in refused.items()}


@dataclass(frozen=True)
class Update:
    """An admitted update: the change to the shared tensors, and its weight in the mean."""

    header: TrainResult
    tensors: Arrays


def read(reply: Message | None, kind: type[H], plan: Plan, carrier: Carrier = INLINE) -> tuple[H, Arrays] | Refused:
    """A reply's header and tensors, or why it cannot be used; None is a reply that could not even be taken apart."""
    if reply is not None and reply.has_error():
        return _failure(reply.error.code, reply.error.reason)
    if reply is None or not reply.has_content():
        return Refused("unreadable reply: it is no message of this protocol", Code.MESSAGE_UNREADABLE)
    try:
        header, tensors = unpack(reply.content, kind, carrier)
    except MessageError as error:
        return Refused(f"unreadable reply: {error}", Code.MESSAGE_UNREADABLE)
    return _belongs(header, plan) or (header, tensors)


def _belongs(header: Header, plan: Plan) -> Refused | None:
    if header.plan_digest == plan.digest:
        return None
    return Refused("the reply belongs to another plan", Code.PLAN_MISMATCH)


def _failure(number: int, reason: str | None) -> Refused:
    """An error reply in words. Its text is used only as far as it is one of our own names."""
    try:
        code = Code(number)
    except ValueError:
        return Refused(f"the site failed with code {number}", why="INTERNAL")
    clause = (reason or "").removeprefix(code.name).strip()
    shown = f" ({clause})" if code is Code.POLICY_REFUSED and clause.isidentifier() and len(clause) < 40 else ""
    return Refused(MEANING[code][0] + shown, code)


def admit(
    reply: Message | None, plan: Plan, *, round_number: int, model: Arrays, carrier: Carrier = INLINE
) -> Update | Refused:
    """An update that may be folded into `model`, or why not: form, round, finite, norm bound, weight cap."""
    answer = read(reply, TrainResult, plan, carrier)
    if isinstance(answer, Refused):
        return answer
    header, tensors = answer
    if header.round != round_number:
        return Refused(f"an update of round {header.round}")
    if not 0 < header.weight <= plan.admission.weight_cap or not math.isfinite(header.weight):
        return Refused(f"its weight {header.weight:g} is not between 0 and {plan.admission.weight_cap:g}")
    problem = update_problem(tensors, model, plan.admission.norm_bound)
    return Refused(problem) if problem else Update(header, tensors)
