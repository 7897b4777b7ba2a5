"""The hours in which a site works for others: `20:00-06:00`, `Mon-Fri 20:00-06:00`, `Sat,Sun 00:00-24:00`.

Times are those of the clock on the wall of the site. A window past midnight belongs to the day on which it begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_DAY = "(?:" + "|".join(_DAYS) + ")"
_WINDOW = re.compile(rf"({_DAY}(?:-{_DAY})?(?:,{_DAY}(?:-{_DAY})?)*\s+)?(\d\d):(\d\d)\s*-\s*(\d\d):(\d\d)")
_EXAMPLE = "write hours as '20:00-06:00' or 'Mon-Fri 20:00-06:00', or a list of such"
_MIDNIGHT = 24 * 60


@dataclass(frozen=True)
class Window:
    """Some hours of some days of the week.

    Attributes:
        days: 0 is Monday.
        begins: minutes after midnight.
        ends: minutes after midnight; not after `begins` if the window reaches into the next day.
    """

    days: frozenset[int]
    begins: int
    ends: int

    def __contains__(self, moment: datetime) -> bool:
        day, minute = moment.weekday(), moment.hour * 60 + moment.minute
        if self.begins < self.ends:
            return day in self.days and self.begins <= minute < self.ends
        return (day in self.days and minute >= self.begins) or ((day - 1) % 7 in self.days and minute < self.ends)

    def __str__(self) -> str:
        days = "" if len(self.days) == len(_DAYS) else ",".join(_DAYS[day] for day in sorted(self.days)) + " "
        return f"{days}{_clock(self.begins)}-{_clock(self.ends)}"


def window(text: str) -> Window:
    """Parses one window; raises ValueError."""
    found = _WINDOW.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"'{text}' is no window of hours: {_EXAMPLE}")
    begins, ends = (int(hour) * 60 + int(minute) for hour, minute in (found.group(2, 3), found.group(4, 5)))
    if begins >= _MIDNIGHT or ends > _MIDNIGHT or begins == ends or any(int(found[at]) > 59 for at in (3, 5)):
        raise ValueError(f"'{text}' is no window between 00:00 and 24:00")
    return Window(_days(found[1] or "Mon-Sun"), begins, ends)


def open_at(hours: Iterable[Window], moment: datetime) -> bool:
    """Whether one of the windows holds `moment`, the site's local time."""
    return any(moment in one for one in hours)


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        begin, end = _DAYS.index(first), _DAYS.index(last or first)
        found.update(day % 7 for day in range(begin, end + 1 + 7 * (end < begin)))
    return frozenset(found)


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _windows(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str | Window) for text in texts):
        raise ValueError(_EXAMPLE)
    return tuple(window(text) if isinstance(text, str) else text for text in texts)


#: One or several windows, written as text.
Hours = Annotated[
    tuple[Window, ...],
    BeforeValidator(_windows),
    PlainSerializer(lambda windows: [str(one) for one in windows], return_type=list[str]),
    WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}, "examples": ["Mon-Fri 20:00-06:00"]}),
]
