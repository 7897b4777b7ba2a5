"""A supervised process ends with its supervisor, also when that is killed (Linux: prctl PR_SET_PDEATHSIG).

The supervisor tells its number in the environment: in a container it is 1, as is that of whoever inherits an orphan.
"""

from __future__ import annotations

import ctypes
import os
import signal

#: Under this name a child finds the number of the process that started it.
PARENT = "LOCUM_SUPERVISOR"
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Asks the kernel to end this process when its parent has ended; elsewhere than on Linux this does nothing."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return
    parent = os.environ.get(PARENT)
    if parent is not None and os.getppid() != int(parent):  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)
