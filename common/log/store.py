"""A log in a folder.

Rules:
  * `entries.jsonl` is the log: an entry a line, in canonical JSON. An append is whole or is not there, and is on the
    disk before it counts.
  * `tree` is made of it and can be made again: the hashes of all complete subtrees, 32 bytes each, in the order in
    which entries complete them (the stored hashes of Go's sumdb). So the hashes of a log of n entries are the first
    2n − popcount(n), whatever comes later.
  * `checkpoints.jsonl` has what was signed: `{"checkpoint": note}`, and `{"cosignature": line, "size": n}` for lines
    that witnesses gave later.
  * Several processes may append: whoever does holds the lock of `entries.jsonl`, and first reads what the others wrote.
  * On opening every entry is hashed and compared with the tree, and the root with the newest checkpoint. A last append
    that a crash has cut short was never promised to anybody, and is taken away. Whatever a checkpoint or the tree
    counts was whole once: if it is not any more, the log is damaged, and nothing is changed or appended.
  * Signatures are not checked here: that is for who knows the keys.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from locum.common.canonical import canonical_json
from locum.common.durable import flush
from locum.common.errors import LocumError
from locum.common.log import merkle
from locum.common.log.entries import Entry, EntryError, read_entry, written
from locum.common.log.lines import Lines, locked, write_all
from locum.common.log.merkle import HASH_BYTES, Frontier, leaf_hash
from locum.common.log.note import Checkpoint, Line, NoteError, opened, with_lines

ENTRIES, TREE, CHECKPOINTS = "entries.jsonl", "tree", "checkpoints.jsonl"


class LogError(LocumError):
    """A log that cannot be used as it is."""


def stored_count(size: int) -> int:
    """How many hashes are stored for a log of `size` entries: those of its complete subtrees."""
    return 2 * size - size.bit_count()


def stored_index(level: int, index: int) -> int:
    """Where the hash of a complete subtree is stored: behind those that its leaves have completed before it."""
    last = ((index + 1) << level) - 1
    return stored_count(last) + level


class Log:
    """The log in a folder, which is made if there is none.

    All methods raise LogError for a log that is damaged, and OSError for a disk that fails or is full; whatever was
    not returned before that is as if it had not been asked for.

    Attributes:
        origin: whose log it is: the first line of its checkpoints.
        repaired: what was put right since it was opened, a sentence each.
    """

    def __init__(self, folder: Path, origin: str) -> None:
        self.origin = origin
        self.repaired: tuple[str, ...] = ()
        self._folder = folder
        self._tree = folder / TREE
        self._entries, self._signed = Lines(folder / ENTRIES), Lines(folder / CHECKPOINTS)
        self._frontier = Frontier()
        #: By size, in their order: the line of the checkpoint, then those of its cosignatures.
        self._notes: dict[int, list[int]] = {}
        self._threads, self._locked = threading.RLock(), False
        _make(folder)
        with self._current(writing=True):
            pass

    # --- entries

    @property
    def size(self) -> int:
        """How many entries there are now, those of other processes included."""
        with self._current():
            return len(self._entries)

    def append(self, *entries: Entry) -> int:
        """Appends all of them, or none; the index of the first. They are on the disk when it returns.

        Raises EntryError for one that could not be read back.
        """
        lines = [_line(entry) for entry in entries]
        with self._current(writing=True):
            first = len(self._entries)
            if lines:
                self._write(lines)
            return first

    def entry(self, index: int) -> bytes:
        """The bytes of an entry; raises IndexError."""
        (found,) = self.entries(index, index + 1)
        return found

    def entries(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The entries from `start` up to `end`, or all that there are; raises IndexError."""
        if end is None or end > len(self._entries):
            there = self.size
            end = there if end is None else end
        return self._entries.lines(start, end)

    # --- the tree

    def root(self, size: int | None = None) -> bytes:
        """The root over the first `size` entries, or all; raises IndexError."""
        with self._sized(size) as (hashes, there):
            return merkle.root(hashes, there)

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """The proof that entry `index` is in the log of `size` entries; raises IndexError."""
        with self._sized(size) as (hashes, there):
            return merkle.inclusion_proof(hashes, index, there)

    def consistency(self, old: int, new: int | None = None) -> list[bytes]:
        """The proof that the log of `new` entries begins with that of `old`; raises IndexError."""
        with self._sized(new) as (hashes, there):
            return merkle.consistency_proof(hashes, old, there)

    # --- checkpoints

    def checkpoint(self, sign: Callable[[Checkpoint], str]) -> str:
        """The checkpoint of the log as it is now, with what witnesses signed of it; signed if it is not yet."""
        with self._current(writing=True):
            size = len(self._entries)
            if size not in self._notes:
                checkpoint = Checkpoint(self.origin, size, self._frontier.root())
                note = sign(checkpoint)
                if opened(note)[0] != checkpoint:
                    raise NoteError("what was signed is another checkpoint")
                self._record(size, {"checkpoint": note})
            return self._note(size)

    def latest(self) -> str | None:
        """The newest checkpoint, with what witnesses signed of it."""
        with self._current():
            return self._note(next(reversed(self._notes))) if self._notes else None

    def checkpoint_of(self, size: int) -> str | None:
        """The checkpoint of that size, with what witnesses signed of it, if there is one."""
        with self._current():
            return self._note(size) if size in self._notes else None

    def checkpoints(self) -> Iterator[str]:
        """All checkpoints, the oldest first, each with what witnesses signed of it."""
        with self._current():
            sizes = list(self._notes)
        return (self._note(size) for size in sizes)

    def add_cosignature(self, size: int, line: str) -> bool:
        """Keeps a witness's line under the checkpoint of that size; false if the key has one there already.

        The caller has checked the signature. Raises NoteError for a line that is none, and IndexError if there is no
        checkpoint of that size.
        """
        Line.parse(line)
        with self._current(writing=True):
            if size not in self._notes:
                raise IndexError(f"there is no checkpoint of {size} entries")
            note = self._note(size)
            if with_lines(note, [line]) == note:
                return False
            self._record(size, {"cosignature": line, "size": size})
            return True

    # --- what others wrote

    @contextmanager
    def _current(self, *, writing: bool = False) -> Iterator[None]:
        """All is known that others wrote, and under the lock if it must be so; one thread at a time."""
        with self._threads:
            if self._locked or not (writing or self._changed()):
                yield
                return
            with locked(self._folder / ENTRIES):
                self._locked = True
                try:
                    if self._changed():
                        self._catch_up()
                    yield
                finally:
                    self._locked = False

    def _changed(self) -> bool:
        return (
            self._entries.there() != self._entries.end
            or self._signed.there() != self._signed.end
            or self._tree_short() != 0
        )

    def _tree_short(self) -> int:
        """How many bytes the tree is too short for the known entries; below 0 if it is longer."""
        return stored_count(len(self._entries)) * HASH_BYTES - self._tree.stat().st_size

    def _catch_up(self) -> None:
        """Reads what is new, checks it, and then puts right what a crash has left; what is damaged is not touched."""
        for lines, what in ((self._entries, "entry {}"), (self._signed, f"line {{}} of {CHECKPOINTS}")):
            if (lost := lines.lost()) is not None:
                raise self._damaged(f"at {what.format(lost)}, which was there before")
        entries, known, signed, frontier = self._entries, len(self._entries), len(self._signed), self._frontier
        notes = {size: list(lines) for size, lines in self._notes.items()}
        if self._tree_short() > 0:  # all of it is compared anew
            self._entries, self._frontier = Lines(self._folder / ENTRIES), Frontier()
        try:
            self._read_signed()
            agreed = self._read_entries()
        except BaseException:
            entries.forget(known)
            self._signed.forget(signed)
            self._entries, self._frontier, self._notes = entries, frontier, notes
            raise
        self._put_right(agreed)

    def _read_signed(self) -> None:
        for append in self._signed.unread():
            number = len(self._signed)
            self._signed.take(append)
            try:
                (line,) = append
                self._index(number, json.loads(line))
            except ValueError as error:
                raise self._damaged(f"at line {number} of {CHECKPOINTS}") from error

    def _index(self, number: int, found: object) -> None:
        """Files a line under its size; raises ValueError for one that is none of ours."""
        match found:
            case {"checkpoint": str(note)}:
                checkpoint, _ = opened(note)
                if checkpoint.origin != self.origin:
                    message = f"the log in {self._folder} is that of {checkpoint.origin}, not of {self.origin}"
                    raise LogError(message, "name the folder of this log")
                if self._notes and checkpoint.size <= self._newest():
                    raise ValueError("a checkpoint is not larger than the one before")
                self._notes[checkpoint.size] = [number]
            case {"cosignature": str(line), "size": int(size)} if size in self._notes:
                Line.parse(line)
                self._notes[size].append(number)
            case _:
                raise ValueError("neither a checkpoint nor a line under one")

    def _newest(self) -> int:
        """The size of the newest checkpoint; 0 if there is none."""
        return next(reversed(self._notes), 0)

    def _read_entries(self) -> int:
        """Reads new entries; up to which entry the tree agrees with them."""
        known, signed = len(self._entries), self._newest()
        whole = max(signed, _entries_of(self._tree.stat().st_size // HASH_BYTES))
        agreed: int | None = None
        with self._tree.open("rb") as tree:
            tree.seek(stored_count(known) * HASH_BYTES)
            for append in self._entries.unread():
                frontier = self._frontier.copy()
                made = self._hashed(append, frontier)
                if agreed is None and tree.read(len(made)) != made:
                    agreed = self._frontier.size
                if agreed is not None and not self._readable(append, whole):
                    break
                self._entries.take(append)
                self._frontier = frontier
        if signed > self._frontier.size:
            raise self._damaged(f"at entry {self._frontier.size}: a checkpoint of {signed} entries was signed")
        if self._notes and signed <= known:
            self._check_root(signed, self.root(signed))
        return self._frontier.size if agreed is None else agreed

    def _hashed(self, append: Sequence[bytes], frontier: Frontier) -> bytes:
        """Adds entries to a frontier; the hashes to store. Raises LogError where the newest checkpoint differs."""
        made: list[bytes] = []
        signed = self._newest()
        for line in append:
            made += frontier.add(leaf_hash(line))
            if frontier.size == signed:
                self._check_root(signed, frontier.root())
        return b"".join(made)

    def _readable(self, append: Sequence[bytes], whole: int) -> bool:
        """Whether an append that the tree does not have was written whole; raises LogError if it was so once."""
        first, signed = len(self._entries), self._newest()
        for index, line in enumerate(append, first):
            if index >= signed and not _is_entry(line):
                if index < whole:
                    raise self._damaged(f"at entry {index}")
                return False
        return True

    def _check_root(self, size: int, root: bytes) -> None:
        if opened(self._note(size))[0].root != root:
            raise self._damaged(self._where() if size else "at the checkpoint of no entries")

    def _where(self) -> str:
        """Where entries are not those of the checkpoints, as closely as can be told."""
        frontier, good, suspect = Frontier(), 0, None
        with self._hash_reader() as hashes:
            for line in itertools.chain.from_iterable(Lines(self._folder / ENTRIES).unread()):
                index, leaf = frontier.size, leaf_hash(line)
                frontier.add(leaf)
                if suspect is None and (hashes(0, index) not in {leaf, b""} or not _is_entry(line)):
                    suspect = index
                if frontier.size not in self._notes:
                    continue
                if opened(self._note(frontier.size))[0].root != frontier.root():
                    break
                good, suspect = frontier.size, None
        if suspect is not None:
            return f"at entry {suspect}"
        return f"between entries {good} and {frontier.size - 1}"

    def _damaged(self, where: str) -> LogError:
        return LogError(
            f"the log in {self._folder} was damaged {where}",
            "restore the folder from a backup; nothing was changed or appended",
        )

    # --- what a crash has left

    def _put_right(self, agreed: int) -> None:
        """Takes away appends that were cut short, and makes the tree anew from where it does not agree."""
        for lines, name in ((self._entries, ENTRIES), (self._signed, CHECKPOINTS)):
            if taken := lines.cut():
                self._tell(f"the last append to {name} had been cut short: {taken} bytes were taken away")
        size = len(self._entries)
        if agreed < size or self._tree_short() != 0:
            self._rebuild(agreed)
            self._tell(f"the tree was made anew from entry {agreed} on")

    def _tell(self, sentence: str) -> None:
        self.repaired = (*self.repaired, sentence)

    def _rebuild(self, agreed: int) -> None:
        with self._hash_reader() as hashes:
            frontier = Frontier(agreed, merkle.peaks(hashes, agreed))
        with self._tree.open("r+b") as file:
            file.truncate(stored_count(agreed) * HASH_BYTES)
            file.seek(0, os.SEEK_END)
            for line in self._entries.lines(agreed, len(self._entries)):
                file.writelines(frontier.add(leaf_hash(line)))

    # --- the files

    def _write(self, lines: Sequence[bytes]) -> None:
        frontier = self._frontier.copy()
        made = b"".join(itertools.chain.from_iterable(frontier.add(leaf_hash(line)) for line in lines))
        self._entries.write(lines)
        try:
            self._store(made)
        except OSError:
            self._entries.cut()
            raise
        self._entries.take(lines)
        self._frontier = frontier

    def _store(self, made: bytes) -> None:
        start = stored_count(len(self._entries)) * HASH_BYTES
        with self._tree.open("r+b", buffering=0) as file:
            file.seek(start)
            try:
                write_all(file.fileno(), made)
            except OSError:
                file.truncate(start)
                raise

    def _record(self, size: int, found: dict[str, Any]) -> None:
        line = canonical_json(found)
        self._signed.write([line])
        self._notes.setdefault(size, []).append(len(self._signed))
        self._signed.take([line])

    def _note(self, size: int) -> str:
        first, *others = (json.loads(self._signed.line(number)) for number in self._notes[size])
        note: str = first["checkpoint"]
        return with_lines(note, [found["cosignature"] for found in others])

    @contextmanager
    def _sized(self, size: int | None) -> Iterator[tuple[merkle.Hashes, int]]:
        """The stored hashes, and the size that is meant; raises IndexError beyond the log."""
        there = len(self._entries) if size is not None and size <= len(self._entries) else self.size
        if size is not None and not 0 <= size <= there:
            raise IndexError(f"the log has {there} entries, not {size}")
        with self._hash_reader() as hashes:
            yield hashes, there if size is None else size

    @contextmanager
    def _hash_reader(self) -> Iterator[merkle.Hashes]:
        """The stored hashes; empty for one that is not there."""
        with self._tree.open("rb", buffering=0) as file:
            yield lambda level, index: os.pread(file.fileno(), HASH_BYTES, stored_index(level, index) * HASH_BYTES)


def _make(folder: Path) -> None:
    missing = [name for name in (ENTRIES, TREE, CHECKPOINTS) if not (folder / name).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        for name in missing:
            (folder / name).touch()
        flush(folder)
        flush(folder.parent)


def _line(entry: Entry) -> bytes:
    """An entry's bytes, which can be read back; raises EntryError."""
    line = written(entry)
    read_entry(line)
    return line


def _is_entry(line: bytes) -> bool:
    try:
        read_entry(line)
    except EntryError:
        return False
    return True


def _entries_of(hashes: int) -> int:
    """The largest log that so many stored hashes are enough for."""
    size = hashes // 2
    while stored_count(size + 1) <= hashes:
        size += 1
    return size
