"""Blobs on their way between a site and the gateway: sent and fetched until they have arrived.

Rules:
  * A cut costs what was on the line. An upload goes on where the coordinator's file ends, a download where ours does.
  * Whatever may pass is tried again, for ever, with a back-off that begins anew when bytes have moved: a coordinator
    that is away, a full disk there, a stream that another one has not yet given way to. A refusal is final.
  * A blob that was fetched is its digest, or it is not there.
  * A blob that would leave this machine's disk too little is not begun.
  * Memory is one chunk, whatever the blob's size.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import grpc

from locum.common.blobs import CHUNK, DISK_FULL, GET_DATA, PUT_DATA, SERVICE, Blob, frames, payload, write_all
from locum.common.errors import Code, SiteFailure
from locum.common.proto import locum_pb2 as pb
from locum.common.secagg.masks import Stream

log = logging.getLogger("locum.site")

#: Told of bytes that are over, and of all of them.
Progress = Callable[[int, int], None]
#: Asked before each attempt to send; what it raises ends the sending.
Permit = Callable[[], None]
T = TypeVar("T")

#: Bytes of disk that a model leaves free: for the update that is made from it, the journal and the logs.
DISK_RESERVE = 256 << 20
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 30.0
#: A call that moves nothing for so long is ended, and made anew.
STALL_SECONDS = 120.0
_STAT_SECONDS = 30.0
_LOOK_SECONDS = 0.25
_READ = 1 << 20

_FINAL = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)


class Stopping(BaseException):
    """The agent was told to end; passes through everything that handles errors."""


class Sealed(NamedTuple):
    """A blob that travels encrypted: under which name, and its content key."""

    name: str
    key: bytes


class Calls(NamedTuple):
    """The three calls of the service, chunks as raw frames."""

    stat: grpc.UnaryUnaryMultiCallable
    put: grpc.StreamUnaryMultiCallable
    get: grpc.UnaryStreamMultiCallable


@dataclass
class _Moved:
    """How far a blob is, for whoever watches: bytes handed over, and bytes known to have arrived."""

    total: int
    progress: Progress
    kept: int = 0
    at: float = field(default_factory=time.monotonic)

    def reach(self, done: int) -> None:
        self.at = time.monotonic()
        self.progress(done, self.total)


class BlobClient:
    """A site's blobs over an open channel.

    Args:
        calls: the service.
        stop: ends every wait; whoever waits raises :class:`Stopping`.
        log: is told why a blob waits.
    """

    def __init__(self, calls: Calls, stop: threading.Event, log: logging.Logger = log) -> None:
        self._calls, self._stop, self._log = calls, stop, log

    @classmethod
    def over(cls, channel: grpc.Channel, stop: threading.Event, log: logging.Logger = log) -> BlobClient:
        """The client over a channel with the site's certificate."""
        stat = channel.unary_unary(f"/{SERVICE}/Stat", pb.BlobKey.SerializeToString, pb.BlobState.FromString)
        put = channel.stream_unary(f"/{SERVICE}/Put", None, pb.BlobState.FromString)
        get = channel.unary_stream(f"/{SERVICE}/Get", pb.GetRequest.SerializeToString, _chunk)
        return cls(Calls(stat, put, get), stop, log)

    def upload(
        self,
        run: str,
        path: Path,
        *,
        digest: str | None = None,
        progress: Progress | None = None,
        permit: Permit | None = None,
    ) -> Blob:
        """Sends a file until the coordinator has it whole.

        `digest` is its SHA-256 if that is known; else it is read once more. `permit` is asked before each attempt, and
        what it raises ends them. Raises SiteFailure(UPDATE_REFUSED) if the coordinator does not want it, OSError if
        the file cannot be read, and Stopping.
        """
        with path.open("rb", buffering=0) as file:
            blob = Blob(digest or _hash_file(file.fileno()).hexdigest(), os.fstat(file.fileno()).st_size)
            key = pb.BlobKey(run=run, sha256=blob.sha256, size=blob.size)
            moved = _Moved(blob.size, progress or _silent)

            def attempt() -> bool:
                if permit is not None:
                    permit()
                return self._send(key, file.fileno(), moved)

            self._persist(moved, Code.UPDATE_REFUSED, attempt)
        return blob

    def download(
        self, run: str, blob: Blob, target: Path, *, sealed: Sealed | None = None, progress: Progress | None = None
    ) -> None:
        """Fetches a blob to `target` until it is there whole; its beginning waits beside it, as `target`.part.

        A sealed one is decrypted as it arrives: `blob` is what it is in the clear. One that is there already is read
        and, if it is the blob, kept. Raises SiteFailure(MESSAGE_UNREADABLE) if the coordinator does not have it,
        SiteFailure(DISK_FULL), OSError and Stopping.
        """
        if is_blob(target, blob):
            return
        name, size = blob.sha256 if sealed is None else sealed.name, blob.size
        key, part = pb.BlobKey(run=run, sha256=name, size=size), target.with_name(f"{target.name}.part")
        moved = _Moved(size, progress or _silent)
        try:
            with _Arriving(part, blob, sealed) as arriving:
                _check_room(target.parent, size - arriving.have)
                self._persist(moved, Code.MESSAGE_UNREADABLE, lambda: self._fetch(key, arriving, moved))
            part.replace(target)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            part.unlink(missing_ok=True)
            raise SiteFailure(Code.DISK_FULL, f"no room for a model of {size} bytes") from error

    # --- one attempt

    def _send(self, key: pb.BlobKey, file: int, moved: _Moved) -> bool:
        """Sends what the coordinator does not have; whether it has all then."""
        asked = self._calls.stat.future(key, timeout=_STAT_SECONDS)
        with self._watched(asked, moved):
            state = asked.result()
        if state.complete:
            return True
        if os.fstat(file).st_size != key.size:
            raise SiteFailure(Code.UPDATE_REFUSED, "the file changed on its way")
        moved.kept = state.have
        broken: list[OSError] = []
        call = self._calls.put.future(_requests(key, state.have, file=file, moved=moved, broken=broken))
        with self._watched(call, moved):
            complete = bool(call.result().complete)
        if broken:
            raise broken[0]
        return complete

    def _fetch(self, key: pb.BlobKey, arriving: _Arriving, moved: _Moved) -> bool:
        """Fetches what is not here; whether the blob is here then. Raises SiteFailure if it is not that blob."""
        moved.reach(arriving.have)
        if arriving.have < key.size:
            call = self._calls.get(pb.GetRequest(key=key, offset=arriving.have))
            with self._watched(call, moved):
                for data in call:
                    arriving.append(data)
                    moved.kept = arriving.have
                    moved.reach(arriving.have)
        if arriving.have < key.size:
            return False
        if arriving.whole:
            return True
        arriving.begin_anew()
        if arriving.attempts > 1:
            raise SiteFailure(Code.MESSAGE_UNREADABLE, "the blob is not what its digest says")
        return False

    # --- patience

    def _persist(self, moved: _Moved, refused: Code, attempt: Callable[[], bool]) -> None:
        """Makes the attempt until it succeeds; raises SiteFailure(`refused`) when it never will, and Stopping."""
        wait, told = FIRST_WAIT_SECONDS, ""
        while True:
            before, words = moved.kept, "the stream ended early"
            try:
                if attempt():
                    return
            except grpc.RpcError as error:
                words = error.details() or error.code().name
                if error.code() in _FINAL:
                    raise SiteFailure(refused, words) from error
            except grpc.FutureCancelledError:
                words = "nothing moved"
            if words != told:
                self._log.info("a blob waits: %s", words)
                told = words
            wait = FIRST_WAIT_SECONDS if moved.kept > before else wait
            if self._stop.wait(wait):
                raise Stopping
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    @contextmanager
    def _watched(self, call: grpc.Future, moved: _Moved) -> Iterator[None]:
        """Ends the call when the agent is told to end, or when nothing moves any more."""
        over = threading.Event()
        moved.at = time.monotonic()

        def watch() -> None:
            while not over.wait(_LOOK_SECONDS):
                if self._stop.is_set() or time.monotonic() - moved.at > STALL_SECONDS:
                    call.cancel()
                    return

        watcher = threading.Thread(target=watch, name="blob", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            call.cancel()
            watcher.join()


class _Arriving:
    """The beginning of a blob on the disk, and its digest so far; a context that closes the file."""

    def __init__(self, part: Path, blob: Blob, sealed: Sealed | None) -> None:
        self._blob, self._sealed = blob, sealed
        self._file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.attempts = 0
        if os.fstat(self._file).st_size > blob.size:
            os.ftruncate(self._file, 0)
        self._digest = _hash_file(self._file)
        self.have = os.fstat(self._file).st_size
        self._stream = self._stream_from_here()

    @property
    def whole(self) -> bool:
        """Whether what is here is the blob."""
        return self._digest.hexdigest() == self._blob.sha256

    def _stream_from_here(self) -> Stream | None:
        return None if self._sealed is None else Stream(self._sealed.key, start=self.have)

    def __enter__(self) -> _Arriving:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def append(self, data: memoryview) -> None:
        """Writes what came; raises SiteFailure if it is more than the blob has."""
        if self.have + len(data) > self._blob.size:
            raise SiteFailure(Code.MESSAGE_UNREADABLE, "the coordinator sends more than the blob has")
        if self._stream is not None:
            sealed, data = data, memoryview(bytearray(len(data)))
            self._stream.mix(sealed, data)
        write_all(self._file, data)
        self._digest.update(data)
        self.have += len(data)

    def begin_anew(self) -> None:
        """Forgets what is here."""
        os.ftruncate(self._file, 0)
        self.have, self._digest = 0, hashlib.sha256()
        self._stream = self._stream_from_here()
        self.attempts += 1


def _requests(key: pb.BlobKey, offset: int, *, file: int, moved: _Moved, broken: list[OSError]) -> Iterator[bytes]:
    """The messages of an upload from `offset` on. An error of the disk ends them, for gRPC would swallow it."""
    moved.reach(offset)
    yield pb.PutChunk(key=key, offset=offset).SerializeToString()
    try:
        for frame in frames(file, PUT_DATA, offset=offset):
            yield frame
            offset = min(offset + CHUNK, key.size)
            moved.reach(offset)
    except OSError as error:
        broken.append(error)


def _chunk(message: bytes) -> memoryview:
    data = payload(message, GET_DATA)
    return memoryview(pb.Chunk.FromString(message).data) if data is None else data


def _hash_file(file: int) -> hashlib._Hash:
    """The SHA-256 of an open file, which can be gone on with."""
    digest, offset = hashlib.sha256(), 0
    while data := os.pread(file, _READ, offset):
        digest.update(data)
        offset += len(data)
    return digest


def _check_room(folder: Path, size: int) -> None:
    """Raises SiteFailure(DISK_FULL) if so many bytes more would leave the disk too little."""
    free = shutil.disk_usage(folder).free
    if free < size + DISK_RESERVE:
        words = f"a model needs {size} bytes more, {free} are free, and {DISK_RESERVE} of them are to stay so"
        raise SiteFailure(Code.DISK_FULL, words)


def is_blob(path: Path, blob: Blob) -> bool:
    """Whether the file is there and is this blob; raises OSError."""
    try:
        with path.open("rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_size == blob.size and _hash_file(file.fileno()).hexdigest() == blob.sha256
    except FileNotFoundError:
        return False


def _silent(_done: int, _total: int) -> None:
    """Tells nobody."""
