"""`locum server start`: keeps the coordinator's processes running, and the runs that somebody wants.

Three children: the SuperLink, its SuperExec, and the gateway. One that ends is started again, each time a little
later, up to half a minute; one that has lived for a minute is started again at once. Nothing is stored here: what
should run is derived at every look from the runs' folders, so a coordinator that was killed goes on where it was.

A run whose process is not there is started as a Flower run of its own; the checkpoints make it the same run. Flower's
own state of an earlier one does not matter, so a dead ServerApp is replaced at once and not after Flower's timeout.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from locum.common.durable import replace_unflushed
from locum.common.errors import LocumError, RunError
from locum.common.fab import build_bundle
from locum.server import superlink
from locum.server.home import Home, ServerConfig
from locum.server.log import FederationLog, open_log
from locum.server.run_log import RunLog
from locum.server.runs import Run, Stamp, all_runs
from locum.server.superlink import Control

log = logging.getLogger("locum.server")

_LOOK_SECONDS = 0.25
_FIRST_DELAY, _LONGEST_DELAY, _STEADY_SECONDS = 0.2, 30.0, 60.0
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_MOST_FAILURES = 8
_LEAST_SPACE = 16 << 20


@dataclass
class Child:
    """One supervised process."""

    name: str
    command: Callable[[], list[str]]
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    delay: float = _FIRST_DELAY
    next_start: float = 0.0

    def keep(self, home: Home) -> bool:
        """Starts the process if it is not running and its delay is over; returns whether it did."""
        if self.process is not None and self.process.poll() is None:
            return False
        now = time.monotonic()
        if self.process is not None:
            self._ended(self.process.returncode, now)
        if now < self.next_start:
            return False
        self.began = now
        try:
            self.process = self._started(home)
        except OSError as error:
            self._ended(error.strerror, now)
            return False
        return True

    def _started(self, home: Home) -> subprocess.Popen[bytes]:
        with (home.logs / f"{self.name}.log").open("ab") as file:
            return subprocess.Popen(  # noqa: S603 - our own command line
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=superlink.environment(home),
                cwd=home.path,
                start_new_session=True,
            )

    def _ended(self, why: object, now: float) -> None:
        steady = now - self.began > _STEADY_SECONDS
        self.delay = _FIRST_DELAY if steady else min(self.delay * 2, _LONGEST_DELAY)
        self.next_start, self.process = now + self.delay, None
        log.warning(
            "%s ended (%s); it is started again in %.1f s; logs/%s.log says why", self.name, why, self.delay, self.name
        )

    def stop(self) -> None:
        """Ends the process, by force if it does not go."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class _Attempt:
    """A run's newest Flower run, and how often a start brought nothing.

    `at` is when it was started, by the clock of files; `began` by one that nobody sets.
    """

    number: int | None = None
    at: float = 0.0
    began: float = -math.inf
    round: int = 0
    failures: int = 0


@dataclass
class Conductor:
    """Sees to it that every run that is wanted has a process, and that one that is not wanted has none."""

    home: Home
    config: ServerConfig
    _attempts: dict[str, _Attempt] = field(default_factory=dict)
    _problems: dict[str, str] = field(default_factory=dict)
    _closed: dict[str, Stamp] = field(default_factory=dict)
    _log: FederationLog | None = None

    def look(self) -> None:
        """One look at all runs; what goes wrong with one is told in the log, and the next look tries again."""
        for run in all_runs(self.home):
            if self._closed.get(run.id) == run.stamp:
                continue
            problem = ""
            try:
                self._see_to(run)
            except (LocumError, OSError) as error:
                problem = str(error)
            if problem and problem != self._problems.get(run.id):
                log.warning("%s: %s", run.id, problem)
            self._problems[run.id] = problem

    def _see_to(self, run: Run) -> None:
        stamp, status = run.stamp, run.status()
        if status.ended:
            self._close(run)
            self._closed[run.id] = stamp
        elif status.state == "stopping":
            self._end_process(run, status.since)
        elif status.state in {"waiting", "restarting"}:
            self._start(run, status.round)

    def _start(self, run: Run, committed: int) -> None:
        """Starts a Flower run for `run`, unless one was started a moment ago; fails the run if none ever holds."""
        attempt = self._attempts.setdefault(run.id, _Attempt(round=committed))
        if committed > attempt.round:
            attempt.failures, attempt.round = 0, committed
        patience = _START_SECONDS if attempt.number is not None and not _held_since(run, attempt.at) else 0.0
        if time.monotonic() - attempt.began < max(patience, min(2.0**attempt.failures, _LONGEST_DELAY) - 1):
            return
        if attempt.failures >= _MOST_FAILURES:
            run.fail(f"its process ended {attempt.failures} times in a row", "see superexec.log, then `locum resume`")
            attempt.failures = 0
            return
        _check_space(self.home)
        control = Control(self.home, self.config)
        try:
            if attempt.number is not None:
                control.stop_run(attempt.number)
            number = control.start_run(build_bundle(run.plan), run.id)
        finally:
            control.close()
        attempt.failures += attempt.number is not None
        attempt.number, attempt.at, attempt.began = number, time.time(), time.monotonic()

    def _end_process(self, run: Run, since: float) -> None:
        """A process that does not see that it should stop is ended."""
        if time.time() - since > _STOP_SECONDS:
            _kill(run)

    def stop(self) -> None:
        """Ends the processes of all runs; they go on from their last committed round when the coordinator is back."""
        for run in all_runs(self.home):
            with suppress(LocumError, OSError):  # the next one must end all the same
                _kill(run)

    def _log_end(self, run: Run) -> None:
        """A run that was stopped, or has failed, while it had no process."""
        state = run.status().state
        if state not in {"stopped", "failed"}:
            return
        self._log = self._log or open_log(self.home)
        if self._log.last_of(run.id) not in {"", state}:
            self._log.append(RunLog(self._log, run.id, run.created.digest).said(state))
            self._log.seal()

    def _close(self, run: Run) -> None:
        """What an ended run leaves behind: its blobs, its Flower run, and its end in the log if nobody wrote that."""
        self._log_end(run)
        shutil.rmtree(self.home.spool / run.id, ignore_errors=True)
        attempt = self._attempts.get(run.id)
        if attempt is not None and attempt.number is not None:
            control = Control(self.home, self.config)
            try:
                control.stop_run(attempt.number)
            finally:
                control.close()
        self._attempts.pop(run.id, None)


def _kill(run: Run) -> None:
    """Ends the process of a run, if it has one."""
    process = run.alive()
    if process is not None:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _check_space(home: Home) -> None:
    """Raises RunError where a run would only find that nothing can be written."""
    if shutil.disk_usage(home.path).free < _LEAST_SPACE:
        reason = f"the disk of {home.path} is full; the run waits until it has {_LEAST_SPACE >> 20} MiB"
        raise RunError(reason, "free space; the run goes on by itself")


def _held_since(run: Run, at: float) -> bool:
    """Whether a process has taken the run after `at`."""
    try:
        return (run.folder / "lock").stat().st_mtime > at
    except FileNotFoundError:
        return False


def children(home: Home, config: ServerConfig) -> list[Child]:
    """The processes of a coordinator."""
    return [
        Child("superlink", lambda: superlink.command(home, config)),
        Child("superexec", lambda: superlink.executor_command(home, config, os.getpid())),
        Child("gateway", lambda: [sys.executable, "-m", "locum.server.gateway", str(home.path)]),
    ]


def supervise(home: Home, config: ServerConfig, ended: threading.Event) -> None:
    """Keeps everything running until `ended`; raises RunError if another supervisor holds the folder."""
    home.logs.mkdir(exist_ok=True)
    processes, conductor = children(home, config), Conductor(home, config)
    with _alone(home):
        try:
            while not ended.wait(_LOOK_SECONDS):
                started = [child.keep(home) for child in processes]  # each of them, so no short cut
                if any(started):
                    _tell(home, processes)
                conductor.look()
        finally:
            conductor.stop()
            for child in reversed(processes):
                child.stop()


def _tell(home: Home, processes: list[Child]) -> None:
    """Writes the numbers of the processes down, for people and for tests."""
    numbers = {child.name: child.process.pid for child in processes if child.process is not None}
    with suppress(OSError):  # a full disk ends no process
        replace_unflushed(home.path / "processes.json", json.dumps(numbers).encode())


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    with (home.path / "supervisor.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"a coordinator runs in {home.path} already", "stop that one first") from error
        yield
