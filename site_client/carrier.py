"""How tensors reach and leave a site: small ones inside the message, others as blobs over the gateway.

A model that has arrived is a file, mapped by the agent and by the worker; the same model is fetched once, however many
messages name it. An update is a file too; it is sent before the message that names it, and removed when that is done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from locum.common.activity import Activity
from locum.common.messages import BLOB_THRESHOLD, INLINE, Arrays, Fields, MessageError
from locum.common.tensor_files import Mapped, map_tensors, write_tensors

_DIGEST = re.compile(r"^[0-9a-f]{64}$")

Progress = Callable[[int, int], None]


class Blobs(Protocol):
    """The connection that moves blobs."""

    def upload(self, run: str, path: Path, *, digest: str | None = None, progress: Progress | None = None) -> object:
        """Sends a file until it has arrived."""

    def download(self, run: str, sha256: str, size: int, target: Path, *, progress: Progress | None = None) -> object:
        """Fetches a file until it is here."""


@dataclass(frozen=True)
class SiteCarrier:
    """The carrier of one run at a site.

    Attributes:
        blobs: the connection that moves them.
        run: the run's name at the coordinator.
        folder: where blobs lie on their way.
        told: is told of the way: activity, bytes done, bytes in all.
    """

    blobs: Blobs
    run: str
    folder: Path
    told: Callable[[Activity, int, int], None]

    def stow(self, tensors: Arrays) -> Fields:
        """Puts tensors into the message or beside it, as a file that :meth:`deliver` sends; raises OSError."""
        if sum(array.nbytes for array in tensors.values()) <= BLOB_THRESHOLD:
            return INLINE.stow(tensors)
        up = self.folder / "up"
        up.mkdir(parents=True, exist_ok=True)
        if isinstance(tensors, Mapped):
            tensors.path.replace(up / tensors.sha256)
            return {"sha256": tensors.sha256, "size": tensors.size}
        beside = up / f".{os.getpid()}.tmp"
        digest, size = write_tensors(beside, tensors)
        beside.replace(up / digest)
        return {"sha256": digest, "size": size}

    def fetch(self, fields: Fields) -> Arrays:
        """The tensors of a message; a blob is fetched unless it is here. Raises MessageError."""
        if "sha256" not in fields:
            return INLINE.fetch(fields)
        digest, size = fields["sha256"], fields.get("size")
        if set(fields) != {"sha256", "size"} or not isinstance(size, int) or not _DIGEST.match(str(digest)):
            raise MessageError("it names no blob")
        target = self.folder / "down" / str(digest)
        if not target.exists():
            _clear(target.parent, keep=f"{digest}.part")
            self.blobs.download(self.run, str(digest), size, target, progress=self._telling("downloading"))
        try:
            return map_tensors(target, str(digest))
        except ValueError as error:
            raise MessageError(f"its blob is not tensors: {error}") from error

    def deliver(self, fields: Fields) -> None:
        """Sends the blob that a reply names; raises FileNotFoundError if it is not here."""
        if "sha256" in fields:
            digest = str(fields["sha256"])
            path = self.folder / "up" / digest
            path.stat()
            self.blobs.upload(self.run, path, digest=digest, progress=self._telling("uploading"))

    def delivered(self) -> None:
        """Removes what was sent."""
        _clear(self.folder / "up")

    def _telling(self, activity: Activity) -> Progress:
        return lambda done, total: self.told(activity, done, total)


def _clear(folder: Path, keep: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != keep:
            path.unlink(missing_ok=True)
