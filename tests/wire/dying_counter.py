"""`python -m tests.wire.dying_counter HOME`: an agent that is killed around its answer to a cohort question.

The file `die` in the folder says when: before the answer is in the memory, before it is in the log, before it is sent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from locum.site_client.cohort import memory
from locum.site_client.releases import Releases
from locum.site_client.start import start


def _die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _said(releases: Releases, said: Any, send: Callable[[], Any]) -> Any:
    return _STATEMENT(releases, said, _die)


_STATEMENT = Releases.statement
_MOMENTS: dict[str, Callable[[], None]] = {
    "before the memory": lambda: setattr(memory, "_note", _die),
    "before the log": lambda: setattr(Releases, "statement", _die),
    "before it is sent": lambda: setattr(Releases, "statement", _said),
}


if __name__ == "__main__":
    _MOMENTS[(Path(sys.argv[1]) / "die").read_text()]()
    start(Path(sys.argv[1]))
