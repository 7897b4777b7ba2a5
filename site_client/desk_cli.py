"""`locum site desk`: the site's own pages."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer


def desk(
    store: Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder of volumes and catalog.")],
    site: Annotated[
        Path | None, typer.Option("--site", metavar="SITE.yaml", help="The site file that ingest reads, for hints.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port at 127.0.0.1; any unless given.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the link, and open no browser.")] = False,
) -> None:
    """Show quarantine, cases and readiness on pages that only this machine can open."""
    from locum.site_client.desk.serve import Opening, browser_page, serve

    opening = Opening(store, str(site or "SITE.yaml"), _person(), port)
    with browser_page() as show:

        def tell(link: str) -> None:
            typer.echo(f"the desk is open, for whoever has this link first: {link}")
            typer.echo("end it with Ctrl-C")
            if not no_browser:
                show(link)

        serve(opening, tell)


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
