"""Asking sites: one message to each, and their replies as they arrive."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from locum.common.messages import Arrays
from locum.common.plan import Plan
from locum.common.secagg import LEAST_SITES
from locum.server.admission import Refused
from locum.server.checkpoints import Checkpoints
from locum.server.link import Link
from locum.server.records import Events, SecureRecord
from locum.server.run_log import RunLog
from locum.server.spending import Statement
from locum.server.strategies import Strategy, Totals

if TYPE_CHECKING:
    from locum.server.secure import SecureSums


LATE = Refused("no answer by the deadline", why="LATE")


@dataclass(frozen=True)
class Roster:
    """The sites of a run: node id by name, in the fixed order in which their updates are summed.

    Attributes:
        nodes: node id by name.
        excluded: by site that was asked but cannot take part, why.
        policies: by site that told it, the digest of its policy.
        readiness: by site that was asked, its signed statement of readiness.
    """

    nodes: Mapping[str, int]
    excluded: Mapping[str, Refused]
    policies: Mapping[str, str] = field(default_factory=dict)
    readiness: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """What a run works with."""

    plan: Plan
    grid: Grid
    strategy: Strategy
    checkpoints: Checkpoints
    events: Events
    link: Link
    log: RunLog
    secure: SecureSums | None = None


@dataclass(frozen=True)
class Told:
    """What a site whose update counts tells of itself: weight, mean training loss, seconds. None: not told.

    `spent` is its signed statement of what it has spent, checked.
    """

    weight: float | None = None
    loss: float | None = None
    seconds: float | None = None
    spent: Statement | None = None


@dataclass(frozen=True)
class Gathered:
    """What one attempt at a round brought.

    Attributes:
        totals: Σ wᵢ·Δᵢ; None if there is no sum.
        weight: Σ wᵢ in the unit of `totals`.
        loss: the mean training loss, by weight.
        told: by site in the sum, what it tells of itself.
        refused: by site that is not in it, why.
        void: why there is no sum, if that is not a matter of single sites.
        secured: what the sum was, if it was a secure one.
        bytes_up: of the tensors of all updates in it.
    """

    totals: Totals | None
    weight: float
    loss: float | None
    told: Mapping[str, Told]
    refused: Mapping[str, Refused]
    void: str = ""
    secured: SecureRecord | None = None
    bytes_up: int = 0


@dataclass(frozen=True)
class Measured:
    """What the sites say of a model on one fold.

    Attributes:
        sums: the metric sums over all sites; empty if there are none.
        per_site: those of each site that tells its own.
        cases: by site in the sums, its number of cases, or None.
        total: the number of cases over all sites.
        excluded: by site that is not in the sums, why.
        silent: those of them that did not answer at all.
        spent: by site in the sums, its signed statement of what it has spent.
    """

    sums: Arrays
    per_site: Mapping[str, Arrays]
    cases: Mapping[str, int | None]
    total: int | None
    excluded: Mapping[str, Refused]
    silent: tuple[str, ...]
    spent: Mapping[str, Statement] = field(default_factory=dict)


def least_sites(plan: Plan) -> int:
    """How many sites a round needs: the plan's quorum, and in a secure sum three."""
    return max(plan.participation.quorum, LEAST_SITES if plan.secured else 1)


def away_of(engine: Engine, roster: Roster, number: int) -> dict[str, Refused]:
    """The sites that nothing is sent to now, because they are not there."""
    away = engine.link.away(roster.nodes)
    for site, reason in away.items():
        engine.events.emit("refused", round=number, site=site, reason=reason)
    return {site: Refused(reason, why="AWAY") for site, reason in away.items()}


def addressed(engine: Engine, roster: Roster, contents: Mapping[str, RecordDict]) -> dict[str, tuple[int, RecordDict]]:
    """The message to each site that has one, at the node that the site has now."""
    nodes = {**roster.nodes, **engine.link.current(roster.nodes)}
    return {site: (nodes[site], content) for site, content in contents.items()}


def unanswered(engine: Engine, sites: Collection[str]) -> dict[str, Refused]:
    """Why these sites have not answered."""
    away = engine.link.away(sites)
    return {site: Refused(away[site], why="AWAY") if site in away else LATE for site in sites}


def exchange(
    engine: Engine, kind: str, outgoing: Mapping[str, tuple[int, RecordDict]], *, group: str
) -> Iterator[tuple[str, Message | None]]:
    """Sends one message to each site and yields replies as they arrive, until the plan's deadline.

    Replies are matched by the id of the message that they answer; None is one that cannot be read. A message that its
    site has not taken by the deadline is dropped by Flower (its time to live), so a late site gets the next one.
    """
    grid, link = engine.grid, engine.link
    seconds = engine.plan.participation.deadline
    deadline = time.monotonic() + seconds
    messages = [Message(content, node, kind, group_id=group, ttl=seconds) for node, content in outgoing.values()]
    ids = list(grid.push_messages(messages)) if messages else []
    waiting = dict(zip(ids, outgoing, strict=True))
    link.sent({number: outgoing[site][0] for number, site in waiting.items()})
    while waiting and time.monotonic() < deadline:
        for number, reply in link.pulled(grid, link.ready(waiting)):
            site = waiting.pop(number, None)
            if site is not None:
                yield site, reply
        gone = link.away(waiting.values())
        waiting = {number: site for number, site in waiting.items() if site not in gone}
