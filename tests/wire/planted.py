"""`python -m tests.wire.planted HOME BEHAVIOUR NAME`: a real agent whose worker does harm, with a patient's name in it.

The agent is the one that people start. In its server of workers, the operations of a worker are wrapped:

talks     works, and says the name on its output, in keys, in the names of metrics and of a tensor beside them
fails     an exception with the name; then a full disk, in a file of that name; then a tensor of that name
dies      says the name and is gone
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_BEHAVIOUR, _NAME = "TESTS_PLANTED_BEHAVIOUR", "TESTS_PLANTED_NAME"


def _talks(operation: str, told: dict[str, Any], arrays: dict[str, Any], _: int) -> tuple[dict[str, Any], Any]:
    name = os.environ[_NAME]
    sys.stdout.write(name + "\n")
    sys.stdout.flush()
    warnings.warn(name, stacklevel=1)
    logging.getLogger("flwr").error(name)
    sys.stderr.write(name + "\n")
    sys.stderr.flush()
    beside = {name: np.ones(3)} if operation == "evaluate" else {}
    return {**told, name: name, "comment": name}, {**arrays, **beside}


def _fails(operation: str, told: dict[str, Any], arrays: dict[str, Any], number: int) -> tuple[dict[str, Any], Any]:
    name = os.environ[_NAME]
    if operation == "evaluate" or number == 1:
        raise RuntimeError(f"the image of {name} cannot be transformed")
    if number == 2:
        raise OSError(errno.ENOSPC, "No space left on device", f"/data/{name}.npy")
    return told, {**arrays, name: np.ones(3, np.float32)}


def _dies(*_: Any) -> Any:
    sys.stderr.write(os.environ[_NAME] + "\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


_BEHAVIOURS = {"talks": _talks, "fails": _fails, "dies": _dies}


def plant() -> None:
    """Wraps the operations that use images."""
    from locum.site_client import operations

    def wrapped(operation: str) -> Any:
        whole, spoil = operations.OPERATIONS[operation], _BEHAVIOURS[os.environ[_BEHAVIOUR]]

        def asked(session: Any, request: Mapping[str, Any], tensors: Any) -> tuple[dict[str, Any], Any]:
            told, arrays = whole(session, request, tensors)
            return spoil(operation, told, dict(arrays), request["round"])

        return asked

    for operation in ("train", "evaluate"):
        operations.OPERATIONS[operation] = wrapped(operation)


if __name__ == "__main__":
    os.environ[_BEHAVIOUR], os.environ[_NAME] = sys.argv[2:]
    from locum.site_client import start, worker

    worker._PRELOADED = (*worker._PRELOADED, "tests.wire.planted")
    start.start(Path(sys.argv[1]).absolute())
elif os.environ.get(_BEHAVIOUR):
    plant()
