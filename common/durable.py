"""Files that are either the old ones or the new ones, whole, after a crash at any byte.

Write beside the target, flush to the disk, rename over it, flush the folder (POSIX rename is atomic). A database has
transactions for it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and flushes it to the disk; not atomic by itself."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


#: Writes a file at the path it is given and flushes it to the disk.
Write = Callable[[Path], object]


def replace_file(path: Path, content: bytes | Write) -> None:
    """Replaces `path` by `content`, atomically and durably; raises OSError and then leaves the old file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _written(beside, content)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def replace_unflushed(path: Path, content: bytes) -> None:
    """Replaces a file that only tells how things are now: whole for whoever reads, of no use after a power cut."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def create_folder(path: Path, files: Mapping[str, bytes | Write]) -> None:
    """Creates the folder `path` with `files`, written in their order, atomically and durably; raises OSError.

    One that is there is replaced, and a crash between its end and the rename leaves neither.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name, content in files.items():
            _written(beside / name, content)
        flush(beside)
        if path.exists():
            shutil.rmtree(path)
        beside.rename(path)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush(path.parent)


def _written(path: Path, content: bytes | Write) -> None:
    if isinstance(content, bytes):
        write_synced(path, content)
    else:
        content(path)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One change of a database that is opened without transactions of its own; undone if anything is raised."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()
