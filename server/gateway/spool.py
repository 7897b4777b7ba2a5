"""The spool: blobs of the runs that go on, as files. The round engine puts models in, sites their updates.

spool/RUN/limit.json         what the run allows: the bytes of one update, and the plan that a site must have approved
spool/RUN/down/SHA256        a model on its way to the sites
spool/RUN/up/SITE/SHA256     an update, whole, checked against its name
spool/RUN/up/SITE/SHA256.part   an update on its way

Rules:
  * A name from outside becomes part of a path only if it is one of the names of `locum.common.blobs`.
  * What can be refused is refused before a byte is written: a size, a quota, a disk that is too full.
  * The bytes of a `.part` are a beginning of the blob: it grows at its end, and one stream at a time writes to it.
    A stream that has died, or has moved nothing for a while, gives way to the next one of the same site.
  * A blob that is not what its name says is removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from locum.common import blobs
from locum.common.blobs import DISK_FULL, Blob, write_all

#: Bytes of disk that uploads leave free for everything else at the coordinator.
DISK_RESERVE = 256 << 20
#: Seconds after which a stream that moves nothing gives way to another one of the same blob.
PATIENCE_SECONDS = 5.0
_READ = 1 << 20


class Reason(Enum):
    """Why the spool refuses something."""

    MALFORMED = "a name or a number that no client of ours sends"
    NO_RUN = "the run does not go on"
    NO_BLOB = "no such blob"
    TOO_LARGE = "more than the run allows"
    WRONG_OFFSET = "not where the upload ends"
    BUSY = "another stream writes this blob"
    NO_ROOM = "no room now"
    BROKEN = "the disk fails"


class SpoolRefusal(Exception):
    """What the spool does not do, and why; the sentence is for the site.

    Attributes:
        reason: what to make of it.
        sentence: for a person at the site.
    """

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(reason, sentence)
        self.reason = reason
        self.sentence = sentence


class Limit(BaseModel):
    """`limit.json`: what a run allows.

    Attributes:
        upload_bytes: of one blob that a site sends.
        plan: the digest of the plan that a site must have approved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    upload_bytes: int = Field(ge=0)
    plan: str = Field(pattern=r"^[0-9a-f]{64}$")


class Stream(Protocol):
    """A call of a site, as gRPC's servicer context is one."""

    def is_active(self) -> bool:
        """Whether somebody is at the other end, as far as is known."""

    def cancel(self) -> bool:
        """Ends the call."""


@dataclass(frozen=True)
class UploadState:
    """How far an upload is: bytes on the disk, and whether they are all there and right."""

    have: int
    complete: bool


class Spool:
    """The folder of blobs; safe for threads, and for one gateway beside the round engines.

    Args:
        path: the folder.
        patience: seconds after which a stream that moves nothing gives way.
    """

    def __init__(self, path: Path, *, patience: float = PATIENCE_SECONDS) -> None:
        self._path, self._patience = path, patience
        self._lock = threading.Lock()
        self._uploads: dict[Path, Upload] = {}

    # --- runs

    def limit(self, run: str) -> Limit:
        """What a run allows; raises SpoolRefusal if it does not go on."""
        folder = self._path / _named(run, blobs.RUN_NAME, "run")
        try:
            return Limit.model_validate_json((folder / "limit.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise SpoolRefusal(Reason.NO_RUN, f"the run {run} does not go on") from error

    # --- downloads

    def download_path(self, run: str, sha256: str) -> Path:
        """Where a model lies, or would; raises SpoolRefusal for a bad name."""
        folder = self._path / _named(run, blobs.RUN_NAME, "run") / "down"
        return folder / _named(sha256, blobs.SHA256, "blob")

    def download_size(self, run: str, sha256: str) -> int:
        """Bytes of a model; raises SpoolRefusal if it is not here."""
        try:
            return self.download_path(run, sha256).stat().st_size
        except OSError as error:
            raise _no_blob() from error

    def open_download(self, run: str, blob: Blob, offset: int) -> int:
        """A descriptor of a model, to be closed by the caller; raises SpoolRefusal if it is not that one."""
        path = self.download_path(run, blob.sha256)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _no_blob() from error
        size = os.fstat(descriptor).st_size
        if blob.size == size and offset <= size:
            return descriptor
        os.close(descriptor)
        raise SpoolRefusal(Reason.MALFORMED, f"the blob has {size} bytes, not {blob.size} with some from {offset} on")

    # --- uploads

    def upload_path(self, run: str, site: str, sha256: str) -> Path:
        """Where a site's blob lies, or would; raises SpoolRefusal for a bad name."""
        folder = self._path / _named(run, blobs.RUN_NAME, "run") / "up" / _named(site, blobs.SITE_NAME, "site")
        return folder / _named(sha256, blobs.SHA256, "blob")

    def upload_state(self, run: str, site: str, sha256: str) -> UploadState:
        """How far a site's upload is."""
        path = self.upload_path(run, site, sha256)
        for found, complete in ((path, True), (_part(path), False)):
            with suppress(FileNotFoundError):
                return UploadState(found.stat().st_size, complete)
        return UploadState(0, complete=False)

    @contextmanager
    def upload(self, run: str, site: str, blob: Blob, *, offset: int, quota: int, stream: Stream) -> Iterator[Upload]:
        """An upload that goes on at `offset`, while the context lasts; raises SpoolRefusal.

        `quota` is how many bytes the site may have in the spool, all runs together.
        """
        path, limit = self.upload_path(run, site, blob.sha256), self.limit(run)
        if not 0 < blob.size <= min(limit.upload_bytes, quota):
            sentence = (
                f"a blob of {blob.size} bytes; the run {run} takes up to {limit.upload_bytes}, a site has {quota}"
            )
            raise SpoolRefusal(Reason.TOO_LARGE, sentence)
        upload = self._enter(Upload(path, blob, stream), quota)
        try:
            upload.begin(offset)
            yield upload
        finally:
            self._leave(upload)

    def _enter(self, upload: Upload, quota: int) -> Upload:
        """Takes the place of whatever stream wrote to this blob and is dead."""
        with self._lock:
            before = self._uploads.get(upload.path)
            if before is not None and before.alive(self._patience):
                raise SpoolRefusal(Reason.BUSY, "another stream is sending this blob")
            self._check_room(upload, quota)
            if before is not None:
                upload.take_over(before)
            self._uploads[upload.path] = upload
        return upload

    def _leave(self, upload: Upload) -> None:
        with self._lock:
            if self._uploads.get(upload.path) is upload:
                del self._uploads[upload.path]
        upload.close()

    def _check_room(self, upload: Upload, quota: int) -> None:
        """Refuses what would not fit, with all that other streams have announced counted as if it were here."""
        others = [other for path, other in self._uploads.items() if path != upload.path]
        announced = sum(other.missing() for other in others)
        if shutil.disk_usage(self._path).free < upload.missing() + announced + DISK_RESERVE:
            raise SpoolRefusal(Reason.NO_ROOM, "the coordinator's disk is too full for this blob")
        site = upload.path.parent.name
        held = self._held(site) + sum(other.missing() for other in others if other.path.parent.name == site)
        if held + upload.missing() > quota:
            raise SpoolRefusal(Reason.NO_ROOM, f"the site has {held} bytes in the spool already, of {quota}")

    def _held(self, site: str) -> int:
        """Bytes that a site has in the spool, of all runs."""
        return sum(_size(path) for path in self._path.glob(f"*/up/{site}/*"))


class Upload:
    """One stream that writes to one blob."""

    def __init__(self, path: Path, blob: Blob, stream: Stream) -> None:
        self.path, self._blob, self._stream = path, blob, stream
        self._lock = threading.Lock()  # of the file: handed on to the stream that takes over
        self._file = -1
        self._have = _size(_part(path))
        self._digest = hashlib.sha256()
        self._moved = time.monotonic()
        self._gone = False

    def missing(self) -> int:
        """Bytes that are announced and not there."""
        return max(self._blob.size - self._have, 0)

    def alive(self, patience: float) -> bool:
        """Whether the stream is worth waiting for."""
        return self._stream.is_active() and time.monotonic() - self._moved < patience

    def take_over(self, before: Upload) -> None:
        """Ends the stream `before`: what it is writing now is its last, and is there before this one begins."""
        self._lock = before._lock
        before._gone = True
        before._stream.cancel()

    def begin(self, offset: int) -> None:
        """Opens the file where it ends and hashes what is there; raises SpoolRefusal."""
        with self._writing():
            if self.path.exists():
                raise SpoolRefusal(Reason.WRONG_OFFSET, "all of this blob is here")
            for folder in (self.path.parent.parent, self.path.parent):
                folder.mkdir(exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(_part(self.path), flags, 0o600)
            self._have = os.fstat(self._file).st_size
            if self._have > self._blob.size:
                _part(self.path).unlink()
                raise SpoolRefusal(Reason.WRONG_OFFSET, "more of this blob is here than it has; it begins anew")
            if self._have != offset:
                raise SpoolRefusal(Reason.WRONG_OFFSET, f"{self._have} bytes of this blob are here, not {offset}")
            self._hash_again()

    def append(self, data: bytes | memoryview) -> None:
        """Writes what comes next; raises SpoolRefusal."""
        with self._writing():
            self._moved = time.monotonic()
            if self._have + len(data) > self._blob.size:
                _part(self.path).unlink(missing_ok=True)
                raise SpoolRefusal(Reason.TOO_LARGE, f"more than the {self._blob.size} bytes that were announced")
            self._digest.update(data)
            write_all(self._file, data)
            self._have += len(data)

    def finish(self) -> UploadState:
        """Checks and keeps the blob if it is all here; raises SpoolRefusal if it is not what its name says."""
        with self._writing():
            if self._have < self._blob.size:
                return UploadState(self._have, complete=False)
            part = _part(self.path)
            if self._digest.hexdigest() != self._blob.sha256:
                part.unlink(missing_ok=True)
                raise SpoolRefusal(Reason.MALFORMED, "the blob is not what its digest says; it was removed")
            part.rename(self.path)
            return UploadState(self._have, complete=True)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._gone = True
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _hash_again(self) -> None:
        for start in range(0, self._have, _READ):
            self._digest.update(os.pread(self._file, _READ, start))
            self._moved = time.monotonic()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One thread at a time, none after the stream gave way; errors of the disk in words."""
        with self._lock:
            if self._gone:
                raise SpoolRefusal(Reason.BUSY, "another stream has taken over this blob")
            try:
                yield
            except FileNotFoundError as error:
                raise SpoolRefusal(Reason.NO_RUN, "the run does not go on") from error
            except OSError as error:
                raise _disk_refusal(error) from error


def _no_blob() -> SpoolRefusal:
    return SpoolRefusal(Reason.NO_BLOB, "the coordinator does not have this blob")


def _disk_refusal(error: OSError) -> SpoolRefusal:
    if error.errno in DISK_FULL:
        return SpoolRefusal(Reason.NO_ROOM, "the coordinator's disk is full")
    return SpoolRefusal(Reason.BROKEN, f"the coordinator's disk fails: {error.strerror}")


def _named(name: str, pattern: re.Pattern[str], what: str) -> str:
    if not pattern.fullmatch(name):
        raise SpoolRefusal(Reason.MALFORMED, f"that is not the name of a {what}")
    return name


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
