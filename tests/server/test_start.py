"""`locum server start` says that it is ready when it is, wherever its process stands."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.wire.federation import Process, free_port, locum, until

_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def _initialised(home: Path) -> int:
    port = free_port()
    locum("server", "init", "--name", "start", "--host", "localhost", "--port", port, "--listen", "127.0.0.1",
          "--home", home)  # fmt: skip
    return port


def _process(home: Path, *before: str) -> Process:
    """The coordinator, by the words `before` its own."""
    program = Path(sys.executable).with_name("locum")
    return Process((*before, str(program), "server", "start", "--home", str(home)), home.parent / "server.log")


@contextmanager
def _started(home: Path) -> Iterator[Process]:
    process = _process(home).start()
    try:
        yield process
    finally:
        process.stop()


def _can_contain() -> bool:
    try:
        return subprocess.run([*_CONTAINER, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _can_contain(), reason="this account may not make a namespace of processes")
def test_the_coordinator_gets_ready_as_the_first_process_of_a_container(tmp_path: Path) -> None:
    home = tmp_path / "coordinator"
    _initialised(home)
    process = _process(home, *_CONTAINER).start()
    try:
        until(lambda: b"ready:" in process.log.read_bytes(), what="the coordinator is not ready")
        assert b" ended " not in process.log.read_bytes()
    finally:
        process.kill()  # and with it, by --kill-child, the first process, and with that all others


def test_another_program_at_the_gateways_port_is_not_taken_for_the_gateway(tmp_path: Path) -> None:
    home = tmp_path / "coordinator"
    port = _initialised(home)
    held = socket.create_server(("127.0.0.1", port))
    with _started(home) as process:
        until(lambda: b"gateway ended" in process.log.read_bytes(), what="the gateway found a port")
        told = json.loads(locum("server", "status", "--json", "--home", home))
        assert told["processes"]["gateway"] is False
        assert b"ready:" not in process.log.read_bytes()
        said = (home / "logs" / "gateway.log").read_text()
        assert f"error: the port {port} cannot be opened" in said
        assert "Traceback" not in said

        held.close()
        until(lambda: b"ready:" in process.log.read_bytes(), what="the gateway did not come up")
