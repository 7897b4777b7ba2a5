"""How fast a PACS is asked, and how long it is left alone after it has refused.

Rules:
  * A PACS serves its clinic first: no more instances a second than the site file allows, at any moment.
  * After a failure the wait doubles; a PACS that says how long (Retry-After) is obeyed, within reason.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

#: Seconds by which an instance may come before its turn.
_SLACK = 0.05
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
#: A PACS that asks for more patience than this is away.
_LONGEST_ASKED = 600.0


@dataclass
class Pace:
    """Room for one instance after another, at a rate.

    Attributes:
        rate: instances a second.
    """

    rate: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], object] = time.sleep
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _next: float = 0.0

    def take(self) -> None:
        """Wait until one more instance may come; several threads may call it."""
        with self._lock:
            now = self.clock()
            # A sleep that lasted a little too long is made up for, an idle hour is not.
            turn = max(self._next, now - _SLACK)
            self._next = turn + 1 / self.rate
        if turn > now:
            self.sleep(turn - now)


def wait_after(failures: int, asked: float) -> float:
    """Seconds to wait after so many failures in a row: 0.5, 1, 2, … to 60, or what the PACS asked for."""
    return max(min(_FIRST_WAIT * 2.0 ** (failures - 1), _LONGEST_WAIT), min(asked, _LONGEST_ASKED))
