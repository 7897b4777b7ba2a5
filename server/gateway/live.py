"""What each site said last, for `locum watch` and `locum server status`; and that a site is one agent, not two.

Rules:
  * `live.json` is written whole, at most once a second, and only when something changed; never within a site's call.
  * An agent holds its site's lease while it is heard. A second agent with the same key is refused until the first was
    silent for 15 s; but the next one in the same folder, where only one can live at a time, takes over at once.
  * Times are the coordinator's; a site's clock is told as its offset.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from locum.common.durable import replace_unflushed
from locum.common.proto.locum_pb2 import ReportRequest

log = logging.getLogger("locum.gateway")

LEASE_SECONDS = 15.0
_WRITE_SECONDS = 1.0


@dataclass(frozen=True)
class Heard:
    """A site's last word.

    Attributes:
        activity: what it does, one of `locum.common.activity`.
        run: the run at hand, or empty.
        round: of that run.
        done: bytes or seconds, by activity.
        total: of the same.
        instance: the agent's own number: its folder's, a colon, and a draw at its start.
        version: of Locum at the site.
        at: when it was heard, seconds since 1970.
        clock_offset: the site's clock less ours, seconds.
        since: when activity, run and round became what they are, seconds since 1970.
    """

    activity: str
    run: str
    round: int
    done: int
    total: int
    instance: str
    version: str
    at: float
    clock_offset: float
    since: float


_FILE = TypeAdapter(dict[str, Heard])


def read_live(path: Path) -> dict[str, Heard]:
    """What `live.json` says, by site; nothing if it is missing or damaged, for it is only what was heard last."""
    try:
        return _FILE.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


class Live:
    """The sites as last heard. Shared by threads; one process writes the file."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._heard = read_live(path)
        self._leases: dict[str, tuple[str, float]] = {}
        self._changed = False
        self._written = -_WRITE_SECONDS

    def claim(self, site: str, instance: str) -> bool:
        """Whether this agent is the site's; it is until it was silent for 15 s. Every claim counts as heard."""
        now = self._clock()
        with self._lock:
            folder = instance.partition(":")[0]
            holder, heard = self._leases.get(site, (folder, now))
            if holder != folder and now - heard < LEASE_SECONDS:
                return False
            self._leases[site] = (folder, now)
            return True

    def report(self, site: str, said: ReportRequest) -> bool:
        """Notes what an agent says; returns False, and notes nothing, if another agent is the site's."""
        if not self.claim(site, said.instance):
            return False
        with self._lock:
            self._heard[site] = _heard(said, self._heard.get(site), time.time())
            self._changed = True
        return True

    def flush(self, *, now: bool = False) -> None:
        """Writes `live.json` if something changed and the last writing is a second old (or `now`); raises OSError."""
        with self._writing:
            with self._lock:
                due = self._changed and (now or self._clock() - self._written >= _WRITE_SECONDS)
                if not due:
                    return
                content = {site: asdict(heard) for site, heard in sorted(self._heard.items())}
                self._changed, self._written = False, self._clock()
            replace_unflushed(self._path, json.dumps(content).encode())

    def keep(self, stop: threading.Event) -> None:
        """Writes what changed, every second, until `stop` is set; a full disk is tried again."""
        while not stop.wait(_WRITE_SECONDS):
            try:
                self.flush()
            except OSError as error:
                log.warning("%s cannot be written: %s", self._path, error.strerror)
                with self._lock:
                    self._changed = True


def _heard(said: ReportRequest, before: Heard | None, at: float) -> Heard:
    heard = Heard(
        activity=said.activity,
        run=said.run,
        round=said.round,
        done=said.done,
        total=said.total,
        instance=said.instance,
        version=said.version,
        at=at,
        clock_offset=round(said.clock - at, 3),
        since=at,
    )
    if before is not None and (before.activity, before.run, before.round) == (heard.activity, heard.run, heard.round):
        return replace(heard, since=before.since)
    return heard
