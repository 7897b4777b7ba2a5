"""`locum server log`: how long the federation's log is, and which sites have witnessed it."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import typer

from locum.server.home import Home, read_config
from locum.server.options import HomeDir, Json


def show_log(
    home: HomeDir,
    as_json: Json = False,
) -> None:
    """Show the log's size, root and last checkpoint, and up to where each site has witnessed it."""
    found = _looked_at(Home(home))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"log: {found['origin']}")
    typer.echo(f"entries: {found['size']}")
    typer.echo(f"root: {found['root']}")
    typer.echo(f"last checkpoint: {found['checkpoint']} entries")
    for name, row in found["witnesses"].items():
        typer.echo(f"{name}: {_in_words(row)}")
    if not found["witnesses"]:
        typer.echo("no site is enrolled, so nobody witnesses it: locum server invite NAME")


def _in_words(row: dict[str, int]) -> str:
    if not row["size"]:
        return "has not witnessed anything yet"
    behind = f", {row['behind']} behind the last checkpoint" if row["behind"] else ""
    return f"has witnessed {row['size']} entries{behind}"


def _looked_at(home: Home) -> dict[str, Any]:
    from locum.common.log.origins import site_origin
    from locum.server.log import open_log
    from locum.server.registry import Registry

    read_config(home)
    log = open_log(home)
    with closing(Registry(home.registry)) as registry:
        sites = [site.name for site in registry.sites() if site.revoked_at is None]
    seen, sealed = log.witnesses(), log.sealed()
    sizes = {site: seen.get(site_origin(log.federation, site), 0) for site in sites}
    return {
        "origin": log.store.origin,
        "size": log.store.size,
        "root": log.store.root().hex(),
        "checkpoint": sealed,
        "witnesses": {site: {"size": size, "behind": max(0, sealed - size)} for site, size in sizes.items()},
    }
