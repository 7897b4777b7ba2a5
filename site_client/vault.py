"""What a site keeps of secure aggregation, one folder a run: its state, and which sums it has let be unmasked.

state.json       keys of the set-up that holds (mode 0600); replaced whole, so that spent keys are gone from the file
answered.jsonl   for each sum of the run, under whatever roster, the survivors for whom this site gave its shares
noised.jsonl     the digest of each context under which this site gave an update with its noise

All are on the disk before anything made with them leaves the site. A file system or a disk may keep what was replaced;
who must rule that out encrypts the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from locum.common.blobs import write_all
from locum.common.durable import Write, flush, replace_file
from locum.common.identity import write_secret
from locum.common.secagg.site import State

_STATE: TypeAdapter[State] = TypeAdapter(State)
#: Runs whose keys are kept; what was answered is kept of all.
_MOST_RUNS = 16


class Vault:
    """The vault in a folder of its own. Methods that write raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._answered: dict[str, dict[str, tuple[str, ...]]] = {}

    def state(self, run: str) -> State | None:
        """The state of a run's set-up; None if there is none, or none that can be read."""
        try:
            return _STATE.validate_json((self._folder / run / "state.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def keep(self, run: str, state: State) -> None:
        """Replaces a run's state."""
        folder = self._folder / run
        if not folder.exists():
            folder.mkdir(parents=True, mode=0o700)
            flush(self._folder)
            self._forget_old()
        replace_file(folder / "state.json", _private(_STATE.dump_json(state)))

    def answered(self, run: str, total: str) -> Sequence[str] | None:
        """The survivors for whom a sum was unmasked; None if it was not."""
        return self._of(run).get(total)

    def answer(self, run: str, total: str, survivors: Sequence[str]) -> None:
        """Writes down for whom a sum is unmasked."""
        known = self._of(run)
        if total in known:
            return
        try:
            _append(self._folder / run / "answered.jsonl", [total, list(survivors)])
        except OSError:
            self._answered.pop(run)  # what stands in the file is read anew, for a part of a line may
            raise
        known[total] = tuple(survivors)

    def noised(self, run: str) -> int:
        """Updates with noise that were given to a run, counted before they left."""
        path = self._folder / run / "noised.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def add_noised(self, run: str, context: str) -> None:
        """Writes down that one more leaves."""
        _append(self._folder / run / "noised.jsonl", context)

    def _of(self, run: str) -> dict[str, tuple[str, ...]]:
        """What was answered; a last line that was cut off by a crash was never acted on, and is removed."""
        if run not in self._answered:
            path = self._folder / run / "answered.jsonl"
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
            lines = (json.loads(line) for line in whole.splitlines())
            self._answered[run] = {total: tuple(survivors) for total, survivors in lines}
        return self._answered[run]

    def _forget_old(self) -> None:
        """Removes the keys of all runs but the newest."""
        states = sorted(self._folder.glob("*/state.json"), key=lambda path: path.stat().st_mtime)
        for path in states[: -(_MOST_RUNS - 1)]:
            path.unlink(missing_ok=True)


def _append(path: Path, value: Any) -> None:
    """Writes a line to the end of a file, on the disk before this returns."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        write_all(descriptor, memoryview(json.dumps(value).encode() + b"\n"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    flush(path.parent)


def _private(content: bytes) -> Write:
    def write(path: Path) -> None:
        path.unlink(missing_ok=True)  # of a process of the same number that died
        write_secret(path, content)

    return write
