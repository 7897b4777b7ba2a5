"""The message at hand, on disk: what an agent that was killed goes on with.

A message is written down before the coordinator is told that it arrived, its reply before it is sent. So a reply is
never lost and never made twice: an agent that comes back delivers what is finished, or does again what was not.
One message at a time: `current/` holds `message`, `bundle`, `run.json`, and once it is made `reply`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message
from google.protobuf.message import DecodeError

from locum.common.durable import create_folder, replace_file
from locum.site_client.fleet import Incoming, RunOf, from_bytes, to_bytes


@dataclass(frozen=True)
class Entry:
    """A message that was taken in and is not answered yet."""

    message: Message
    run: RunOf
    reply: Message | None = None


class Journal:
    """The journal in a folder of its own. Methods that write raise OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._current = folder / "current"
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, incoming: Incoming, run: RunOf) -> Entry:
        """Writes down a message, in place of one before it."""
        files = {
            "message": to_bytes(incoming.message),
            "bundle": run.bundle,
            "run.json": json.dumps({"name": run.name}).encode(),
        }
        create_folder(self._current, files)
        return Entry(incoming.message, run)

    def current(self) -> Entry | None:
        """What is not answered yet; None if all is, or if what is there cannot be read."""
        try:
            message = from_bytes((self._current / "message").read_bytes())
            name = str(json.loads((self._current / "run.json").read_bytes())["name"])
            bundle = (self._current / "bundle").read_bytes()
            reply = self._current / "reply"
            made = from_bytes(reply.read_bytes()) if reply.exists() else None
        except (OSError, ValueError, LookupError, TypeError, DecodeError):
            return None
        return Entry(message, RunOf(name, bundle), made)

    def finish(self, reply: Message) -> None:
        """Writes down the reply to the current message."""
        replace_file(self._current / "reply", to_bytes(reply))

    def clear(self) -> None:
        """The current message is answered."""
        gone = self._folder / "answered"
        shutil.rmtree(gone, ignore_errors=True)
        if self._current.exists():
            self._current.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
