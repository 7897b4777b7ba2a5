"""`locum site doctor`: is this machine fit, and why does the agent not connect?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from locum.site_client.options import Home, Json

if TYPE_CHECKING:
    from locum.site_client.doctor import Check


def doctor(
    home: Home,
    invitation: Annotated[
        Path | None,
        typer.Argument(metavar="[INVITE]", show_default=False, help="An invitation, before it is used; it stays good."),
    ] = None,
    proxy: Annotated[
        str | None, typer.Option("--proxy", metavar="URL", help="An HTTP proxy to try: http://host:port.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine and at the way to the coordinator; change nothing. Ends with 1 if something failed."""
    from locum.site_client.doctor import examine

    checks: list[Check] = []
    for check in examine(home, invitation, proxy):
        if not as_json:
            _print(check, known={before.remedy for before in checks})
        checks.append(check)
    failed = [check.name for check in checks if check.verdict == "failed"]
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    elif failed:
        typer.echo(f"begin with {failed[0]}: what comes after it may follow from it")
    if failed:
        raise typer.Exit(1)


def _print(check: Check, *, known: set[str]) -> None:
    """The check as it is done, with its remedy unless that was told before."""
    typer.echo(f"{check.verdict:<8} {check.name:<11} {check.found}")
    if check.remedy and check.remedy not in known:
        typer.echo(f"{'next:':>20} {check.remedy}")
