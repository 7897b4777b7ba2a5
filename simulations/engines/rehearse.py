"""The `rehearse` engine: a coordinator and one agent a site as real processes on loopback, by the commands of people.

What runs is what will run at the hospitals: `locum server init` and `start`, `invite` and `enrol`, `locum site start`,
`propose`, `approve`, `run`. The plan, data and seeds are those of the `local` engine, so the model is the same, to the
bit. A rehearsal that was interrupted goes on: who is enrolled stays so, and the run is resumed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from locum.common.cli import main
from locum.common.errors import RunError
from locum.common.log.origins import site_origin
from locum.common.plan import Plan
from locum.server.event_file import EventReader
from locum.server.home import Home
from locum.server.log import open_log
from locum.server.runs import Run, find

_READY_SECONDS = 90.0
_LOOK_SECONDS = 0.1
_END_SECONDS = 20.0
_WITNESS_SECONDS = 30.0
_RUN = "rehearsal.json"
#: Agents that have just been started may be missing once; sites that fail again and again do not come back.
_MOST_PAUSES = 2
#: What the simulation's folder gets of the run's.
_RESULTS = ("run.json", "model.safetensors")


def _site_start(folder: Path) -> Sequence[str]:
    return _command("site", "start", "--home", str(folder))


@dataclass(frozen=True)
class Rehearsal:
    """A rehearsal's folder: `coordinator/`, and in `sites/NAME/` each agent's.

    Attributes:
        folder: the simulation's folder.
        plan: the plan, which lies there as `plan.yaml`.
        sites: the sites' names; the store of each is `sites/NAME/store`.
        agent: the command that runs the agent of a folder.
    """

    folder: Path
    plan: Plan
    sites: Sequence[str]
    agent: Callable[[Path], Sequence[str]] = _site_start

    @property
    def home(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "coordinator"

    def site(self, name: str) -> Path:
        """An agent's folder."""
        return self.folder / "sites" / name


def run_rehearsal(rehearsal: Rehearsal, watch: Callable[[Run], AbstractContextManager[object]]) -> None:
    """Runs the plan to its end and leaves `run.json` and the model in the simulation's folder.

    Args:
        rehearsal: what to rehearse.
        watch: a context around the run.

    Raises:
        RunError: a command failed, or the run did.
    """
    _establish(rehearsal)
    with ExitStack() as stack:
        processes = [stack.enter_context(_coordinator(rehearsal))]
        _enrol_all(rehearsal)
        processes += [stack.enter_context(_agent(rehearsal, name)) for name in rehearsal.sites]
        _approve_all(rehearsal, processes)
        run = _asked(rehearsal)
        with watch(run):
            _await_end(run, processes)
        _await_witnesses(rehearsal)
    for name in _RESULTS:
        shutil.copyfile(run.folder / name, rehearsal.folder / name)


def _establish(rehearsal: Rehearsal) -> None:
    if not (rehearsal.home / "server.yaml").exists():
        shutil.rmtree(rehearsal.home, ignore_errors=True)
        ports = ("--port", str(_free_port()), "--listen", "127.0.0.1")
        _locum("server", "init", "--name", "rehearsal", "--host", "localhost", *ports, "--home", str(rehearsal.home))


def _enrol_all(rehearsal: Rehearsal) -> None:
    for name in rehearsal.sites:
        _enrol(rehearsal, name)


def _enrol(rehearsal: Rehearsal, name: str) -> None:
    """Enrols a site that is not, and writes its configuration: one thread, as the `local` engine has."""
    folder = rehearsal.site(name)
    (folder / "store").mkdir(parents=True, exist_ok=True)
    (folder / "site.yaml").write_text("stores: [store]\nresources: {threads: 1}\nrehearsal: true\n")
    if (folder / "identity").exists():
        return
    invitation = folder / "invitation.json"
    if not _is_used(rehearsal, name):
        invitation.unlink(missing_ok=True)
        _locum("server", "invite", name, "--out", str(invitation), "--home", str(rehearsal.home))
    _locum("site", "enrol", str(invitation), "--home", str(folder))
    invitation.unlink()


def _is_used(rehearsal: Rehearsal, name: str) -> bool:
    """Whether an enrolment was interrupted when the coordinator had it and the site not: its invitation ends it."""
    from locum.server.registry import Registry

    with closing(Registry(Home(rehearsal.home).registry)) as registry:
        return registry.site(name) is not None


def _approve_all(rehearsal: Rehearsal, processes: Sequence[_Process]) -> None:
    """Proposes the plan, and approves it at every site as soon as it is there."""
    _locum("propose", str(rehearsal.folder / "plan.yaml"), "--home", str(rehearsal.home))
    for name in rehearsal.sites:
        folder, digest = rehearsal.site(name), rehearsal.plan.digest
        proposal = folder / "proposals" / f"{digest}.json"
        _until(proposal.exists, f"the proposal did not reach {name}; see {folder / 'agent.log'}", processes)
        _locum("site", "approve", digest, "--steward", "rehearsal", "--yes", "--home", str(folder))
    _until(lambda: _all_approved(rehearsal), "the sites' approvals did not reach the coordinator", processes)


def _all_approved(rehearsal: Rehearsal) -> bool:
    from locum.server.proposals import sites_of

    approved, _ = sites_of(Home(rehearsal.home), rehearsal.plan.digest)
    return set(rehearsal.sites) <= set(approved)


def _asked(rehearsal: Rehearsal) -> Run:
    """The rehearsal's run: the one that was begun, or a new one."""
    note = rehearsal.folder / _RUN
    if note.exists():
        run = find(Home(rehearsal.home), json.loads(note.read_bytes())["run"])
        if not run.summary.exists():
            run.want("run", by="rehearsal")
        return run
    told = _locum("run", rehearsal.plan.digest, "--json", "--home", str(rehearsal.home))
    name = json.loads(told)["run"]
    note.write_text(json.dumps({"run": name}))
    return find(Home(rehearsal.home), name)


def _await_end(run: Run, processes: Sequence[_Process]) -> None:
    """Waits for the run's end; raises RunError if it fails, or if what it waits for will not come."""
    reader, pauses = EventReader(run.events), 0
    reader.read()  # what was before
    while not (status := run.status()).ended:
        _check(processes)
        pauses += sum(event["event"] == "paused" for event in reader.read())
        if pauses > _MOST_PAUSES and status.state == "paused":
            raise RunError(status.reason, "mend what it says, then resume")
        time.sleep(_LOOK_SECONDS)
    if status.state not in {"completed", "completed with losses"}:
        raise RunError(status.reason or f"the run {run.id} was {status.state}", status.remedy)


def _await_witnesses(rehearsal: Rehearsal) -> None:
    """Waits until every site has signed the log as it is at the end, or for a while: a run is complete without it."""
    log, end = open_log(Home(rehearsal.home)), time.monotonic() + _WITNESS_SECONDS
    while time.monotonic() < end:
        seen = log.witnesses()
        if all(seen.get(site_origin(log.federation, name), 0) >= log.store.size for name in rehearsal.sites):
            return
        time.sleep(_LOOK_SECONDS)


# --- processes


@dataclass(frozen=True)
class _Process:
    popen: subprocess.Popen[bytes]
    log: Path


@contextmanager
def _coordinator(rehearsal: Rehearsal) -> Iterator[_Process]:
    command = _command("server", "start", "--home", str(rehearsal.home))
    with _process(command, rehearsal.folder / "coordinator.log") as process:
        otherwise = f"the coordinator did not start; see {rehearsal.home / 'logs'}"
        _until(lambda: b"ready:" in process.log.read_bytes(), otherwise, [process])
        yield process


def _agent(rehearsal: Rehearsal, name: str) -> AbstractContextManager[_Process]:
    folder = rehearsal.site(name)
    return _process(rehearsal.agent(folder), folder / "agent.log")


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[_Process]:
    """A process that stays; ended with everything it started."""
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield _Process(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _locum(*words: str) -> str:
    """Runs a `locum` command in this process; returns what it printed. Raises RunError with what it said."""
    told, failed = io.StringIO(), io.StringIO()
    with redirect_stdout(told), redirect_stderr(failed):
        code = main(list(words))
    if code:
        said = failed.getvalue().strip() or told.getvalue().strip()
        raise RunError(f"`locum {' '.join(words[:2])}` failed: {said}", "mend what it says, then resume")
    return told.getvalue()


def _command(*words: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from locum.common.cli import main; sys.exit(main())", *words]


def _check(processes: Sequence[_Process]) -> None:
    """Raises RunError if one of the rehearsal's processes has ended, which none does by itself."""
    for process in processes:
        if process.popen.poll() is not None:
            raise RunError(f"a process of the rehearsal has ended; see {process.log}", "mend what it says, then resume")


def _until(holds: Callable[[], bool], otherwise: str, processes: Sequence[_Process]) -> None:
    end = time.monotonic() + _READY_SECONDS
    while not holds():
        _check(processes)
        if time.monotonic() > end:
            raise RunError(otherwise, "look there, then resume")
        time.sleep(_LOOK_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
