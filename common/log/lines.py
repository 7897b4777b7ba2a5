"""A file of lines to which whole appends are made: after a crash at any byte each of them is there, or is not.

Rules:
  * An append is one write, flushed to the disk before it counts. Of its lines all but the last end in a space, which
    no line has by itself: what does not reach a line without one is an append that was cut short.
  * Nothing that counts is ever written over or moved.
  * Whoever reads what is new, cuts or appends holds the lock (:func:`locked`); what is known is read without it.
"""

from __future__ import annotations

import fcntl
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

_MORE = b" "
_BLOCK = 1 << 20


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock on an existing file, against other processes and other users of it in this one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Lines:
    """The lines of a file, as far as they have been read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def end(self) -> int:
        """Bytes of the lines that are known."""
        return self._ends[-1] if self._ends else 0

    def there(self) -> int:
        """Bytes of the file; raises OSError."""
        return self._path.stat().st_size

    def lost(self) -> int | None:
        """The first of the known lines that the file has not got any more, if it became shorter; raises OSError."""
        there = self.there()
        return bisect_right(self._ends, there) if there < self.end else None

    def unread(self) -> Iterator[list[bytes]]:
        """The whole appends after what is known, each as its lines; nothing of it is known by that.

        A last one that was cut short is left out; :meth:`take` says how far it goes.
        """
        lines: list[bytes] = []
        for line in _lines(self._path, self.end):
            if line.endswith(_MORE):
                lines.append(line[:-1])
            else:
                yield [*lines, line]
                lines = []

    def take(self, append: Sequence[bytes]) -> None:
        """Makes the next append known: what :meth:`unread` gave, or :meth:`append` has written."""
        end = self.end
        for line in append[:-1]:
            end += len(line) + 2
            self._ends.append(end)
        self._ends.append(end + len(append[-1]) + 1)

    def cut(self) -> int:
        """Takes away what lies behind the known lines; how many bytes that was. Raises OSError."""
        more = self.there() - self.end
        if more > 0:
            with self._path.open("r+b", buffering=0) as file:
                file.truncate(self.end)
                os.fdatasync(file.fileno())
        return max(more, 0)

    def write(self, append: Sequence[bytes]) -> None:
        """Writes lines behind the known ones, and flushes them; raises OSError and then leaves the file as it was.

        Raises ValueError for what is not one line, or ends in a space.
        """
        if any(b"\n" in line or line.endswith(_MORE) for line in append):
            raise ValueError("a line has no line feed in it and no space at its end")
        content = (_MORE + b"\n").join(append) + b"\n"
        with self._path.open("r+b", buffering=0) as file:
            file.seek(self.end)
            try:
                write_all(file.fileno(), content)
                os.fdatasync(file.fileno())
            except OSError:
                file.truncate(self.end)
                raise

    def forget(self, count: int) -> None:
        """Knows only the first `count` lines any more."""
        del self._ends[count:]

    def line(self, index: int) -> bytes:
        """A line; raises IndexError."""
        (found,) = self.lines(index, index + 1)
        return found

    def lines(self, start: int, end: int) -> Iterator[bytes]:
        """Lines from `start` up to `end`; raises IndexError outside of what is known."""
        if not 0 <= start <= end <= len(self._ends):
            raise IndexError(f"there are no lines {start} to {end} among {len(self._ends)}")
        return self._blocks(start, end)

    def _blocks(self, start: int, end: int) -> Iterator[bytes]:
        with self._path.open("rb", buffering=0) as file:
            while start < end:
                first = self._ends[start - 1] if start else 0
                stop = max(start + 1, min(end, bisect_right(self._ends, first + _BLOCK, start, end)))
                bounds = [first, *self._ends[start:stop]]
                block = os.pread(file.fileno(), bounds[-1] - first, first)
                yield from (block[a - first : b - first - 1].removesuffix(_MORE) for a, b in pairwise(bounds))
                start = stop


def write_all(descriptor: int, content: bytes) -> None:
    """Writes all of it where the file stands; raises OSError."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _lines(path: Path, start: int) -> Iterator[bytes]:
    """The whole lines of a file from a byte on."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        rest = b""
        while block := file.read(_BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
