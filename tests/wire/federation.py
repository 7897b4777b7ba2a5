"""A federation of real processes on loopback, made by the commands that people use, that tests can hurt.

The coordinator is `locum server start` and what it starts. A site is either a real agent over a real store, or a peer:
the real connection, journal and gateway calls of an agent around an answer that a test chooses (see `peer.py`).
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file, save_file

from locum.common.build import Model
from locum.common.plan import Plan
from locum.server.authority import load_authority
from locum.server.event_file import read_events
from locum.server.home import Home, read_config
from locum.server.invitations import invite, make_invitation
from locum.server.proposals import propose, sites_of
from locum.server.registry import Registry
from locum.server.runs import Run, create_run
from locum.site_client.approvals import open_approvals
from locum.site_client.enrolment import enrol
from locum.site_client.gate import Policy
from tests.plans import initial

ROOT = Path(__file__).resolve().parents[2]
_LOCUM = (sys.executable, "-c", "import sys; from locum.common.cli import main; sys.exit(main())")


def locum(*words: object, code: int = 0) -> str:
    """Runs a `locum` command that must end with `code`; returns what it printed."""
    done = subprocess.run([*_LOCUM, *map(str, words)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"locum {words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def until(holds: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """Waits until something holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, what or "it never held"
        time.sleep(0.05)
    return found


def free_port() -> int:
    """A port below those that the kernel gives away, so that it is still free after its owner was killed."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            port = random.randrange(20_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Process:
    """One process of the federation, in a session of its own."""

    command: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    popen: subprocess.Popen[bytes] | None = None

    def start(self) -> Process:
        with self.log.open("ab") as file:
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                cwd=ROOT,
                env={**os.environ, **self.environment},
            )
        return self

    def kill(self) -> None:
        """kill -9, as it were."""
        assert self.popen is not None
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        """As a service manager stops it; must end by itself."""
        assert self.popen is not None
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(40)


@dataclass
class Federation:
    """The coordinator and its sites; make one with :func:`open_federation`."""

    folder: Path
    home: Home
    port: int
    server: Process
    sites: dict[str, Process] = field(default_factory=dict)

    # --- coordinator

    def start(self) -> None:
        """Starts the coordinator and waits until it answers."""
        before = self.server.log.read_bytes().count(b"ready:") if self.server.log.exists() else 0
        self.server.start()
        until(lambda: self.server.log.read_bytes().count(b"ready:") > before, 60, "the coordinator is not ready")

    def pid_of(self, name: str) -> int:
        """The process number of `superlink`, `superexec` or `gateway`."""

        def living() -> int | None:
            try:
                number = json.loads((self.home.path / "processes.json").read_bytes()).get(name)
                os.kill(number, 0)
            except (OSError, ValueError, TypeError):
                return None
            return int(number)

        return int(until(living, 60, f"{name} does not run"))

    # --- sites

    def enrol(self, name: str) -> Path:
        """Enrols a site as the two commands do; returns its folder."""
        home, invitation = self.folder / name, self.folder / f"{name}.json"
        config = read_config(self.home)
        with closing(Registry(self.home.registry)) as registry:
            invite(registry, make_invitation(load_authority(self.home, config), config, name), invitation)
        enrol(invitation, home)
        (home / "site.yaml").write_text("stores: [store]\nresources: {threads: 1}\n")
        (home / "store").mkdir(exist_ok=True)
        return home

    def peer(self, name: str, behaviour: str = "", *, approves: Sequence[Plan] = ()) -> Process:
        """A site that answers as `behaviour` says (see `peer.py`); enrolled if it is not, and started."""
        home = self.folder / name
        if not (home / "identity").exists():
            self.enrol(name)
        for plan in approves:
            self.approve(name, plan)
        command = (sys.executable, "-m", "tests.wire.peer", str(home), name, behaviour)
        self.sites[name] = Process(command, self.folder / f"{name}.log").start()
        return self.sites[name]

    def agent(self, name: str, store: Path) -> Process:
        """A real agent over a store that was ingested."""
        home = self.folder / name
        if not (home / "identity").exists():
            self.enrol(name)
            (home / "site.yaml").write_text(f"stores: [{store}]\nresources: {{threads: 1}}\n")
        command = (*_LOCUM, "site", "start", "--home", str(home))
        self.sites[name] = Process(command, self.folder / f"{name}.log").start()
        return self.sites[name]

    def approve(self, name: str, plan: Plan) -> None:
        """The site's steward approves, once the proposal is there."""
        home = self.folder / name
        until((home / "proposals" / f"{plan.digest}.json").exists, 60, f"{name} has not got the proposal")
        open_approvals(home, Policy()).approve(plan.digest, "test")

    # --- runs

    def propose(self, plan: Plan) -> None:
        """Proposes a plan by the command, and leaves its first model where peers look for shapes."""
        propose(self.home, plan, "test")
        save_file(initial(plan), self.folder / f"{plan.digest}.safetensors")

    def approved(self, plan: Plan) -> list[str]:
        """The sites whose approval has reached the coordinator."""
        return list(sites_of(self.home, plan.digest)[0])

    def run(self, plan: Plan) -> Run:
        """Asks for a run."""
        return create_run(self.home, plan, sites=self.approved(plan), by="test")

    def ready(self, plan: Plan, *names: str) -> None:
        """Waits until all these sites have approved and are connected."""
        until(lambda: set(names) <= set(self.approved(plan)), 60, "not all approvals arrived")

    def close(self) -> None:
        for process in (*self.sites.values(), self.server):
            if process.popen is not None and process.popen.poll() is None:
                process.popen.send_signal(signal.SIGTERM)
        for process in (*self.sites.values(), self.server):
            if process.popen is not None:
                try:
                    process.popen.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.popen.pid, signal.SIGKILL)


def move_ports(home: Home) -> None:
    """Gives the coordinator loopback ports of its own: several federations are under test on one machine."""
    ports = {"superlink_port": free_port(), "hints_port": free_port()}
    home.configuration.write_text(yaml.safe_dump({**yaml.safe_load(home.configuration.read_text()), **ports}))


@contextmanager
def open_federation(folder: Path) -> Iterator[Federation]:
    """A coordinator that runs, without sites."""
    home, port = Home(folder / "coordinator"), free_port()
    options = ("--name", "test", "--host", "localhost", "--listen", "127.0.0.1", "--port", str(port))
    locum("server", "init", *options, "--home", home.path)
    move_ports(home)
    command = (*_LOCUM, "server", "start", "--home", str(home.path))
    federation = Federation(folder, home, port, Process(command, folder / "server.log"))
    try:
        federation.start()
        yield federation
    finally:
        federation.close()


def ended(run: Run, seconds: float = 120.0) -> str:
    """Waits for a run's end; returns its state."""
    until(lambda: run.status().ended, seconds, f"{run.id} has not ended: {run.status()}, {events(run)[-3:]}")
    return run.status().state


def events(run: Run, kind: str = "") -> list[dict[str, Any]]:
    """What was told of a run."""
    return [event for event in read_events(run.events) if not kind or event["event"] == kind]


def model_of(run: Run) -> Model:
    """The run's result."""
    return dict(load_file(run.folder / "model.safetensors"))
