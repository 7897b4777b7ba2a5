"""The record of a run as one page to print: `locum audit show --out`. It needs no other file, and loads nothing.

Rules:
  * The verdict of the checks stands on top. A record that does not hold is told all the same, and called so.
  * All text is escaped by the template: names, stewards and reasons come from others.
  * What the page cannot show is said on it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from locum.common.audit import tell
from locum.common.audit.story import Site, Story
from locum.common.audit.words import reason
from locum.server import report_words as words
from locum.server.templates import html

_PAGE = "locum.server/audit.html.j2"


def page(story: Story) -> bytes:
    """The page, HTML."""
    return html(_PAGE, _context(story))


def _context(story: Story) -> dict[str, Any]:
    plan = story.plan
    members = [site for _, site in sorted(story.sites.items())]
    return {
        "story": story,
        "verdict": story.told,
        "plan": plan,
        "plan_words": words.plan_words(plan) if plan else {},
        "plan_yaml": story.plan_text,
        "private": plan.private if plan else None,
        "members": members,
        "budgets": _budgets(story, members),
        "silent": [site.name for site in members if not any(said.site == site.name for said in story.decisions)],
        "limits": tell.LIMITS,
        "time": tell.time_of,
        "number": tell.number,
        "reason": reason,
        "say": words,
        "written": datetime.now(UTC),
    }


def _budgets(story: Story, members: list[Site]) -> list[dict[str, Any]]:
    """By site and purpose, what was spent of what the plan allows."""
    private = story.plan.private if story.plan else None
    if private is None:
        return []
    return [
        {"site": site.name, "purpose": purpose, "spent": spent, "delta": delta,
         "most": private.epsilon if purpose == "train" else private.metrics_epsilon or 0.0}
        for site in members
        for purpose, (spent, delta) in sorted(site.spent.items())
    ]  # fmt: skip
