"""What a person watches during a simulation: rounds, site states, loss, metric, time left, from the run's events."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_POLL_SECONDS = 0.1


@dataclass
class State:
    """What the events have said so far."""

    rounds: int = 0
    done: int = 0
    sites: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    last: dict[str, Any] = field(default_factory=dict)

    def apply(self, event: dict[str, Any]) -> list[str]:
        """Takes one event in; returns the lines that should stay on the screen."""
        handler = getattr(self, f"_on_{event['event']}", None)
        lines: list[str] = handler(event) if handler is not None else []
        return lines

    def _on_started(self, event: dict[str, Any]) -> list[str]:
        self.rounds, self.done, self.began = event["rounds"], event["round"], event["at"]
        self.last["first"] = event["round"]
        return [f"going on after round {event['round']}"] if event["round"] else []

    def _on_roster(self, event: dict[str, Any]) -> list[str]:
        self.sites = {site: "ready" for site in event["cases"] if site not in event["excluded"]}
        lines = [f"[yellow]{site} is left out: {reason}[/]" for site, reason in event["excluded"].items()]
        return lines + [f"[yellow]{site} {notice}[/]" for site, notice in event["notices"].items()]

    def _on_round(self, _event: dict[str, Any]) -> list[str]:
        self.sites = dict.fromkeys(self.sites, "training")
        return [self._round_line({})] if self.last.pop("untold", False) else []

    def _on_update(self, event: dict[str, Any]) -> list[str]:
        self.sites[event["site"]] = "done"
        return []

    def _on_refused(self, event: dict[str, Any]) -> list[str]:
        self.sites[event["site"]] = "refused"
        return [f"[yellow]round {event['round']}: {event['site']} does not count: {event['reason']}[/]"]

    def _on_void(self, event: dict[str, Any]) -> list[str]:
        return [f"[yellow]round {event['round']} is below its quorum (attempt {event['attempt']}); tried again[/]"]

    def _on_committed(self, event: dict[str, Any]) -> list[str]:
        self.done = event["round"]
        self.last |= {"loss": event["loss"], "seconds": event["seconds"], "at": event["at"], "untold": True}
        return []

    def _on_evaluated(self, event: dict[str, Any]) -> list[str]:
        self.last["untold"] = False
        return [self._round_line(event["overall"])]

    def _round_line(self, overall: dict[str, Any]) -> str:
        loss = self.last.get("loss")
        parts = [f"round {self.done:>3}/{self.rounds}"]
        parts += [f"loss {loss:.4f}"] if loss is not None else []
        parts += [f"{name} {value:.3f}" for name, value in overall.items() if isinstance(value, float)]
        parts += [f"{self.last.get('seconds', 0):.1f} s"]
        left = self.seconds_left()
        return "  ".join(parts + ([f"about {left:.0f} s left"] if left and self.done < self.rounds else []))

    def seconds_left(self) -> float | None:
        """The rounds to come, at the pace so far."""
        done = self.done - self.last.get("first", 0)
        if done <= 0:
            return None
        return float((self.last["at"] - self.began) / done * (self.rounds - self.done))


class Watch:
    """Follows `events.jsonl` in a thread and shows it on a console until left."""

    def __init__(self, events: Path, console: Console) -> None:
        self._path, self._console, self._state = events, console, State()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._offset = events.stat().st_size if events.exists() else 0
        bar = BarColumn(bar_width=None)
        self._progress = Progress(
            TextColumn("{task.description}"), bar, MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._task = self._progress.add_task("rounds", total=None)
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._live.stop()

    def _follow(self) -> None:
        while not self._stop.is_set():
            self._read()
            self._stop.wait(_POLL_SECONDS)
        self._read()

    def _read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        whole = content.rfind(b"\n") + 1
        self._offset += whole
        for line in content[:whole].splitlines():
            for text in self._state.apply(json.loads(line)):
                self._console.print(Text.from_markup(text), soft_wrap=True)
        self._progress.update(self._task, total=self._state.rounds or None, completed=self._state.done)

    def _render(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        colours = {"training": "cyan", "done": "green", "refused": "yellow"}
        table.add_row(*[Text(f"{site}: {word}", colours.get(word, "")) for site, word in self._state.sites.items()])
        return Group(self._progress, table)


def step(console: Console) -> Callable[[str], None]:
    """Prints what was just done, with the seconds since the start."""
    began = time.monotonic()
    return lambda text: console.print(Text(f"{time.monotonic() - began:6.1f} s  {text}"), soft_wrap=True)
