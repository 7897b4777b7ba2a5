"""Reading `events.jsonl` while a run writes it, or after something killed who wrote it.

Only whole lines count. Of a line that its writer did not finish (it died, the disk was full) what the next writer added
is read, and nothing else: an event begins with {"at", and inside a string that quotation mark would be escaped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_BEGIN = b'{"at"'
_TAIL = 1 << 18


class EventReader:
    """Reads what was appended to a file of events since the last look; the file may not exist yet."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path, self._offset = path, offset

    def read(self) -> list[Event]:
        """The events that are new, in the order in which they were written."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content.rfind(b"\n") + 1
        self._offset += whole
        return [event for event in map(_event, content[:whole].splitlines()) if event is not None]


def read_events(path: Path) -> list[Event]:
    """All events of a file; none if it does not exist."""
    return EventReader(path).read()


def last_event(path: Path) -> Event | None:
    """The newest event of a file, from its end, however long it is; None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            content = file.read()
    except FileNotFoundError:
        return None
    whole = content[: content.rfind(b"\n") + 1].splitlines()
    return next(filter(None, map(_event, reversed(whole))), None)


def end_of(path: Path) -> int:
    """Where a reader begins that wants only what is yet to come."""
    return path.stat().st_size if path.exists() else 0


def _event(line: bytes) -> Event | None:
    return _parsed(line) or _parsed(line[max(0, line.rfind(_BEGIN)) :])


def _parsed(line: bytes) -> Event | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    told = isinstance(found, dict) and isinstance(found.get("event"), str) and isinstance(found.get("at"), float | int)
    return found if told else None
