"""A page of what the sites told to a question, with a bar for each number; it needs no network."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from locum.server.cohort import Result, named
from locum.server.templates import html


def page(found: Result) -> bytes:
    """The page, HTML in one file."""
    return html(
        "locum.server/cohort.html.j2",
        {
            "name": found.query.name,
            "study": found.query.study,
            "purpose": found.query.purpose,
            "by": found.question.by,
            "at": f"{datetime.fromtimestamp(found.question.asked_at, UTC):%Y-%m-%d %H:%M} UTC",
            "digest": found.question.digest,
            "sites": sorted(found.answers),
            "refused": sorted(found.refused.items()),
            "silent": found.silent,
            "tables": [_table(found, place) for place in range(len(found.query.tables))],
        },
    )


def _table(found: Result, place: int) -> dict[str, Any]:
    table, cells = found.query.tables[place], found.cells(place)
    largest = max((cell.least for cell in cells), default=0) or 1
    rows = [
        {
            "key": cell.key,
            "least": cell.least,
            "missing": sum(number is None for number in cell.sites.values()),
            "width": round(100 * cell.least / largest, 1),
            "sites": [cell.sites[site] for site in sorted(found.answers)],
        }
        for cell in cells
    ]
    return {"title": named(table), "by": [each.by for each in table.dimensions], "rows": rows}
