"""What a person watches while a run goes on: rounds, losses, metrics, and what every site does.

`Screen` shows the events of one file; on a terminal below them a live part, elsewhere plain lines. A simulation shows
its own events from a thread (`Watch`), `locum watch` those of a run at the coordinator until it ends (`watch_run`).

Rules:
  * Watching changes nothing: whoever leaves leaves the run alone.
  * Nothing that comes from a site is read as markup or reaches the terminal as a control character.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from locum.server.event_file import Event, EventReader, end_of
from locum.server.gateway.live import read_live
from locum.server.home import Home
from locum.server.proposals import sites_of
from locum.server.registry import RegistryError
from locum.server.report_words import rolled_back, set_up, void_of
from locum.server.runs import Run, Status
from locum.server.site_states import Look, SiteEvents, SiteRow, duration, plain, site_rows

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_APPROVAL_SECONDS = 5.0
_PATIENCE_SECONDS = 10.0
#: How much of what happened before a person began to watch is shown on a terminal.
_BACKLOG_LINES = 12
_COLOUR: dict[Look, str] = {"busy": "cyan", "done": "green", "calm": "", "trouble": "yellow"}


# --- what the events have said


@dataclass
class State:
    """What the events have said so far."""

    rounds: int = 0
    done: int = 0
    sites: dict[str, SiteEvents] = field(default_factory=dict)
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    _began: tuple[int, float] = (0, 0.0)
    _committed: float = 0.0
    _seconds: float = 0.0
    _untold: bool = False

    def apply(self, event: Event) -> list[Text]:
        """Takes one event in; returns the lines that should stay on the screen."""
        handler = getattr(self, f"_on_{event['event'].replace(' ', '_')}", None)
        lines: list[Text] = handler(event) if handler is not None else []
        return lines

    def _on_started(self, event: Event) -> list[Text]:
        self.rounds, self.done = event["rounds"], event["round"]
        self._began = (event["round"], event["at"])
        return [_calm(f"going on after round {event['round']}")] if event["round"] else []

    def _on_roster(self, event: Event) -> list[Text]:
        left_out = {site: SiteEvents(left_out=reason) for site, reason in event["excluded"].items()}
        taking_part = {site: self.sites.get(site, SiteEvents()) for site in event["cases"] if site not in left_out}
        self.sites = {**taking_part, **left_out}
        lines = [_warning(f"{site} is left out: {reason}") for site, reason in event["excluded"].items()]
        return lines + [_warning(f"{site} {notice}") for site, notice in event["notices"].items()]

    def _on_round(self, _event: Event) -> list[Text]:
        for site in self._taking_part():
            site.state = "asked"
        return self._told()

    def _on_update(self, event: Event) -> list[Text]:
        site = self.sites.setdefault(event["site"], SiteEvents())
        site.state, site.loss = "done", event["loss"]
        return []

    def _on_refused(self, event: Event) -> list[Text]:
        site = self.sites.setdefault(event["site"], SiteEvents())
        site.state, site.note = "refused", event["reason"]
        return [_warning(f"round {event['round']}: {event['site']} does not count: {event['reason']}")]

    def _on_void(self, event: Event) -> list[Text]:
        again = "" if "fold" in event else "; tried again"
        return [_warning(f"{void_of(event, 'is')}{again}")]

    def _on_keys(self, event: Event) -> list[Text]:
        return [*self._told(), (_warning if event["excluded"] else _calm)(f"secure sums: {set_up(event)}")]

    def _on_committed(self, event: Event) -> list[Text]:
        self.done, self.loss, self._seconds = event["round"], event["loss"], event["seconds"]
        self._committed, self._untold = event["at"], True
        for site in self._taking_part():
            site.counted += site.state == "done"
            site.missed += site.state != "done"
        return []

    def _on_evaluated(self, event: Event) -> list[Text]:
        self.metrics = {name: value for name, value in event["overall"].items() if isinstance(value, float)}
        self._untold = True
        return self._told()

    def _on_rolled_back(self, event: Event) -> list[Text]:
        return [*self._told(), _warning(rolled_back(event))]

    def _on_finished(self, _event: Event) -> list[Text]:
        return self._told()

    def _on_paused(self, event: Event) -> list[Text]:
        missing = ", ".join(event.get("missing") or ())
        text = f"paused: {event.get('reason') or 'too few sites'}" + (f"; missing: {missing}" if missing else "")
        return [*self._told(), _warning(text)]

    def _on_resumed(self, _event: Event) -> list[Text]:
        return [_calm("going on")]

    def _taking_part(self) -> list[SiteEvents]:
        return [site for site in self.sites.values() if not site.left_out]

    def _told(self) -> list[Text]:
        """The line of the last committed round, once: with its metrics if it was evaluated before anything else."""
        line = [self._round_line()] if self._untold else []
        self._untold, self.metrics = False, {}
        return line

    def _round_line(self) -> Text:
        parts = [f"round {self.done:>3}/{self.rounds}"]
        parts += [f"loss {self.loss:.4f}"] if self.loss is not None else []
        parts += [f"{name} {value:.3f}" for name, value in self.metrics.items()]
        parts += [f"{self._seconds:.1f} s"]
        left = self.seconds_left()
        return Text("  ".join(parts + ([f"about {duration(left)} left"] if left else [])))

    def seconds_left(self) -> float | None:
        """How long the rounds to come last at the pace so far; None where there is no pace, or nothing to come."""
        first, began = self._began
        done = self.done - first
        if done <= 0 or self.done >= self.rounds:
            return None
        return (self._committed - began) / done * (self.rounds - self.done)


def _calm(text: str) -> Text:
    return Text(_lines(text))


def _warning(text: str) -> Text:
    return Text(_lines(text), "yellow")


def _lines(text: str) -> str:
    return "\n".join(map(plain, text.splitlines()))


def _stamped(line: Text, at: float) -> Text:
    """The line behind its time of day, in its own colour."""
    return Text.assemble((time.strftime("%H:%M:%S  ", time.localtime(at)), "dim"), line)


# --- the screen


class Screen:
    """Shows a file of events on a console; on a terminal with a live part below, which `below` gives.

    One thread at a time calls `look`.
    """

    def __init__(self, events: EventReader, console: Console, below: Callable[[State], RenderableType]) -> None:
        self.state = State()
        self._events, self._console, self._below = events, console, below
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[left]}"), console=console)
        self._task = self._progress.add_task("rounds", total=None, left="")
        self._live = Live(get_renderable=self._render, console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def look(self, *, most: int | None = None, clock: bool = False) -> None:
        """Takes new events in and shows them; of many lines the last `most`, each with its time of day if asked."""
        lines = [
            _stamped(line, event["at"]) if clock else line
            for event in self._events.read()
            for line in self.state.apply(event)
        ]
        for line in lines if most is None else lines[-most:]:
            self.say(line)
        left = self.state.seconds_left()
        self._progress.update(
            self._task,
            total=self.state.rounds or None,
            completed=self.state.done,
            left=f"about {duration(left)} left" if left else "",
        )
        if self._console.is_terminal:
            self._live.refresh()

    def say(self, line: Text) -> None:
        """Prints a line that stays."""
        self._console.print(line, soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(self._progress, self._below(self.state))


# --- a simulation


class Watch:
    """Follows `events.jsonl` in a thread, from now on, and shows it on a console until left."""

    def __init__(self, events: Path, console: Console) -> None:
        self._screen = Screen(EventReader(events, end_of(events)), console, _sites_in_a_row)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._screen.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._screen.__exit__(kind, error, trace)

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._screen.look()
        self._screen.look()


_IN_A_ROW: dict[str, tuple[str, Look]] = {
    "ready": ("ready", "calm"),
    "asked": ("training", "busy"),
    "done": ("done", "done"),
    "refused": ("refused", "trouble"),
}


def _sites_in_a_row(state: State) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    shown = [(name, _IN_A_ROW[site.state]) for name, site in state.sites.items() if not site.left_out]
    table.add_row(*[Text(f"{plain(name)}: {word}", _COLOUR[look]) for name, (word, look) in shown])
    return table


# --- a run at the coordinator


@dataclass
class _Known:
    """What is looked up now and then while a run is watched."""

    run: Run
    home: Home
    rows: list[SiteRow] = field(default_factory=list)
    status: Status | None = None
    approved: frozenset[str] | None = None
    members: frozenset[str] = frozenset()
    _approvals_at: float = -_APPROVAL_SECONDS

    def look(self, state: State) -> None:
        """Looks at the run's files, at what sites said, and at approvals."""
        if time.monotonic() - self._approvals_at >= _APPROVAL_SECONDS:
            self.approved, self.members = approvals(self.home, self.run)
            self._approvals_at = time.monotonic()
        self.status = self.run.status()
        heard = read_live(self.home.live)
        self.rows = site_rows(self.run.id, state.sites, heard, approved=self.approved, members=self.members)


def approvals(home: Home, run: Run) -> tuple[frozenset[str] | None, frozenset[str]]:
    """The sites that approve the run's plan (None if the registry cannot be asked), and all sites of the federation."""
    try:
        approved, others = sites_of(home, run.created.digest)
    except RegistryError:
        return None, frozenset(run.created.sites)
    return frozenset(approved), frozenset({*approved, *others})


def watch_run(run: Run, home: Home, console: Console) -> Status:
    """Shows a run until it has ended; returns its last status. Raises RunError if its files cannot be read."""
    known = _Known(run, home)
    said: dict[str, Look] = {}
    shown = ""
    with Screen(EventReader(run.events), console, lambda _: _below(known, console.height)) as screen:
        known.look(screen.state)
        screen.look(most=_BACKLOG_LINES if console.is_terminal else None, clock=True)
        while True:
            known.look(screen.state)
            screen.look(clock=True)
            for line in _changes(known.rows, said):
                screen.say(line)
            status = known.status or run.status()
            if (words := status_words(run, status)) != shown and not status.ended:
                screen.say(Text(words, "dim"))
                shown = words
            if status.ended:
                screen.look(clock=True)
                return status
            _wait(screen)


def _wait(screen: Screen) -> None:
    end = time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
        screen.look(clock=True)


def _changes(rows: Sequence[SiteRow], said: dict[str, Look]) -> list[Text]:
    """A line for every site that began or ceased to be in trouble since the last look; the first look is silent."""
    lines = []
    for row in rows:
        before, said[row.site] = said.get(row.site), row.look
        if before is None or (before == "trouble") == (row.look == "trouble"):
            continue
        lines.append(Text(f"{row.site}: {row.words}", "yellow" if row.look == "trouble" else ""))
    return lines


def status_words(run: Run, status: Status) -> str:
    """A run's state for a person, on one line; what to do about it once it has lasted for some seconds."""
    words = f"{run.id}: {status.state}"
    if status.reason:
        words += f": {plain(status.reason.splitlines()[0])}"
    lasts = time.time() - status.since > _PATIENCE_SECONDS
    return f"{words}; {status.remedy}" if status.remedy and lasts and not status.ended else words


def _below(known: _Known, height: int) -> RenderableType:
    if not known.rows:
        return Text("")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for name in ("site", "does", "rounds", "loss", "heard"):
        table.add_column(name, overflow="fold" if name == "does" else "ellipsis", no_wrap=name != "does")
    room = max(3, height - 8)
    shown, rest = known.rows[:room], known.rows[room:]
    for row in shown:
        events = row.events
        rounds = f"{events.counted} of {events.counted + events.missed}" if events.counted + events.missed else ""
        loss = "" if events.loss is None else f"{events.loss:.4f}"
        table.add_row(row.site, Text(row.words, _COLOUR[row.look]), rounds, loss, row.heard)
    if rest:
        counted = Counter(row.words for row in rest).most_common()
        table.add_row(f"+ {len(rest)} more", "; ".join(f"{count} {words}" for words, count in counted))
    return table


def print_events(run: Run) -> Status:
    """Prints the run's events as JSON lines until it has ended, and last its status; returns that."""
    reader = EventReader(run.events)
    while True:
        status = run.status()  # before the events: what an end wrote is then among them
        for event in reader.read():
            _print(event)
        if status.ended:
            _print({"at": time.time(), "event": "status", **status_fields(run, status)})
            return status
        time.sleep(_POLL_SECONDS)


def status_fields(run: Run, status: Status) -> dict[str, Any]:
    """A status as plain data."""
    return {
        "run": run.id,
        "state": status.state,
        "round": status.round,
        "rounds": status.rounds,
        "reason": status.reason,
        "remedy": status.remedy,
        "since": status.since,
    }


def _print(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
