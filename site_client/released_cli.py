"""`locum site released`: what left this site."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from locum.site_client.identity import usable
from locum.site_client.options import Home, Json

if TYPE_CHECKING:
    from locum.site_client.released import Account, Released


def released(
    home: Home,
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", show_default=False, help="What left for a run.")] = None,
    since: Annotated[
        datetime | None,
        typer.Option("--since", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M"], help="What left since a day or time, UTC."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List reports of what the agent does, and cosignatures, too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what left this site, each answer, decision and request, after the site's own log was checked."""
    from locum.site_client.released import account

    with usable(home):
        found = account(home)
        every = list(found.releases(run, f"{since:%Y-%m-%dT%H:%M:%SZ}" if since else ""))
    if as_json:
        typer.echo(json.dumps(_as_dict(found, every), indent=2))
        return
    for one in every:
        if everything or not one.is_routine:
            typer.echo(_line(one))
    typer.echo(_summary(found, every, hidden=not everything))


def _as_dict(found: Account, every: Sequence[Released]) -> dict[str, object]:
    checkpoint = found.checkpoint
    log = {"origin": checkpoint.origin, "entries": checkpoint.size, "root": checkpoint.root.hex()}
    return {"log": log, "releases": [one.as_dict() for one in every]}


def _line(one: Released) -> str:
    """Time, what for, size, the first digits of the digest, and what was spent or refused."""
    entry = one.entry
    about = f"{entry.purpose:<18} {_about(one):<34} {_size(entry.bytes):>9}  {(entry.tensors or entry.sha256)[:16]}"
    spent = f"  epsilon {entry.epsilon:.3g} at delta {entry.delta:.1g}" if entry.epsilon is not None else ""
    failed = f"  {entry.code}{f' ({one.clause})' if one.clause else ''}" if entry.code else ""
    return f"{entry.at[:16].replace('T', ' ')}  {about}{spent}{failed}"


def _about(one: Released) -> str:
    entry = one.entry
    if entry.run is None:
        return ""
    return entry.run if not entry.round else f"round {entry.round} of {entry.run}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _summary(found: Account, every: Sequence[Released], *, hidden: bool) -> str:
    told = [one for one in every if not one.is_routine]
    routine = len(every) - len(told)
    more = f"; {routine} reports and cosignatures{' (--all)' if hidden and routine else ''}"
    size, root = found.checkpoint.size, found.checkpoint.root.hex()[:16]
    checked = f"the site's own log was checked: {size} entries, root {root}"
    return f"{len(told)} releases, {_size(sum(one.entry.bytes for one in told))}{more}\n{checked}"
