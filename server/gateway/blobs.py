"""The service Blobs: what moves between the spool and the sites, and who may move it.

Rules:
  * A site reads the models of runs whose plan it has approved, and writes updates to a folder of its own. Nothing here
    opens a file that another site has sent.
  * A refusal is a status and a sentence. What a client should try again is UNAVAILABLE, ABORTED, FAILED_PRECONDITION or
    RESOURCE_EXHAUSTED; anything else is final.
  * A stream holds one chunk; a site has a few streams at once. So memory is bounded by the number of sites.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from locum.common.blobs import GET_DATA, PUT_DATA, SERVICE, Blob, frames, payload
from locum.common.proto import locum_pb2 as pb
from locum.server.gateway.peers import refuse
from locum.server.gateway.spool import Reason, Spool, SpoolRefusal, Upload
from locum.server.registry import RegistryError

log = logging.getLogger("locum.gateway")

#: What a site may move at once: more than it needs, as dead streams take a while to be noticed.
STREAMS_PER_SITE = 8

_STATUS = {
    Reason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NO_RUN: grpc.StatusCode.NOT_FOUND,
    Reason.NO_BLOB: grpc.StatusCode.NOT_FOUND,
    Reason.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.WRONG_OFFSET: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BUSY: grpc.StatusCode.ABORTED,
    Reason.NO_ROOM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.BROKEN: grpc.StatusCode.UNAVAILABLE,
}


class BlobService:
    """Blobs of `locum.proto`.

    Args:
        spool: where blobs lie.
        site_of: the name of the site that calls; ends the call for everybody else.
        approved: whether a site has approved the plan of a digest.
        quota: bytes that one site may have in the spool.
    """

    def __init__(
        self,
        spool: Spool,
        site_of: Callable[[grpc.ServicerContext], str],
        approved: Callable[[str, str], bool],
        quota: int,
    ) -> None:
        self._spool, self._site_of, self._approved, self._quota = spool, site_of, approved, quota
        self._streams: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add_to(self, server: grpc.Server) -> None:
        """Adds the service to a server. Chunks pass as raw frames, which the generated code would copy twice."""
        handlers = {
            "Stat": grpc.unary_unary_rpc_method_handler(
                self.stat, pb.BlobKey.FromString, pb.BlobState.SerializeToString
            ),
            "Put": grpc.stream_unary_rpc_method_handler(self.put, _put_chunk, pb.BlobState.SerializeToString),
            "Get": grpc.unary_stream_rpc_method_handler(self.get, pb.GetRequest.FromString, None),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    def stat(self, key: pb.BlobKey, context: grpc.ServicerContext) -> pb.BlobState:
        """How much of the site's upload is here; of a key without a size, how long the download is."""
        with self._call(context) as site:
            self._check(site, key, context)
            if key.size:
                state = self._spool.upload_state(key.run, site, key.sha256)
                return pb.BlobState(have=state.have, complete=state.complete)
            return pb.BlobState(have=self._spool.download_size(key.run, key.sha256), complete=True)

    def put(self, chunks: Iterator[pb.PutChunk | memoryview], context: grpc.ServicerContext) -> pb.BlobState:
        """Takes an upload, from the offset in the first message on."""
        with self._call(context) as site, self._stream(site):
            first = _first(chunks)  # who may call, and how often, is asked before anything is waited for
            key, blob = first.key, Blob(first.key.sha256, first.key.size)
            self._check(site, key, context)
            state = self._spool.upload_state(key.run, site, key.sha256)
            if not state.complete:
                taken = self._spool.upload(key.run, site, blob, offset=first.offset, quota=self._quota, stream=context)
                with taken as upload:
                    _take(upload, first.data, chunks)
                    state = upload.finish()
            return pb.BlobState(have=state.have, complete=state.complete)

    def get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Sends a model, from an offset on."""
        key = request.key
        with self._call(context) as site, self._stream(site):
            self._check(site, key, context)
            file = self._spool.open_download(key.run, Blob(key.sha256, key.size), request.offset)
            try:
                yield from frames(file, GET_DATA, offset=request.offset)
            finally:
                os.close(file)

    @contextmanager
    def _call(self, context: grpc.ServicerContext) -> Iterator[str]:
        """The site that calls; a refusal of the spool ends the call."""
        site = self._site_of(context)
        try:
            yield site
        except RegistryError as error:
            refuse(context, error)
        except SpoolRefusal as refusal:
            log.warning("refused %s a blob: %s", site, refusal.sentence)
            context.abort(_STATUS[refusal.reason], refusal.sentence)

    def _check(self, site: str, key: pb.BlobKey, context: grpc.ServicerContext) -> None:
        """Ends the call of a site that does not take part in the run."""
        if not self._approved(site, self._spool.limit(key.run).plan):
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "the site has not approved the plan of this run")

    @contextmanager
    def _stream(self, site: str) -> Iterator[None]:
        with self._lock:
            if self._streams[site] >= STREAMS_PER_SITE:
                raise SpoolRefusal(Reason.NO_ROOM, f"the site has {STREAMS_PER_SITE} streams open")
            self._streams[site] += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams[site] -= 1


def _put_chunk(message: bytes) -> pb.PutChunk | memoryview:
    data = payload(message, PUT_DATA)
    return pb.PutChunk.FromString(message) if data is None else data


def _first(chunks: Iterator[pb.PutChunk | memoryview]) -> pb.PutChunk:
    """The message that names the blob; an empty one, which names none, where it is missing."""
    first = next(chunks, None)
    return first if isinstance(first, pb.PutChunk) else pb.PutChunk()


def _take(upload: Upload, first: bytes, chunks: Iterator[pb.PutChunk | memoryview]) -> None:
    """Writes what comes; raises SpoolRefusal."""
    upload.append(first)
    for chunk in chunks:
        if not isinstance(chunk, memoryview) or not chunk:
            raise SpoolRefusal(Reason.MALFORMED, "a message after the first holds bytes and nothing else")
        upload.append(chunk)
