"""What each site of a run does, in words: from the run's events, from what agents said last, and from approvals.

Rules:
  * A site that does nothing says why: it has not approved, was never heard, is silent, was left out, or waits.
  * What is told of a site never claims more than was heard: a silent site is silent, whatever it did before.
  * Text of a site comes out without control characters: it is shown on a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from locum.common.activity import Activity
from locum.server.gateway.live import Heard

#: Agents speak every few seconds; one that did not for so long is called silent.
SILENT_SECONDS = 30.0
#: A clock that is off by more breaks certificates and approvals sooner or later.
CLOCK_SECONDS = 60.0

Look = Literal["busy", "done", "calm", "trouble"]

_BUSY: Mapping[Activity, str] = {
    "describing": "looking at its data",
    "training": "training round {round}",
    "evaluating": "evaluating round {round}",
    "uploading": "uploading {share}",
    "downloading": "downloading {share}",
    "delivering": "delivering round {round}",
}


@dataclass
class SiteEvents:
    """What the events say of one site.

    Attributes:
        state: within the round at hand.
        note: why it was refused.
        loss: of its last update, if released.
        counted: rounds that count it; `missed` those that do not.
        left_out: why it takes no part in the run; empty if it does.
    """

    state: Literal["ready", "asked", "done", "refused"] = "ready"
    note: str = ""
    loss: float | None = None
    counted: int = 0
    missed: int = 0
    left_out: str = ""


@dataclass(frozen=True)
class SiteRow:
    """One site for a person.

    Attributes:
        words: what it does, or why it does nothing.
        heard: when it was last heard, in words; empty if never.
    """

    site: str
    words: str
    look: Look
    heard: str
    events: SiteEvents


def plain(text: str) -> str:
    """Text without control characters, on one line."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def site_rows(
    run: str,
    told: Mapping[str, SiteEvents],
    heard: Mapping[str, Heard],
    *,
    approved: Collection[str] | None,
    members: Collection[str] = (),
    now: float | None = None,
) -> list[SiteRow]:
    """One row for each site, those with trouble first, then by name.

    Args:
        run: the run's name.
        told: sites by what the run's events say of them.
        heard: what each site said last.
        approved: the sites whose approval of the plan stands; None if that is not known.
        members: further sites to show: those of the federation.
        now: seconds since 1970.
    """
    moment = time.time() if now is None else now
    rows = []
    for site in {*told, *members}:
        events, said = told.get(site), heard.get(site)
        words, look = _words(run, site, events, said, approved, moment)
        rows.append(SiteRow(plain(site), plain(words), look, _heard(said, moment), events or SiteEvents()))
    return sorted(rows, key=lambda row: (row.look != "trouble", row.site))


def _words(
    run: str,
    site: str,
    events: SiteEvents | None,
    said: Heard | None,
    approved: Collection[str] | None,
    now: float,
) -> tuple[str, Look]:
    if events is not None and events.left_out:
        return f"left out: {events.left_out}", "trouble"
    if approved is not None and site not in approved:
        return ("has not approved" if events is None else "has withdrawn its approval"), "trouble"
    if said is None:
        return "not heard yet", "trouble"
    if now - said.at > SILENT_SECONDS:
        return f"silent for {duration(now - said.at)}: last heard {clock(said.at, now)}", "trouble"
    words, look = _doing(run, events, said)
    return words + _clock_words(said.clock_offset), look


def _doing(run: str, events: SiteEvents | None, said: Heard) -> tuple[str, Look]:
    if said.run and said.run != run:
        return f"works on another run, {said.run}", "calm"
    for activity, words in _BUSY.items():
        if said.run and said.activity == activity:
            share = f"{100 * said.done // said.total} %" if said.total else f"{said.done / 1e6:.1f} MB"
            return words.format(round=said.round, share=share), "busy"
    if events is not None and events.state == "refused":
        return f"does not count in this round: {events.note}", "trouble"
    if events is not None and events.state == "done":
        return "has delivered", "done"
    return plain(said.activity.replace("_", " ")) or "idle", "calm"


def _clock_words(offset: float) -> str:
    if abs(offset) < CLOCK_SECONDS:
        return ""
    return f" (its clock is {duration(abs(offset))} {'ahead' if offset > 0 else 'behind'})"


def _heard(said: Heard | None, now: float) -> str:
    if said is None:
        return ""
    seconds = max(0.0, now - said.at)
    return "now" if seconds < 10 else f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """A length of time in its largest unit: `45 s`, `4 min`, `3 h`, `2 days`."""
    for size, unit, most in ((1, "s", 90), (60, "min", 90), (3600, "h", 36)):
        if seconds < size * most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def clock(at: float, now: float) -> str:
    """A time of day, with the date if it is not today's."""
    then, today = time.localtime(at), time.localtime(now)
    same = (then.tm_year, then.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("%H:%M" if same else "%d %b %H:%M", then)
