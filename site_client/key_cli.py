"""`locum site key`: show the site's secret keys, share them out, restore them, renew them. No key is ever printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from locum.common.errors import DataError, RunError
from locum.site_client.options import Json

if TYPE_CHECKING:
    from locum.site_client.imaging.keys import KeyRing

key_app = typer.Typer(
    help="The site's secret keys: fingerprint, shares for safe-keeping, renewal.", no_args_is_help=True
)

_Store = Annotated[Path | None, typer.Option("--store", metavar="DIR", help="The store in which the key is split.key.")]
_KeyFile = Annotated[Path | None, typer.Option("--key-file", metavar="FILE", help="The key file, if not in the store.")]


@key_app.command()
def show(store: _Store = None, key_file: _KeyFile = None, as_json: Json = False) -> None:
    """Show fingerprints and ages of the keys; by them stores and shares are recognised."""
    from locum.site_client.imaging.keys import Keys, load_ring

    path = _path(store, key_file)
    ring = load_ring(path)
    names = [
        {"fingerprint": Keys(key, ring.folds).fingerprint, "drawn": drawn or "unknown"}
        for key, drawn in zip(ring.names, ring.drawn, strict=True)
    ]
    if as_json:
        typer.echo(json.dumps({"file": str(path), "ring": ring.fingerprint, "names": names}, indent=2))
        return
    typer.echo(f"key ring {ring.fingerprint} in {path}")
    for number, name in enumerate(names, 1):
        use = "in use" if number == len(names) else "earlier"
        typer.echo(f"names, key {number}: {name['fingerprint']}, drawn {name['drawn']}, {use}")
    if len(names) == 1:
        typer.echo("next: locum site key escrow --into DIR, unless shares of it are kept already")


@key_app.command()
def escrow(
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Where the share files are written.")],
    needed: Annotated[int, typer.Option("--needed", help="How many shares restore the key.")] = 2,
    holders: Annotated[int, typer.Option("--holders", help="How many shares there are.")] = 3,
    store: _Store = None,
    key_file: _KeyFile = None,
    as_json: Json = False,
) -> None:
    """Write shares of the keys, one for each holder; fewer than --needed tell nothing."""
    from locum.site_client.imaging.escrow import shares_of, write_shares
    from locum.site_client.imaging.keys import load_ring

    ring = load_ring(_path(store, key_file))
    paths = write_shares(shares_of(ring, needed, holders), into)
    told = {"ring": ring.fingerprint, "needed": needed, "files": [str(path) for path in paths]}
    _tell(told, [*map(str, paths), f"any {needed} of {holders} restore the key ring {ring.fingerprint}",
                 "next: give each to another person, and delete them here"], as_json=as_json)  # fmt: skip


@key_app.command()
def restore(
    shares: Annotated[list[Path], typer.Argument(metavar="SHARE...", show_default=False, help="The share files.")],
    store: _Store = None,
    key_file: _KeyFile = None,
    as_json: Json = False,
) -> None:
    """Write the key file again from shares; one that is there is never overwritten."""
    from locum.site_client.imaging.escrow import read_share, restored
    from locum.site_client.imaging.keys import create_ring

    path = _path(store, key_file)
    ring = restored([read_share(share) for share in shares])
    try:
        create_ring(path, ring)
    except FileExistsError:
        raise DataError(f"the key file {path} is there already", "move it away, or restore to another place") from None
    except OSError as error:
        raise RunError(f"the key file {path} cannot be written: {error.strerror}", "name another place") from None
    _tell({"ring": ring.fingerprint, "file": str(path)}, [f"key ring {ring.fingerprint} is in {path} again"],
          as_json=as_json)  # fmt: skip


@key_app.command()
def rotate(
    store: _Store = None,
    key_file: _KeyFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Draw a new key for names: pseudonyms, UIDs and shifts of dates are others from then on; folds stay."""
    from locum.site_client.imaging.keys import load_ring, replace_ring

    path = _path(store, key_file)
    ring = load_ring(path)
    if as_json and not yes:
        raise typer.BadParameter("--json asks no question: add --yes")
    if not yes:
        typer.echo("Every store that was made with this key must be ingested anew, under new pseudonyms; folds stay.")
        typer.confirm("Draw a new key?", abort=True)
    renewed = ring.rotated()
    try:
        replace_ring(path, renewed)
    except OSError as error:
        raise RunError(
            f"the key file {path} cannot be written: {error.strerror}", "the old key is still in use; mend that"
        ) from None
    _tell({"ring": renewed.fingerprint, "fingerprint": renewed.keys.fingerprint, "file": str(path)},
          _after_rotation(renewed, path), as_json=as_json)  # fmt: skip


def _after_rotation(ring: KeyRing, path: Path) -> list[str]:
    return [
        f"names are made with key {len(ring.names)} now: {ring.keys.fingerprint}",
        "the stores of the earlier key take no ingest any more; they can still be read",
        f"next: locum site ingest site.yaml --store NEW-STORE --key-file {path}",
        "next: then delete the old store, cleaned files that were exported from it, and the shares of the old ring",
        "next: locum site key escrow --into DIR",
    ]


def _path(store: Path | None, key_file: Path | None) -> Path:
    if key_file is not None:
        return key_file
    if store is None:
        raise typer.BadParameter("say where the key is: --store DIR or --key-file FILE")
    return store / "split.key"


def _tell(told: dict[str, Any], lines: list[str], *, as_json: bool) -> None:
    typer.echo(json.dumps(told, indent=2) if as_json else "\n".join(lines))
