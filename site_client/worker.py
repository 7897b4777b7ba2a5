"""The worker process: images, torch and the GPU live here; keys and the connection do not.

The agent and its worker speak over a pipe in two frames a message: JSON, then tensors in safetensors form. Large
tensors go as the name of a file that the other side maps, so that a model is not copied on its way. Nothing is pickled.
A worker stays warm across rounds; if it dies, or has not answered in time and is stopped, its agent gets `WORKER_DIED`
and the next call starts another. If the agent dies, its worker ends at once, in the middle of a step too. Workers are
forked from a server process that has loaded torch and MONAI once. A worker puts the site's limits on itself before it
looks at a request; memory beyond its limit is `OUT_OF_MEMORY`, and the worker lives on.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
from safetensors.numpy import load, save

from locum.common.errors import Code, SiteFailure
from locum.common.messages import BLOB_THRESHOLD, Arrays
from locum.common.plan import Plan
from locum.common.tensor_files import Mapped, map_tensors, write_tensors

if TYPE_CHECKING:
    from locum.site_client.session import Session
    from locum.site_client.settings import Settings

# An optimiser's first step imports torch._dynamo: a second for every worker, unless the server has done it.
_PRELOADED = ("locum.site_client.operations", "torch._dynamo")
_context = get_context("forkserver")
_FILE = "tensors_file"
#: What the pipe raises when the other side is gone or has sent what is no message.
_NO_MESSAGE = (EOFError, OSError, ValueError, safetensors.SafetensorError)
#: How torch's and C++'s allocators say that memory ran out, in an error that has no type of its own.
_NO_MEMORY_WORDS = ("can't allocate memory", "Cannot allocate memory", "std::bad_alloc")


def process_context() -> ForkServerContext:
    """The context of worker processes: forked from one server process that has loaded torch and MONAI.

    The first call in a process starts that server; it loads while the caller goes on.
    """
    _context.set_forkserver_preload(list(_PRELOADED))
    ensure_running()
    return _context


# --- inside the worker


def serve(connection: Connection, settings: Settings) -> None:
    """The worker's loop: answers requests until the pipe closes."""
    from locum.site_client import operations  # torch is loaded in the worker, never in the agent

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    _keep_output(settings)
    _limit(settings)
    _end_with_agent()
    session: Session | None = None
    theirs = settings.run_dir / "from-worker.safetensors"
    while True:
        try:
            request, tensors = _receive(connection)
        except _NO_MESSAGE:
            return  # what is no message ends the worker: nothing after it can be trusted to be whole
        try:
            session = operations.session_for(session, settings, request)
            answer = _frames(*operations.OPERATIONS[request["operation"]](session, request, tensors), theirs)
        except Exception as error:  # noqa: BLE001 - the loop must answer; the agent logs the text, only the code leaves
            answer = _frames(_failure(error), {}, theirs)
        _send(connection, answer)


def _end_with_agent() -> None:
    """Ends this process when its agent has ended, for a step can take hours and nobody waits for it then."""
    agent = parent_process()

    def watch() -> None:
        if agent is not None:
            agent.join()
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="agent", daemon=True).start()


def _limit(settings: Settings) -> None:
    """Takes no more of the machine than the site allows; raises OSError if that cannot be."""
    if settings.cpus:
        os.sched_setaffinity(0, settings.cpus)
    os.nice(settings.nice)
    if settings.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (settings.memory_bytes, settings.memory_bytes))
    if settings.gpu_memory_fraction is not None and settings.device != "cpu":
        _limit_gpu(settings.gpu_memory_fraction, settings.device)


def _limit_gpu(fraction: float, device: str) -> None:
    import torch

    if torch.cuda.is_available():
        # Without an index torch takes the present device, and does not take `cuda`.
        torch.cuda.set_per_process_memory_fraction(fraction, device if ":" in device else None)


def _keep_output(settings: Settings) -> None:
    """Sends what libraries print to the site's own file; it may name cases."""
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with (settings.run_dir / "worker.log").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _failure(error: Exception) -> dict[str, Any]:
    detail = error.detail if isinstance(error, SiteFailure) else traceback.format_exc()
    return {"failure": int(_code_of(error)), "detail": detail}


def _code_of(error: Exception) -> Code:
    if any(map(_is_out_of_memory, _with_causes(error))):
        return Code.OUT_OF_MEMORY
    if isinstance(error, SiteFailure):
        return error.code
    return Code.DISK_FULL if isinstance(error, OSError) and error.errno == errno.ENOSPC else Code.INTERNAL


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised for: MONAI and our own code wrap what goes wrong in a transform."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY_WORDS)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _frames(header: Mapping[str, Any], tensors: Arrays, path: Path) -> tuple[bytes, bytes]:
    """A message's frames; large tensors are put in a file at `path`, if they are not in one. Raises OSError."""
    if not isinstance(tensors, Mapped) and sum(array.nbytes for array in tensors.values()) > BLOB_THRESHOLD:
        tensors = _in_file(tensors, path)
    if isinstance(tensors, Mapped):
        return json.dumps({**header, _FILE: str(tensors.path)}, default=float).encode(), b""
    return json.dumps(header, default=float).encode(), save(dict(tensors)) if tensors else b""


def _in_file(tensors: Arrays, path: Path) -> Mapped:
    """Tensors in a file that takes the place of the one before; who has mapped that one keeps it."""
    beside = path.with_suffix(".tmp")
    beside.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(beside, tensors, named=False)
    beside.replace(path)
    return map_tensors(path)


def _send(connection: Connection, frames: tuple[bytes, bytes]) -> None:
    for frame in frames:
        connection.send_bytes(frame)


def _receive(connection: Connection) -> tuple[dict[str, Any], Arrays]:
    header, content = json.loads(connection.recv_bytes()), connection.recv_bytes()
    if not isinstance(header, dict):
        raise ValueError("a header is a JSON object")  # noqa: TRY004 - as every other frame that is no message
    if _FILE in header:
        return header, map_tensors(Path(header.pop(_FILE)))
    return header, load(content) if content else {}


# --- at the agent


@dataclass
class Worker:
    """An agent's handle on its worker process; start it by the first call. One call runs at a time, others wait.

    Attributes:
        settings: how the worker runs.
        log: the site's own log, which gets the text of every failure.
    """

    settings: Settings
    log: logging.Logger
    _process: BaseProcess | None = None
    _connection: Connection | None = None
    _plan: Plan | None = field(default=None)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int | None:
        """The process id of the worker, if it runs."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Starts the process if it is not running."""
        if self._process is not None and self._process.is_alive():
            return
        context = process_context()
        ours, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.settings), daemon=True)
        self._process.start()
        theirs.close()
        self._connection, self._plan = ours, None

    def call(
        self, operation: str, plan: Plan, tensors: Arrays | None = None, *, seconds: float | None = None, **request: Any
    ) -> tuple[dict[str, Any], Arrays]:
        """Asks the worker and waits, for so many seconds at most; one that has not answered then is stopped.

        Raises SiteFailure with the worker's code, or WORKER_DIED.
        """
        with self._turn:
            return self._call(plan, {"operation": operation, **request}, tensors or {}, seconds)

    def _call(
        self, plan: Plan, header: dict[str, Any], tensors: Arrays, seconds: float | None
    ) -> tuple[dict[str, Any], Arrays]:
        self.start()
        operation = header["operation"]
        if self._plan is not plan:
            header["plan"] = plan.canonical().decode()
            self._plan = None  # a failure may leave the worker at either plan
        frames = self._frames(header, tensors)
        try:
            reply, arrays = self._exchange(frames, seconds)
        except _NO_MESSAGE as error:
            self.stop()
            self.log.exception("the worker gave no answer to %s", operation)
            raise SiteFailure(Code.WORKER_DIED, operation) from error
        if "failure" in reply:
            self.log.error("%s failed: %s", operation, reply["detail"])
            raise SiteFailure(Code(reply["failure"]), reply["detail"])
        self._plan = plan
        return reply, arrays

    def _frames(self, header: Mapping[str, Any], tensors: Arrays) -> tuple[bytes, bytes]:
        try:
            return _frames(header, tensors, self.settings.run_dir / "from-agent.safetensors")
        except OSError as error:
            raise SiteFailure(Code.DISK_FULL, f"{self.settings.run_dir}: {error.strerror}") from error

    def _exchange(self, frames: tuple[bytes, bytes], seconds: float | None) -> tuple[dict[str, Any], Arrays]:
        connection = self._connection  # another thread may stop the worker meanwhile
        if connection is None:
            raise EOFError
        _send(connection, frames)
        if not connection.poll(seconds):
            raise TimeoutError(f"nothing came within the {seconds} s that were left")
        return _receive(connection)

    def stop(self) -> None:
        """Ends the process and a call that waits for it; safe to call twice, and from another thread."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is not None:
            process.terminate()
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        if connection is not None:
            connection.close()  # last: whoever waits for an answer must see its end, not a closed file
