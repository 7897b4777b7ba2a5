"""How a worker runs; a module of its own, because an agent must not load torch to start one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """How a worker runs.

    Attributes:
        site: the site's name, part of every seed.
        stores: folders of catalogs, usually one.
        run_dir: where local tensors are kept between rounds.
        threads: CPU threads of torch.
        cache_bytes: memory for prepared cases, of all folds together.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for the GPU where there is one.
        cpus: the CPUs that the worker may use; empty for all that the agent may.
        memory_bytes: the most memory for data (RLIMIT_DATA), the 0.6 GiB of the libraries included; None for no limit.
        nice: how much the worker steps back for other programs, from 0 to 19.
        gpu_memory_fraction: the share of the GPU's memory that the worker may take; None for all of it.
    """

    site: str
    stores: tuple[Path, ...]
    run_dir: Path
    threads: int = 1
    cache_bytes: int = 2 << 30
    device: str = "auto"
    cpus: tuple[int, ...] = ()
    memory_bytes: int | None = None
    nice: int = 0
    gpu_memory_fraction: float | None = None
