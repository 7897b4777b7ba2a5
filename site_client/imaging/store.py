"""The files of a store, written so that a name never stands for half a file.

Rules:
  * A file is written under another name, flushed to the disk and renamed: a batch of them before each commit
    of the catalog, so that the catalog never names a file that a power cut can take away.
  * One ingest at a time writes to a store.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from locum.common.durable import flush
from locum.common.errors import DataError, RunError

VOLUMES = "volumes"
MASKS = "masks"
#: The cleaned DICOM files of each case, a folder a case, where the site keeps them.
DICOM = "dicom"
_PART = ".part"


class Draft:
    """Files of a store that are written but not yet under their names."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._names: list[str] = []

    def write(self, name: str, *parts: bytes | memoryview) -> str:
        """Write the file `name` (relative to the store), part after part, and return the name."""
        part = self._store / f"{name}{_PART}"
        part.parent.mkdir(exist_ok=True)
        with part.open("wb", buffering=0) as file:
            for content in parts:
                _write_all(file, content)
        self._names.append(name)
        return name

    def clear(self, folder: str) -> None:
        """Remove a folder of the store that is about to be written anew."""
        shutil.rmtree(self._store / folder, ignore_errors=True)

    def publish(self) -> None:
        """Flush all to the disk and give each its name."""
        parts = [self._store / f"{name}{_PART}" for name in self._names]
        # Flushes at the same time share the journal's commits: a seventh of the time of one after the other.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(flush, parts))
        for name in self._names:
            (self._store / f"{name}{_PART}").replace(self._store / name)
        for folder in {(self._store / name).parent for name in self._names}:
            flush(folder)
        self._names.clear()


def _write_all(file: io.FileIO, content: bytes | memoryview) -> None:
    """One write of the system takes at most 2 GiB."""
    rest = memoryview(content).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def sweep(store: Path, belongs: Callable[[str, str], bool]) -> None:
    """Remove what no case has any more, and what an interrupted ingest left.

    Args:
        store: the folder.
        belongs: whether the case of an id has a file of this name, relative to the store.
    """
    for folder in (VOLUMES, MASKS, DICOM):
        for entry in _entries(store / folder):
            name = f"{folder}/{entry.name}"
            if not belongs(entry.name.partition(".")[0], name):
                (shutil.rmtree if entry.is_dir() else os.unlink)(entry.path)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


@contextmanager
def exclusive(store: Path) -> Iterator[None]:
    """Make the folders of a store and hold it for one writer.

    Raises:
        DataError: another process is writing to it, or its catalog is damaged.
        RunError: the store cannot be written, a full disk for one; what was committed stays.
    """
    with _write_errors_are_told(store):
        store.mkdir(mode=0o700, parents=True, exist_ok=True)  # the catalog has the names of the site's own files
        for folder in (VOLUMES, MASKS, DICOM):
            (store / folder).mkdir(parents=True, exist_ok=True)
        with (store / ".lock").open("w") as lock:
            _lock(lock.fileno(), store)
            yield


def _lock(descriptor: int, store: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another ingest is writing to {store}", "wait for it to end") from None


@contextmanager
def _write_errors_are_told(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise RunError(f"the store {store} cannot be written: {what}", _remedy()) from error
    except sqlite3.OperationalError as error:
        raise RunError(f"the catalog in {store} cannot be written: {error}", _remedy()) from error
    except sqlite3.DatabaseError as error:
        raise DataError(f"the catalog in {store} cannot be read: {error}", "ingest into a new store") from error


def _remedy() -> str:
    return "free space or mend the access rights, and ingest again: it continues where it stopped"
