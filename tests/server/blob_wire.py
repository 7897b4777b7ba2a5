"""The service Blobs on loopback without certificates, here or in a process that can be killed, and a bad line to it.

The site is what a call's metadata say; who really calls is the business of the tests over mutual TLS.

    python tests/server/blob_wire.py SPOOL PORT
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from locum.common.blobs import OPTIONS, Blob
from locum.server.gateway.blobs import BlobService
from locum.server.gateway.spool import Spool
from locum.site_client.blobs import BlobClient

RUN, PLAN, QUOTA = "run-1", "a" * 64, 1 << 40
APPROVED = frozenset({"berlin", "lyon"})
_OPTIONS = (*OPTIONS, ("grpc.so_reuseport", 0))
_CHANNEL_OPTIONS = (*OPTIONS, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 300))


# --- the coordinator


def open_run(spool: Path, *, upload_bytes: int = 1 << 30) -> Path:
    """A run that the sites in `APPROVED` have approved, as the round engine opens it; returns its folder."""
    folder = spool / RUN
    (folder / "down").mkdir(parents=True)
    (folder / "limit.json").write_text(json.dumps({"upload_bytes": upload_bytes, "plan": PLAN}))
    return folder


def put_down(spool: Path, content: bytes) -> Blob:
    """A model of the run."""
    blob = blob_of(content)
    (spool / RUN / "down" / blob.sha256).write_bytes(content)
    return blob


def blob_of(content: bytes) -> Blob:
    return Blob(hashlib.sha256(content).hexdigest(), len(content))


@dataclass(frozen=True)
class Coordinator:
    """The service in this process."""

    path: Path
    spool: Spool
    port: int

    def uploads(self, site: str = "berlin") -> dict[str, bytes]:
        """What lies in a site's folder."""
        return {path.name: path.read_bytes() for path in (self.path / RUN / "up" / site).glob("*")}


@contextmanager
def serve(path: Path, *, port: int = 0, quota: int = QUOTA, patience: float = 0.5) -> Iterator[Coordinator]:
    """Serves a spool."""
    spool = Spool(path, patience=patience)
    server = grpc.server(ThreadPoolExecutor(32), options=_OPTIONS)
    BlobService(spool, _site, lambda site, plan: plan == PLAN and site in APPROVED, quota).add_to(server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield Coordinator(path, spool, bound)
    finally:
        server.stop(None).wait()


def _site(context: grpc.ServicerContext) -> str:
    site = dict(context.invocation_metadata()).get("site")
    if site is None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "nobody calls")
    return str(site)


@contextmanager
def serving_process(path: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Serves a spool in a process of its own, which can be killed."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(path), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    with process:
        try:
            yield process
        finally:
            process.kill()


# --- a site


class _Named(grpc.UnaryUnaryClientInterceptor, grpc.StreamUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Says in each call which site calls."""

    def __init__(self, site: str) -> None:
        self._site = site

    def _intercept(self, call: Any, details: Any, request: Any) -> Any:
        return call(details._replace(metadata=(("site", self._site),)), request)

    intercept_unary_unary = intercept_stream_unary = intercept_unary_stream = _intercept


@contextmanager
def channel(port: int, site: str = "berlin") -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=_CHANNEL_OPTIONS) as opened:
        yield grpc.intercept_channel(opened, _Named(site))


@contextmanager
def client(port: int, site: str = "berlin") -> Iterator[BlobClient]:
    """A site's client; the end of the context stops it."""
    stop = threading.Event()
    with channel(port, site) as opened:
        try:
            yield BlobClient.over(opened, stop)
        finally:
            stop.set()


def wait_for(condition: Any, seconds: float = 20) -> None:
    """Waits until the condition is true; fails after a time that means that it never will be."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


# --- the line


@dataclass
class Line:
    """A TCP proxy that counts what passes and breaks as it is told.

    Attributes:
        cuts: after so many bytes in all, both ways together, every connection is reset; in ascending order.
        passed: bytes that passed, both ways together.
        frozen: while set, nothing passes and nothing is closed, as behind a firewall that forgot.
    """

    target: int
    cuts: list[int] = field(default_factory=list)
    passed: int = 0
    frozen: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Resets every connection."""
        with self._lock:
            for end in self._open:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
            self._open.clear()

    def forget(self) -> None:
        """Freezes the connections that are open, for ever; new ones pass."""
        with self._lock:
            self.frozen.set()
            self.frozen = threading.Event()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                for end in (near, far):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)  # a line holds little
                with self._lock:
                    self._open += [near, far]
                    frozen = self.frozen
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, sink, frozen), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, frozen: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if frozen.is_set():
                    return
                sink.sendall(data)
                with self._lock:
                    self.passed += len(data)
                    due = bool(self.cuts) and self.passed >= self.cuts[0]
                    self.cuts[:] = [at for at in self.cuts if at > self.passed]
                if due:
                    self.cut()
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # a close alone says nothing while another thread reads


@contextmanager
def line(target: int, cuts: list[int] | None = None) -> Iterator[Line]:
    """A line to a port that is cut after so many bytes."""
    with closing(Line(target, cuts or [])) as opened:
        yield opened


def free_port() -> int:
    with ExitStack() as held:
        opened = held.enter_context(socket.socket())
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


if __name__ == "__main__":
    with serve(Path(sys.argv[1]), port=int(sys.argv[2])):
        sys.stdout.write("open\n")
        sys.stdout.flush()
        sys.stdin.read()
