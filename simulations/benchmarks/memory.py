"""What a call costs in memory, in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def alone(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of a module finds in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *args, **kwargs).result()


def above(call: Callable[[], object]) -> float:
    """The most memory that this process has during a call, above what it has before, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is set to what there is now (proc(5))
    before = most()
    call()
    return most() - before


def most() -> float:
    """The most memory that this process has had, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
