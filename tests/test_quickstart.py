"""The script of the documents goes from nothing to a finished run, and leaves nothing behind but its folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from safetensors.numpy import load_file

from tests.wire.federation import free_port, until

SECONDS = 900


def test_the_quickstart_ends_with_a_model_of_three_rounds_over_three_hospitals(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    done = subprocess.run(
        ["bash", str(project / "docs" / "quickstart.sh"), str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PORT": str(free_port())},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((folder / "result" / "metrics.json").read_text())
    assert (metrics["status"], metrics["round"], metrics["rounds"]) == ("completed", 3, 3)
    assert metrics["sites"] == ["north", "riverside", "st-anne"]
    assert all(len(record["secured"]["uploads"]) == 3 for record in metrics["history"])
    assert metrics["test"]["federated"]["per_site"] == {}
    assert load_file(folder / "result" / "model.safetensors")
    assert {path.name for path in (folder / "result").iterdir()} >= {"report.html", "model_card.md", "plan.yaml"}
    assert re.search(r'^\d+ s from "locum server init" to the result', done.stdout, re.MULTILINE)
    until(lambda: not _living(folder), what="processes of the quickstart live on")


def _living(folder: Path) -> list[str]:
    """The processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            place = (process / "cwd").readlink()
        except OSError:
            continue
        if place.is_relative_to(folder):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found
