"""`locum site quarantine`: decisions on images in quarantine, where there is no browser."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from locum.site_client.options import Json

if TYPE_CHECKING:
    from locum.site_client.imaging.quarantine import Crop, Held

app = typer.Typer(add_completion=False, help="List what is in quarantine and why; release or reject it.")

_Store = Annotated[Path, typer.Option("--store", metavar="DIR", help="The folder of volumes and catalog.")]
_Unit = Annotated[str, typer.Argument(metavar="ID", show_default=False, help="As the list shows it.")]
_By = Annotated[str, typer.Option("--by", metavar="NAME", help="Who decides; it is recorded.")]


@app.callback(invoke_without_command=True)
def quarantine(
    context: typer.Context,
    store: Annotated[
        Path | None, typer.Option("--store", metavar="DIR", help="The folder of volumes and catalog.")
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Only what is there for this reason.")] = None,
    as_json: Json = False,
) -> None:
    """List what is in quarantine: why, and what to do."""
    if context.invoked_subcommand is not None:
        return
    if store is None:
        raise typer.BadParameter("give the store: --store DIR")
    from locum.site_client.imaging.catalog import Catalog
    from locum.site_client.imaging.quarantine import held

    with closing(Catalog.open(store)) as opened:
        found = held(opened.connection, reason=reason)
    if as_json:
        typer.echo(json.dumps({"held": [one.as_dict() for one in found]}, indent=2))
        return
    for one in found:
        typer.echo(_line(one))
    if not found:
        typer.echo("nothing is in quarantine")
    elif any(one.releasable for one in found):
        typer.echo(f"next: locum site desk --store {store}")
        typer.echo(f"or: locum site quarantine release ID --store {store} --by NAME")


@app.command()
def release(
    unit: _Unit,
    store: _Store,
    by: _By,
    crop: Annotated[
        str | None, typer.Option("--crop", metavar="L,T,W,H", help="Keep this box of each image, in pixels.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let images in from which a person, having looked at them, has found nothing to keep out."""
    _decide(store, ("release", unit, by, _box(crop)), as_json=as_json)


@app.command()
def reject(unit: _Unit, store: _Store, by: _By, as_json: Json = False) -> None:
    """Keep images out, whatever becomes of their files."""
    _decide(store, ("reject", unit, by, None), as_json=as_json)


def _decide(store: Path, wanted: tuple[Literal["release", "reject"], str, str, Crop | None], *, as_json: bool) -> None:
    from locum.site_client.imaging.quarantine import Wish, decide, handle

    decision, unit, by, crop = wanted
    made = decide(store, Wish(unit, decision, by, crop))
    told = {"id": handle(made.unit), "decision": made.decision, "reasons": list(made.reasons), "by": made.by}
    if as_json:
        typer.echo(json.dumps({**told, "at": made.at, "crop": made.crop}, indent=2))
        return
    typer.echo(f"{told['id']}: {made.decision} by {made.by}, {made.at}")
    typer.echo(f"it takes effect with the next: locum site ingest SITE.yaml --store {store}")


def _box(given: str | None) -> Crop | None:
    if given is None:
        return None
    cells = given.split(",")
    if len(cells) != 4 or not all(cell.strip().isdecimal() for cell in cells):
        raise typer.BadParameter("--crop needs four whole numbers: left,top,width,height")
    left, top, width, height = map(int, cells)
    return left, top, width, height


def _line(one: Held) -> str:
    from locum.site_client.review import printable

    about = f" ({printable(one.detail)})" if one.detail else ""
    files = f"{one.files} files, " if one.files > 1 else ""
    waiting = f" [{one.decided}: takes effect at the next ingest]" if one.waiting and one.decided else ""
    return f"{one.handle}  {one.reason}{about}: {files}{printable(one.name)}{waiting}\n    {one.next_step}"
