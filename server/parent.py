"""A supervised process ends with its supervisor, also when that is killed (Linux: prctl PR_SET_PDEATHSIG)."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Asks the kernel to end this process when its parent has ended; elsewhere than on Linux this does nothing."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except (OSError, AttributeError):
        return
    if os.getppid() == 1:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)
