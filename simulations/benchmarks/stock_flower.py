"""What a round costs in a stock Flower deployment: the peer beside which `wire.py` measures ours.

Flower's own commands from this environment and nothing of ours: `flower-superlink` with TLS on loopback, its state in
memory and a process for every task (its defaults), one `flower-supernode` a site, FedAvg as it is delivered, and an
application whose training costs a multiplication. Rules:
  * No setting of Flower is changed but what keeps it from the network: no telemetry, no update check, no installing of
    dependencies. Variables `FLWR_…` of the caller do not reach it.
  * Flower stores equal chunks of 5 MiB once. So the weights are random and every site multiplies them by a factor of
    its own, another one in every round: no chunk is ever sent for another.
  * Whatever was started is gone at the end, also what left its session or lost its parent, and also after an
    error or SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from itertools import pairwise
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from locum.common.errors import RunError

_LOOK_SECONDS = 0.2
_READY_SECONDS = 120.0
#: So long a peer may show no progress: many times what a round of 400 MB takes.
_PATIENCE_SECONDS = 900.0
_MARK = "LOCUM_BENCHMARK_PEER"
_TOLD_LINES = 12
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Measured:
    """What a peer needed.

    Attributes:
        seconds: of each round but the first.
        memory: the most resident bytes by part of the peer, each with the processes that it started.
    """

    seconds: tuple[float, ...]
    memory: dict[str, int]


def rounds(folder: Path, *, sites: int, megabytes: float, count: int) -> Measured:
    """Runs `count` rounds of stock FedAvg over stock SuperNodes, with TLS, and measures all but the first.

    Args:
        folder: an empty folder, or one to be made; logs and certificates stay there.
        sites: how many SuperNodes, all of which take part in every round.
        megabytes: size of the model in 10⁶ bytes, float32.
        count: rounds, the first of which is not measured; at least 2.

    Returns:
        `count - 1` times, from one global model to the next, and the memory of `superlink`, `serverapp` and
        `supernode` (the largest).

    Raises:
        RunError: Flower did not start, failed, made no progress for 15 minutes, or lost a contribution.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    app = write_app(folder, sites=sites, megabytes=megabytes, count=count)
    with Processes(folder, _role) as processes:
        _start(processes, folder, sites)
        _submit(processes, folder, app)
        _await_end(processes, folder)
    _check(json.loads((folder / _ENDED).read_bytes()), sites, count)
    stamps = [float(line) for line in (folder / _STAMPS).read_text().split()]
    nodes = [size for name, size in processes.peak.items() if name.startswith("supernode")]
    memory = {"superlink": processes.peak["superlink"], "serverapp": processes.peak["serverapp"]}
    return Measured(periods(stamps), {**memory, "supernode": max(nodes)})


def _check(end: dict[str, Any], sites: int, count: int) -> None:
    if "error" in end:
        raise RunError(f"stock Flower's ServerApp failed: {end['error']}", "mend what it says")
    if end["replies"] != [sites] * count:
        raise RunError(f"stock Flower lost contributions: {end['replies']} of {sites} a round", "see supernode-0.log")


def periods(stamps: Sequence[float]) -> tuple[float, ...]:
    """Seconds between neighbouring time stamps, without the first period."""
    return tuple(after - before for before, after in pairwise(stamps))[1:]


# --- the deployment


def _start(processes: Processes, folder: Path, sites: int) -> None:
    """Starts a SuperLink and its SuperNodes, and writes down where the SuperLink is."""
    key, certificate = _write_certificate(folder)
    port, *others = free_ports(1 + sites)
    address = f"{_HOST}:{port}"
    (folder / "config.toml").write_text(
        f'[superlink.stock]\naddress = "{address}"\nroot-certificates = "{certificate}"\n'
    )
    tls = ("--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", certificate)
    processes.start("superlink", ["flower-superlink", "--host", _HOST, "--port", str(port), *tls], _environment(folder))
    _await_port(processes, port)
    for number, other in enumerate(others):
        name = f"supernode-{number}"
        command = ["flower-supernode", "--superlink", address, "--root-certificates", certificate]
        command += ["--host", _HOST, "--port", str(other), "--node-config", f"partition-id={number}"]
        processes.start(name, command, _environment(folder / name))


def _environment(home: Path) -> dict[str, str]:
    """The environment of a Flower process whose own folder is `home`."""
    home.mkdir(exist_ok=True)
    rest = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    return {
        **rest,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": _HOST,
        "no_proxy": _HOST,
    }


def _role(name: str, words: Sequence[str]) -> str:
    """The part that a process belongs to: the SuperLink starts the ServerApp, which is counted by itself."""
    return "serverapp" if any(Path(word).name == "flwr-serverapp" for word in words[:2]) else name


def _submit(processes: Processes, folder: Path, app: Path) -> None:
    command = ["flwr", "run", str(app), "stock"]
    process = processes.start("submission", command, _environment(folder))
    try:
        failed = process.wait(_READY_SECONDS) != 0
    except subprocess.TimeoutExpired:
        failed = True
    if failed:
        raise RunError(f"`flwr run` failed: {processes.told('submission')}", "mend what it says")


def _await_end(processes: Processes, folder: Path) -> None:
    begun = False
    for parts in processes.watched(folder / _STAMPS):
        if (folder / _ENDED).exists():
            return
        if "superlink" not in parts or (begun and "serverapp" not in parts):
            raise RunError(f"stock Flower ended early: {processes.told('superlink')}", "mend what it says")
        begun = begun or "serverapp" in parts


def _await_port(processes: Processes, port: int) -> None:
    end = time.monotonic() + _READY_SECONDS
    while True:
        try:
            socket.create_connection((_HOST, port), 1).close()
        except OSError as error:
            if time.monotonic() > end or "superlink" not in processes.look():
                raise RunError(f"flower-superlink failed: {processes.told('superlink')}", "mend that") from error
        else:
            return
        time.sleep(_LOOK_SECONDS)


def free_ports(count: int) -> list[int]:
    """So many different free ports of the loopback."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((_HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _write_certificate(folder: Path) -> tuple[str, str]:
    """Writes a key and a certificate for the loopback that vouches for itself, for a day; returns their paths."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(_HOST)), x509.DNSName("localhost")])
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    paths = folder / "tls.key", folder / "tls.pem"
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    paths[0].write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    paths[1].write_bytes(certificate.public_bytes(encoding))
    return str(paths[0]), str(paths[1])


# --- the application


_STAMPS, _ENDED = "stamps.txt", "ended.json"

_METADATA = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "idle"
version = "1.0.0"
description = "FedAvg over sites whose training costs nothing."
license = "Apache-2.0"
dependencies = ["flwr>=1.41.0,<1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "idle.server_app:app"
clientapp = "idle.client_app:app"

[tool.flwr.app.config]
"""

_SERVER_APP = '''\
"""Stock FedAvg over random weights; notes when each global model was there."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    try:
        end = {"replies": serve(grid, config)}
    except Exception as error:
        end = {"error": f"{type(error).__name__}: {error}"}
    ended = Path(config["ended"])
    ended.with_suffix(".new").write_text(json.dumps(end))
    ended.with_suffix(".new").replace(ended)


def serve(grid, config):
    """Runs the rounds; returns how many replies each of them aggregated."""
    generator, sites = np.random.default_rng(0), int(config["sites"])
    shape = (int(config["values"]) // int(config["tensors"]),)
    weights = [generator.standard_normal(shape, dtype=np.float32) for _ in range(int(config["tensors"]))]

    def note(number, arrays):
        with Path(config["stamps"]).open("a") as file:
            file.write(f"{time.monotonic()!r}\\n")

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=sites,
        min_available_nodes=sites,
        train_metrics_aggr_fn=lambda records, key: MetricRecord({"replies": len(records)}),
    )
    result = strategy.start(grid, ArrayRecord(weights), num_rounds=int(config["rounds"]), evaluate_fn=note)
    answered = result.train_metrics_clientapp
    numbers = range(1, int(config["rounds"]) + 1)
    return [int(answered[number]["replies"]) if number in answered else 0 for number in numbers]
'''

_CLIENT_APP = '''\
"""Training that costs nothing: the weights times a factor of this site and round."""

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    site, number = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
    factor = np.float32(1 + 1e-3 * (site + 1) + 1e-5 * number)
    arrays = [factor * array for array in message.content["arrays"].to_numpy_ndarrays()]
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)
'''

_TENSORS = 8


def write_app(folder: Path, *, sites: int, megabytes: float, count: int) -> Path:
    """Writes the Flower application whose runs note their progress in `folder`; returns its folder."""
    app = folder / "app"
    (app / "idle").mkdir(parents=True)
    values = {"sites": sites, "rounds": count, "tensors": _TENSORS, "values": round(megabytes * 1e6 / 4)}
    paths = {"stamps": str(folder / _STAMPS), "ended": str(folder / _ENDED)}
    config = "".join(f"{name} = {json.dumps(value)}\n" for name, value in {**values, **paths}.items())
    files = {"__init__.py": "", "server_app.py": _SERVER_APP, "client_app.py": _CLIENT_APP}
    (app / "pyproject.toml").write_text(_METADATA + config)
    for name, text in files.items():
        (app / "idle" / name).write_text(text)
    return app


# --- processes


@dataclass
class Processes:
    """A peer's processes, with all that they start, under whatever session or parent; a context that ends them.

    A mark in the environment, which is inherited, tells them from all others. Within the context SIGTERM raises
    SystemExit, so that they end then too; it therefore belongs to the main thread.

    Attributes:
        folder: where the logs `NAME.log` and the temporary files lie.
        role: the part of the peer that a process belongs to, by the name under which it or its ancestor was started
            and the words of its command.
        peak: the most resident bytes that each part was seen with: of its processes together, or of one of them at
            any moment.
    """

    folder: Path
    role: Callable[[str, Sequence[str]], str]
    peak: Counter[str] = field(default_factory=Counter)
    _mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _before: Any = None

    def __enter__(self) -> Processes:
        (self.folder / "tmp").mkdir(exist_ok=True)
        self._before = signal.signal(signal.SIGTERM, _leave)
        return self

    def __exit__(self, *_error: object) -> None:
        """Kills: nothing of a benchmark is worth an orderly end."""
        while members := list(self._members()):
            for number, _ in members:
                _kill(number)
            time.sleep(0.02)
        for process in self._started:
            process.wait()
        signal.signal(signal.SIGTERM, self._before)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Starts a command in `folder`, found in the `PATH` of its environment; its output goes to `NAME.log`."""
        marked = {**environment, "TMPDIR": str(self.folder / "tmp"), _MARK: f"{self._mark}/{name}"}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command
                command,
                cwd=self.folder,
                env=marked,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def look(self) -> set[str]:
        """Notes the memory of every part; returns the parts that are there."""
        resident: Counter[str] = Counter()
        for number, name in self._members():
            part = self.role(name, _words(Path(f"/proc/{number}/cmdline"), b"\0"))
            now, highest = _memory(number)
            resident[part] += now
            self.peak[part] = max(self.peak[part], highest)
        self.peak |= resident
        return set(resident)

    def watched(self, progress: Path) -> Iterator[set[str]]:
        """Looks until the caller leaves the loop; raises RunError when the file `progress` does not grow any more."""
        size, since = -1, time.monotonic()
        while True:
            yield self.look()
            now = progress.stat().st_size if progress.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > _PATIENCE_SECONDS:
                raise RunError(f"{progress.name} did not grow for {_PATIENCE_SECONDS:g} s", "see the logs beside it")
            time.sleep(_LOOK_SECONDS)

    def told(self, name: str) -> str:
        """The last lines of a log that are no mere information."""
        text = (self.folder / f"{name}.log").read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and "INFO" not in line]
        return "\n".join(lines[-_TOLD_LINES:])

    def _members(self) -> Iterator[tuple[int, str]]:
        """Number and name of every process that carries the mark; the dead that wait for their parent do not."""
        for path in Path("/proc").glob("[0-9]*"):
            for word in _words(path / "environ", b"\0"):
                mark, _, name = word.removeprefix(f"{_MARK}=").partition("/")
                if mark == self._mark:
                    yield int(path.name), name
                    break


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _kill(number: int) -> None:
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        return


def _words(path: Path, separator: bytes) -> list[str]:
    """The parts of a file of `/proc`; none if its process is gone or is not ours."""
    try:
        return [os.fsdecode(word) for word in path.read_bytes().split(separator)]
    except OSError:
        return []


def _memory(number: int) -> tuple[int, int]:
    """Resident bytes of a process: now, and the most since it began."""
    lines = [line.partition(":") for line in _words(Path(f"/proc/{number}/status"), b"\n")]
    found = {key: int(value.split()[0]) * 1024 for key, _, value in lines if key in {"VmRSS", "VmHWM"}}
    return found.get("VmRSS", 0), found.get("VmHWM", 0)
