"""`python -m locum.simulations.benchmarks.own_network ROOM`: a server in a network of its own, with doors.

Some servers listen on every address whatever their configuration says. Here one runs in a network namespace that
nothing outside can reach, and only the ports named lead in and out.

Rules:
  * A door in is a socket that listened before the namespace was entered; what connects to it gets to a port inside.
  * A door out is a port inside; what connects to it gets to a Unix socket, which namespaces do not part.
  * It ends, and the server with it, when its standard input does: nothing is left behind by a caller that is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Room:
    """What runs in the namespace, and its doors.

    Attributes:
        command: the server and its arguments.
        doors_in: inherited listening socket, port inside.
        doors_out: port inside, path of a Unix socket.
    """

    command: Sequence[str]
    doors_in: Sequence[tuple[int, int]] = ()
    doors_out: Sequence[tuple[int, str]] = ()


def own_network() -> list[str] | None:
    """The command that enters a new network namespace, or None if this account may not."""
    if not shutil.which("unshare"):
        return None
    ways = (["unshare", "-n", "--"], ["unshare", "-Urn", "--"])
    return next((way for way in ways if _succeeds([*way, "true"])), None)


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0  # noqa: S603


def enter(room: Room, entrance: Sequence[str], log: int) -> subprocess.Popen[bytes]:
    """Start a server in a network of its own; closing the process's standard input ends both."""
    command = [*entrance, sys.executable, "-m", __spec__.name, json.dumps(asdict(room))]
    handles = [handle for handle, _ in room.doors_in]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=handles)  # noqa: S603


def pass_on(listening: socket.socket, connect: Callable[[], socket.socket]) -> None:
    """Pass every connection that comes in on to another, until the listening socket is closed."""
    while True:
        try:
            here, _ = listening.accept()
        except OSError:
            return
        try:
            there = connect()
        except OSError:
            here.close()
            continue
        for source, sink in ((here, there), (there, here)):
            threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """What comes from one goes to the other, by way of a pipe and without a copy (splice)."""
    reading, writing = os.pipe()
    with contextlib.suppress(OSError):
        while count := os.splice(source.fileno(), writing, _AT_ONCE):
            while count:
                count -= os.splice(reading, sink.fileno(), count)
    os.close(reading)
    os.close(writing)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def main() -> None:
    """Opens the doors, runs the server, and ends it at the end of standard input."""
    given = json.loads(sys.argv[1])
    _lift_loopback()
    for handle, port in given["doors_in"]:
        _in_background(
            pass_on, socket.socket(fileno=handle), lambda port=port: socket.create_connection(("127.0.0.1", port))
        )
    for port, path in given["doors_out"]:
        _in_background(pass_on, socket.create_server(("127.0.0.1", port)), lambda path=path: _unix(path))
    server = subprocess.Popen(given["command"], stdin=subprocess.DEVNULL)  # noqa: S603 (what this module is for)
    _in_background(_end_with, server)
    os._exit(server.wait() & 0xFF)  # the doors' threads wait for ever


def _end_with(server: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1 << 10):
        pass
    server.kill()  # what it stored was for its caller only


def _unix(path: str) -> socket.socket:
    end = socket.socket(socket.AF_UNIX)
    end.connect(path)
    return end


def _lift_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def _in_background(function: Callable[..., None], *given: object) -> None:
    threading.Thread(target=function, args=given, daemon=True).start()


if __name__ == "__main__":
    main()
