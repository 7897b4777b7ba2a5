"""How tensors reach and leave a site: small ones inside the message, others as blobs over the gateway.

A model that has arrived is a file, mapped by the agent and by the worker; the same model is fetched once, however many
messages name it. An update is a file too; it is sent before the message that names it, and removed when that is done.
Nothing here is flushed: what a process finds that was there before it, it reads against its digest first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from locum.common.activity import Activity
from locum.common.blobs import Blob
from locum.common.messages import BLOB_THRESHOLD, INLINE, Arrays, Fields, MessageError
from locum.common.tensor_files import Mapped, Sendable, map_tensors, write_tensors
from locum.site_client.blobs import Permit, Progress, Sealed, is_blob

_DIGEST = re.compile(r"^[0-9a-f]{64}$")


class Blobs(Protocol):
    """The connection that moves blobs."""

    def upload(
        self, run: str, path: Path, *, digest: str, progress: Progress | None = None, permit: Permit | None = None
    ) -> object:
        """Sends a file until it has arrived."""

    def download(
        self, run: str, blob: Blob, target: Path, *, sealed: Sealed | None = None, progress: Progress | None = None
    ) -> object:
        """Fetches a file until it is here, unless it is."""


@dataclass(frozen=True)
class SiteCarrier:
    """The carrier of one run at a site.

    Attributes:
        blobs: the connection that moves them.
        run: the run's name at the coordinator.
        folder: where blobs lie on their way.
        told: is told of the way: activity, bytes done, bytes in all.
        permit: raises unless what is to be sent may still leave.
        known: digests of models that this process has fetched, or found whole.
    """

    blobs: Blobs
    run: str
    folder: Path
    told: Callable[[Activity, int, int], None]
    permit: Permit
    known: set[str] = field(default_factory=set)

    def stow(self, tensors: Sendable) -> Fields:
        """Puts tensors into the message or beside it, as a file that :meth:`deliver` sends; raises OSError."""
        if sum(array.nbytes for array in tensors.values()) <= BLOB_THRESHOLD:
            return INLINE.stow(tensors)
        up = self.folder / "up"
        up.mkdir(parents=True, exist_ok=True)
        if isinstance(tensors, Mapped):
            path, (digest, size) = tensors.path, (tensors.sha256, tensors.size)
        else:
            path = up / f".{os.getpid()}.tmp"
            digest, size = write_tensors(path, tensors)
        path.replace(up / digest)
        return {"sha256": digest, "size": size}

    def fetch(self, fields: Fields) -> Arrays:
        """The tensors of a message; a blob is fetched unless it is here. Raises MessageError, SiteFailure, OSError."""
        if "sha256" not in fields:
            return INLINE.fetch(fields)
        return self._mapped(fields, str(fields["sha256"]), None)

    def _mapped(self, fields: Fields, digest: str, key: bytes | None) -> Arrays:
        """The file that fields name, mapped once it is here under its digest."""
        name, size = str(fields["sha256"]), fields.get("size")
        if set(fields) != {"sha256", "size"} or not isinstance(size, int) or not _DIGEST.match(name):
            raise MessageError("it names no blob")
        target = self.folder / "down" / digest
        if digest not in self.known or not target.exists():
            _clear(target.parent, target.name, f"{digest}.part")
            sealed = None if key is None else Sealed(name, key)
            blob = Blob(digest, size)
            self.blobs.download(self.run, blob, target, sealed=sealed, progress=self._telling("downloading"))
            self.known.add(digest)
        try:
            return map_tensors(target, digest)
        except ValueError as error:
            target.unlink()
            raise MessageError(f"its blob is not tensors: {error}") from error

    def open(self, fields: Fields, key: bytes, digest: str) -> Arrays:
        """The tensors of a sealed model, decrypted as they arrive; raises as :meth:`fetch`."""
        if "sha256" not in fields:
            return INLINE.open(fields, key, digest)
        return self._mapped(fields, digest, key)

    def holds(self, fields: Fields) -> bool:
        """Whether the blob that a reply from before names, if it does, is here whole."""
        if "sha256" not in fields:
            return True
        digest = str(fields["sha256"])
        return is_blob(self.folder / "up" / digest, Blob(digest, int(fields["size"])))

    def deliver(self, fields: Fields) -> None:
        """Sends the blob that a reply names; raises FileNotFoundError if it is not here."""
        if "sha256" in fields:
            digest = str(fields["sha256"])
            path = self.folder / "up" / digest
            path.stat()
            self.blobs.upload(self.run, path, digest=digest, progress=self._telling("uploading"), permit=self.permit)

    def delivered(self) -> None:
        """Removes what was sent."""
        _clear(self.folder / "up")

    def _telling(self, activity: Activity) -> Progress:
        return lambda done, total: self.told(activity, done, total)


def _clear(folder: Path, *keep: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink(missing_ok=True)
