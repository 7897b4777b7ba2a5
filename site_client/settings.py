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
        device: `cpu`, `cuda`, or `auto` for the GPU where there is one.
    """

    site: str
    stores: tuple[Path, ...]
    run_dir: Path
    threads: int = 1
    cache_bytes: int = 2 << 30
    device: str = "auto"
