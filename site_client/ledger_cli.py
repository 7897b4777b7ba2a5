"""`locum site ledger`: what was spent of the patients' privacy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locum.site_client.identity import usable
from locum.site_client.options import Home, Json

if TYPE_CHECKING:
    from pathlib import Path

    from locum.site_client.privacy.projection import Projection


def ledger(
    home: Home,
    explain: Annotated[bool, typer.Option("--explain", help="Say how the number comes about.")] = False,
    digest: Annotated[
        str | None, typer.Option("--plan", metavar="DIGEST", help="Say what a run of a proposed plan would do to it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what was spent of the patients' privacy, by which runs, and what is left; check every row."""
    from locum.site_client.privacy.account import account

    with usable(home):
        found = account(home)
        projected = None if digest is None else _projected(home, digest)
    if as_json:
        told: dict[str, Any] = found.as_dict()
        told |= {"room": found.room(), "explained": list(found.explained())} if explain else {}
        told |= {"projection": _as_dict(projected)} if projected is not None else {}
        typer.echo(json.dumps(told, indent=2))
        return
    sections = [found.words(), found.explained() if explain else (), projected.words() if projected else ()]
    typer.echo("\n\n".join("\n".join(words) for words in sections if words))


def _projected(home: Path, digest: str) -> Projection:
    from locum.common.errors import RunError
    from locum.site_client.approvals import open_approvals
    from locum.site_client.configuration import FILE, read_policy
    from locum.site_client.privacy.projection import projection

    approvals = open_approvals(home, read_policy(home / FILE))
    plan = approvals.held(approvals.find(digest)).plan
    if plan.private is None:
        raise RunError(f"plan {plan.digest[:12]} has no differential privacy", "locum site review says what it tells")
    return projection(home, plan)


def _as_dict(found: Projection) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(found), "left": found.lifetime - found.after}
