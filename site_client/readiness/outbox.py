"""Statements of readiness that a steward let go, for the agent to hand over: a file a plan.

What is here may leave; the agent writes it into the site's own log first, as all that leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from locum.common.durable import replace_file

FOLDER = "readiness"


def let_go(home: Path, digest: str, envelope: bytes) -> Path:
    """Puts the newest statement on a plan where the agent finds it; raises OSError."""
    folder = home / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{digest}.json"
    replace_file(path, envelope)
    return path


def statements(home: Path) -> Iterator[bytes]:
    """What was let go, a statement a plan; raises OSError."""
    for path in sorted((home / FOLDER).glob("*.json")):
        yield path.read_bytes()
