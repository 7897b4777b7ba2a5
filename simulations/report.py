"""The report of a simulation (first form)."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locum.common.durable import replace_file
from locum.common.plan import Plan
from locum.server.records import RunSummary
from locum.simulations.report_pictures import Picture, pictures_of
from locum.site_client.imaging.catalog import Counts

__all__ = ["Picture", "pictures_of", "write"]


def write(
    folder: Path,
    plan: Plan,
    *,
    summary: RunSummary,
    metrics: Mapping[str, Any],
    counts: Mapping[str, Counts],
    pictures: list[Picture],
) -> None:
    """Writes `report.html` and `model_card.md` into the run's folder; raises OSError."""
    text = f"<!doctype html><title>{plan.name}</title><pre>{html.escape(json.dumps(metrics, indent=1))}</pre>"
    replace_file(folder / "report.html", text.encode())
    replace_file(folder / "model_card.md", f"# {plan.name}\n".encode())
