"""What lies between a site and the gateway: connections that are cut in mid-upload, and an HTTP proxy.

Short form: a line is away for some seconds. Long form: for two minutes, as the issue of the wire asks.
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from locum.common.tensor_files import write_tensors
from tests.peers import Peer, run_peers
from tests.plans import initial, plan
from tests.wire.federation import Federation, ended, events, model_of, open_federation
from tests.wire.harm import bits

LARGE = {"name": "Classifier", "channels": [64, 128, 256, 512]}
VALUES = {"reset": 0.01, "silent": 0.07, "proxied": 0.09}
RATE = 6 << 20
_PIECE = 1 << 14


# --- lines


@dataclass
class Line:
    """A TCP proxy to a port that counts what a site sends, and breaks once.

    Attributes:
        port: of the gateway.
        how: `reset` (every connection is, and no new one is accepted) or `silence` (nothing passes and nothing is
            closed: connections that are open are forgotten, new ones wait).
        at: bytes from the site after which it breaks.
        seconds: how long it is broken.
        sent: bytes that have come from the site.
    """

    port: int
    how: Literal["reset", "silence"]
    at: int
    seconds: float
    sent: int = 0
    broken: threading.Event = field(default_factory=threading.Event)
    _until: float = 0.0
    _open: list[socket.socket] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # a line holds little
        self._server.bind(("127.0.0.1", 0))
        self._server.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def lay(self, federation: Federation, name: str) -> None:
        """Enrols a site whose way to the gateway this is."""
        address(federation, name, int(self._server.getsockname()[1]))

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        if self.how == "reset" and time.monotonic() < self._until:
            _reset(near)
            return
        time.sleep(max(0.0, self._until - time.monotonic()))
        far = _connected(self.port)
        if far is None:
            near.close()
            return
        with self._lock:
            self._open += [near, far]
        generation = self.broken.is_set()
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._carry, args=(source, sink, source is near, generation), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, up: bool, generation: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE):
                if up:
                    self.sent += len(data)
                    time.sleep(len(data) / RATE)
                if self.broken.is_set() != generation:
                    return  # forgotten: neither end hears of it
                sink.sendall(data)
                if up and self.sent >= self.at and not generation:
                    self._break()
        if self.broken.is_set() == generation or self.how == "reset":
            _shut(source, sink)

    def _break(self) -> None:
        with self._lock:
            if self.broken.is_set():
                return
            self._until = time.monotonic() + self.seconds
            self.broken.set()
            for end in self._open if self.how == "reset" else ():
                _reset(end)


def _reset(end: socket.socket) -> None:
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()


def _shut(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _connected(port: int) -> socket.socket | None:
    try:
        return socket.create_connection(("127.0.0.1", port))
    except OSError:
        return None


def address(federation: Federation, name: str, port: int) -> None:
    """Enrols a site that knows the gateway by another port."""
    path = federation.enrol(name) / "identity" / "federation.json"
    told = json.loads(path.read_bytes())
    path.write_text(json.dumps({**told, "address": f"localhost:{port}"}))


# --- the proxy


@dataclass
class Proxy:
    """An HTTP proxy that knows CONNECT (RFC 9110, 9.3.6) and wants a password; only it knows the way to the gateway."""

    port: int
    asked: list[str] = field(default_factory=list)
    user: str = "agent:secret"

    def __post_init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://{self.user}@127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += near.recv(1)
        line, *headers = request.decode().strip().split("\r\n")
        self.asked.append(line)
        right = f"basic {base64.b64encode(self.user.encode()).decode()}".lower()
        given = {name.lower(): value.strip().lower() for name, _, value in (h.partition(":") for h in headers)}
        if given.get("proxy-authorization") != right:
            near.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n")
            near.close()
            return
        far = _connected(self.port)
        assert far is not None
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for ends in ((near, far), (far, near)):
            threading.Thread(target=_pass, args=ends, daemon=True).start()


def _pass(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    _shut(source, sink)


def _nowhere() -> int:
    """A port on which nobody listens, and that nobody takes while the socket is kept."""
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return int(held.getsockname()[1])


_held: list[socket.socket] = []


# --- tests


@pytest.mark.parametrize("seconds", [3.0, pytest.param(120.0, marks=pytest.mark.slow)])
def test_uploads_that_are_cut_in_the_middle_go_on_and_a_proxy_is_the_only_way_out(
    tmp_path: Path, seconds: float
) -> None:
    of = plan(name="cut", rounds=1, network=LARGE, participation={"quorum": 3, "deadline": "600 s"})
    blob = write_tensors(tmp_path / "update", initial(of)).size
    with open_federation(tmp_path) as federation:
        federation.propose(of)
        lines = {
            "reset": Line(federation.port, "reset", blob // 3, seconds),
            "silent": Line(federation.port, "silence", 2 * blob // 3, seconds),
        }
        for name, line in lines.items():
            line.lay(federation, name)
        proxy, nowhere = Proxy(federation.port), _nowhere()
        address(federation, "proxied", nowhere)
        with (federation.folder / "proxied" / "site.yaml").open("a") as file:
            file.write(f"proxy: {proxy.address}\n")
        for name, value in VALUES.items():
            federation.peer(name, f"value:{value}")
        for name in VALUES:
            federation.approve(name, of)
        federation.ready(of, *VALUES)
        run = federation.run(of)
        assert ended(run, 400 + 2 * seconds) == "completed"
        found = bits(model_of(run))
        assert len(events(run, "round")) == 1
    assert found == bits(run_peers(of, [Peer(name, value) for name, value in VALUES.items()], tmp_path / "local").model)
    for line in lines.values():
        assert line.broken.is_set()
        assert line.sent <= 1.1 * blob
    assert set(proxy.asked) == {f"CONNECT localhost:{nowhere} HTTP/1.1"}
