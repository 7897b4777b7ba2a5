"""Fetching in threads of their own, while what has come is cleaned and written here.

Rules:
  * What is fetched and not yet taken is bounded in bytes: a thread that is ahead waits, and with it the PACS.
  * A failure is handed over in its place in the stream, after all that came before it.
  * Whoever stops listening stops the threads at their next instance.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from locum.common.errors import LocumError
from locum.site_client.imaging.retrieve.peer import SeriesError, Take, Want

#: What is fetched ahead, at most; one instance may be larger.
MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened: an instance came, or a fetch is over.

    Attributes:
        content: the instance, a Part 10 file; None at the end of the fetch.
        error: why the fetch ended before its time, or None.
    """

    want: Want
    content: bytes | None = None
    error: Exception | None = None


class StoppedError(Exception):
    """Nobody listens any more."""


@contextmanager
def fetched(fetch: Callable[[Want, Take], None], wants: Sequence[Want], threads: int) -> Iterator[Iterator[Event]]:
    """The events of fetching `wants`, in `threads` threads, in the order in which they happen."""
    line = _Line(len(wants))
    todo = iter(wants)
    crew = [threading.Thread(target=_work, args=(fetch, todo, line), daemon=True) for _ in range(threads)]
    for thread in crew:
        thread.start()
    try:
        yield line.events()
    finally:
        line.stop()
        for thread in crew:
            thread.join()


def _work(fetch: Callable[[Want, Take], None], todo: Iterator[Want], line: _Line) -> None:
    with contextlib.suppress(StoppedError):
        while (want := line.next(todo)) is not None:
            line.put(Event(want, error=_failure(fetch, want, line)), 0)


def _failure(fetch: Callable[[Want, Take], None], want: Want, line: _Line) -> Exception | None:
    try:
        fetch(want, line.taker(want))
    except Exception as error:  # noqa: BLE001 (it is raised again where the events are read)
        return error
    return None


class _Line:
    """Events that wait to be read."""

    def __init__(self, fetches: int) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Event, int]] = deque()
        self._bytes = 0
        self._open = fetches
        self._stopped = False

    def next(self, todo: Iterator[Want]) -> Want | None:
        with self._changed:
            return None if self._stopped else next(todo, None)

    def taker(self, want: Want) -> Take:
        return lambda content: self.put(Event(want, content), len(content))

    def put(self, event: Event, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._bytes or self._bytes + size <= MOST_BYTES)
            if self._stopped:
                raise StoppedError
            self._waiting.append((event, size))
            self._bytes += size
            self._changed.notify_all()

    def events(self) -> Iterator[Event]:
        while self._open:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                event, size = self._waiting.popleft()
                self._bytes -= size
                self._changed.notify_all()
            if event.content is None:
                self._open -= 1
                if event.error is not None and not isinstance(event.error, LocumError | SeriesError):
                    raise event.error
            yield event

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
