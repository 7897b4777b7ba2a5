"""What tests do to a federation, and what they compare its runs with."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import numpy as np
from flwr.app import Error, RecordDict

from locum.common.build import Model
from locum.common.errors import Code
from locum.common.messages import DESCRIBE, EVALUATE, TRAIN, Tensors, TrainTask, unpack
from locum.common.plan import Plan
from locum.server import superlink
from locum.server.home import Home, ServerConfig, read_config
from locum.server.runs import Run, all_runs
from tests.peers import Answer, Peer, run_peers
from tests.wire.federation import Federation, Process, ended, events, locum, move_ports, open_federation, until

#: The peers of a federation under test, and the value that each one's updates have everywhere.
PEERS: Mapping[str, float] = {"a": 0.1, "b": 0.7, "c": 0.9}
_KINDS = (DESCRIBE, TRAIN, EVALUATE)
#: The state of a listening socket in /proc/net/tcp.
_LISTEN = "0A"


# --- what a run should give


class _Away(Peer):
    """A peer that trains nothing in some rounds."""

    def __init__(self, site: str, value: float, rounds: Sequence[int]) -> None:
        super().__init__(site, value)
        self.rounds = rounds

    def train(self, plan: Plan, content: RecordDict) -> Answer:
        task, _ = unpack(content, TrainTask, self.carrier)
        return Error(code=Code.WORKER_DIED) if task.round in self.rounds else super().train(plan, content)


def expected(plan: Plan, folder: Path, lost: Mapping[str, Sequence[int]] | None = None) -> dict[str, bytes]:
    """The model of a run in one process in which sites miss the rounds `lost`; as bytes."""
    away = lost or {}
    peers: list[Peer] = [_Away(name, value, away.get(name, ())) for name, value in PEERS.items()]
    return bits(run_peers(plan, peers, folder).model)


def bits(model: Model | Tensors) -> dict[str, bytes]:
    """A model, to compare to the bit."""
    return {name: np.asarray(array).tobytes() for name, array in sorted(model.items())}


# --- peers that wait


@contextmanager
def open_peers(folder: Path, plans: Sequence[Plan], lines: Mapping[str, Line] | None = None) -> Iterator[Federation]:
    """A federation whose peers are connected, some over a line of their own, and have approved all plans.

    Nothing of it is left behind.
    """
    try:
        with open_federation(folder) as federation:
            for plan in plans:
                federation.propose(plan)
            for name, line in (lines or {}).items():
                line.lay(federation, name)
            for name in PEERS:
                start(federation, name)
            for plan in plans:
                for name in PEERS:
                    federation.approve(name, plan)
            for plan in plans:
                federation.ready(plan, *PEERS)
            yield federation
    finally:
        for number in processes(folder):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)


def start(federation: Federation, name: str) -> None:
    """Starts a peer, again where it was killed."""
    federation.peer(name, f"value:{PEERS[name]}")


def mend(federation: Federation) -> None:
    """Lets go of what a test held, starts what it left dead, and stops its runs."""
    release(federation)
    for name in PEERS:
        if not _lives(federation.sites[name].popen):
            start(federation, name)
    if not _lives(federation.server.popen):
        federation.start()
    for run in all_runs(federation.home):
        if not run.status().ended:
            run.want("stop")
            ended(run)


def _lives(process: object) -> bool:
    return process is not None and process.poll() is None  # type: ignore[attr-defined]


def hold(federation: Federation, kind: str, *names: str) -> None:
    """Lets sites take messages of this kind, but not answer them."""
    for name in names or PEERS:
        (federation.folder / name / f"hold-{kind}").touch()


def release(federation: Federation, *kinds: str) -> None:
    """Lets sites answer messages of these kinds, or all."""
    for name in PEERS:
        for kind in kinds or _KINDS:
            (federation.folder / name / f"hold-{kind}").unlink(missing_ok=True)


@dataclass
class Taken:
    """The messages that sites have begun to work on, from when this was made."""

    federation: Federation
    _before: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before = {name: len(self._lines(name)) for name in PEERS}

    def _lines(self, name: str) -> list[str]:
        path = self.federation.folder / name / "handled"
        return path.read_text().splitlines() if path.exists() else []

    def of(self, name: str, message: str) -> int:
        """How often a site began with a message; that is its type and its round, such as `train 2`."""
        return self._lines(name)[self._before[name] :].count(message)

    def wait(self, message: str, *names: str) -> None:
        """Until these sites (or all) have begun with it."""
        for name in names or PEERS:
            until(lambda name=name: self.of(name, message), 120, f"{name} never began '{message}'")


class Line:
    """A way between a site and the gateway, as fast as a test wants."""

    def __init__(self) -> None:
        self.up: float | None = None  #: Bytes a second from the site; None is as fast as it goes.
        self.down: float | None = None  #: Bytes a second to the site.
        self._server = socket.create_server(("127.0.0.1", 0))
        self._port = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def lay(self, federation: Federation, name: str) -> None:
        """Enrols a site whose way to the gateway this is."""
        path = federation.enrol(name) / "identity" / "federation.json"
        told = json.loads(path.read_bytes())
        path.write_text(json.dumps({**told, "address": f"localhost:{self._server.getsockname()[1]}"}))
        self._port = federation.port

    def _accept(self) -> None:
        while True:
            near, _ = self._server.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                near.close()
                continue
            for ends in ((near, far, lambda: self.up), (far, near, lambda: self.down)):
                threading.Thread(target=_carry, args=ends, daemon=True).start()


def _carry(source: socket.socket, target: socket.socket, rate: Callable[[], float | None]) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 14):
            target.sendall(data)
            began = time.monotonic()
            while (now := rate()) and time.monotonic() < began + len(data) / now:
                time.sleep(0.01)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def moving(folder: Path) -> None:
    """Waits until a part of a blob has arrived in a folder."""
    until(lambda: any(path.stat().st_size for path in folder.rglob("*.part")), 120, f"no blob moves to {folder}")


# --- a SuperLink by itself


@dataclass(frozen=True)
class SuperLink:
    """Flower's program as the coordinator starts it, and nothing else of the coordinator."""

    home: Home
    config: ServerConfig
    process: Process

    @property
    def number(self) -> int:
        """Of its process."""
        assert self.process.popen is not None
        return self.process.popen.pid


@contextmanager
def open_superlink(folder: Path) -> Iterator[SuperLink]:
    """A new coordinator's SuperLink, which answers."""
    home = Home(folder / "coordinator")
    locum("server", "init", "--name", "test", "--host", "localhost", "--home", home.path)
    move_ports(home)
    config = read_config(home)
    process = Process(superlink.command(home, config), folder / "superlink.log", superlink.environment(home)).start()
    running = SuperLink(home, config, process)
    try:
        until(lambda: listening(running.number), 60, "the SuperLink does not listen")
        yield running
    finally:
        process.kill()


# --- processes


def processes(folder: Path) -> list[int]:
    """The processes whose command line names the folder of a federation."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def writer(path: Path) -> int | None:
    """The process whose standard output is a file."""
    for number in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (number / "fd" / "1").readlink() == path:
                return int(number.name)
    return None


def computed(process: int) -> float:
    """The seconds that a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def listening(process: int) -> set[str]:
    """The addresses (`127.0.0.1:9091`) on which a process listens, as the kernel tells them."""
    own = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            own.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in own:
                host, port = fields[1].split(":")
                found.add(f"{_host(bytes.fromhex(host))}:{int(port, 16)}")
    return found


def _host(words: bytes) -> str:
    """An address from 32-bit words in the machine's order."""
    found = ip_address(b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4)))
    return str((found.ipv4_mapped if isinstance(found, IPv6Address) else None) or found)


# --- kill -9


def kill_app(run: Run) -> int:
    """Kills the run's process; returns its number."""
    number = int(until(run.alive, 120, "the run has no process"))
    os.kill(number, signal.SIGKILL)
    return number


def kill(federation: Federation, name: str) -> None:
    """Kills a supervised process, and waits until the next one runs."""
    before = federation.pid_of(name)
    os.kill(before, signal.SIGKILL)
    until(lambda: federation.pid_of(name) != before, 120, f"{name} was not started again")


def told(run: Run, kind: str, *, seconds: float = 120.0, **fields: object) -> None:
    """Waits until the run has told of something."""

    until(lambda: any(fields.items() <= event.items() for event in events(run, kind)), seconds, f"no {kind} {fields}")
