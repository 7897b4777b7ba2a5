"""`locum readiness`: what the sites say of their data for a plan, before a run and in runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from locum.server.home import Home, read_config
from locum.server.options import HomeDir, Json

if TYPE_CHECKING:
    from locum.common.envelope import Readiness

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def readiness(
    digest: Annotated[
        str, typer.Argument(metavar="DIGEST", show_default=False, help="The plan's digest, or its first 6 digits.")
    ],
    home: HomeDir,
    as_json: Json = False,
) -> None:
    """Show which sites' data meet a plan's contract, which clause fails where, and of whom the data are."""
    folder = Home(home)
    read_config(folder)  # who has no coordinator here should hear that first
    whole, found, silent = _said(folder, digest)
    if as_json:
        told = {said.site: said.model_dump(mode="json") for said in found}
        typer.echo(json.dumps({"plan": whole, "sites": told, "silent": list(silent)}, indent=2))
        return
    typer.echo(f"plan {whole}")
    for said in found:
        for line in lines(said):
            typer.echo(line)
    if silent:
        typer.echo(f"nothing was said by: {', '.join(silent)}")


def _said(home: Home, digest: str) -> tuple[str, list[Readiness], tuple[str, ...]]:
    """The plan's whole digest, each site's newest statement, and the sites that made none."""
    from locum.server.readiness import newest
    from locum.server.registry import Registry

    with closing(Registry(home.registry)) as registry:
        whole, _ = registry.proposal(digest)
        sites = [site for site in registry.sites() if site.revoked_at is None]
        found = newest(home, registry, whole)
    return whole, [found[name] for name in sorted(found)], tuple(s.name for s in sites if s.name not in found)


def lines(said: Readiness) -> Iterator[str]:
    """A statement for a terminal: the verdict, and what is told of the patients."""
    when = f"{datetime.fromtimestamp(said.at, UTC):%Y-%m-%d %H:%M} UTC"
    where = f"in {said.run}" if said.run else "before any run"
    verdict = "ready" if said.ready else f"NOT ready: {', '.join(said.failing)}"
    yield f"{said.site}  {verdict}  ({when}, {where})"
    if said.patients is not None:
        yield f"  training patients: {said.patients} or more"
    for by, cells in said.strata.items():
        if cells:
            yield f"  {by}: " + ", ".join(f"{value} {count} or more" for value, count in cells.items())
    if said.profile:
        yield f"  cleaned by: {said.profile}"
    if said.withdrawn is not None:
        yield f"  consent withdrawn: {said.withdrawn} or more patients, left out"
