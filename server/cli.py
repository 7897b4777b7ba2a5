"""`locum server`: stand up the coordinator, invite hospitals, see who is in, show somebody out.

Errors with a remedy are printed by the `locum` command; nothing here catches them.
"""

from __future__ import annotations

import json
import re
import socket
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from locum.common.errors import DataError, RunError
from locum.server.home import Home, ServerConfig, default_home, read_config
from locum.server.log_cli import show_log
from locum.server.options import HomeDir, Json
from locum.server.start_cli import start, status

if TYPE_CHECKING:
    from locum.common.log.entries import SiteEntry
    from locum.server.registry import Registry, SiteRow

app = typer.Typer(
    help="The coordinator: begin a federation, invite sites, list them, revoke them.",
    no_args_is_help=True,
    add_completion=False,
)

_Name = Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="The site's name.")]

#: The loopback's ports when nobody else has them.
_SUPERLINK_PORT, _HINTS_PORT = 9091, 9092


@app.command()
def init(
    home: HomeDir,
    name: Annotated[str, typer.Option("--name", help="The federation's name.", show_default=False)],
    host: Annotated[
        str, typer.Option("--host", help="The name or address under which hospitals reach it.", show_default=False)
    ],
    port: Annotated[int, typer.Option("--port", help="The one port that hospitals need.")] = 8443,
    listen: Annotated[str, typer.Option("--listen", help="The address to bind.")] = "0.0.0.0",  # noqa: S104 - hospitals must reach it
    certificate_days: Annotated[float, typer.Option("--certificate-days", help="How long a site is certified.")] = 90,
    as_json: Json = False,
) -> None:
    """Begin a federation: its authority, the gateway's certificate, the log's key, the configuration."""
    from locum.server.authority import initialise
    from locum.server.invitations import gateway_address
    from locum.server.log import open_log

    superlink = _free_port(_SUPERLINK_PORT, but={port})
    fields = {
        "name": name,
        "host": _host(host),
        "port": port,
        "listen": listen,
        "superlink_port": superlink,
        "hints_port": _free_port(_HINTS_PORT, but={port, superlink}),
        "certificate_days": certificate_days,
    }
    config = _config(fields)
    initialise(Home(home), config)
    open_log(Home(home)).seal()
    if as_json:
        _tell({"home": str(home), "address": gateway_address(config), **config.model_dump()})
        return
    typer.echo(f"the federation {name} is ready in {home}; hospitals will connect to {gateway_address(config)}")
    typer.echo(f"next: locum server invite NAME{_at(home)}    for each hospital")
    typer.echo(f"      locum server start{_at(home)}")


app.command()(start)
app.command()(status)
app.command("log")(show_log)


@app.command()
def invite(
    name: _Name,
    home: HomeDir,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", show_default="NAME.invitation.json", help="Where the invitation goes."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Invite a hospital: one file, for this name, good once and for 24 hours."""
    from locum.server.authority import load_authority
    from locum.server.invitations import invite as write
    from locum.server.invitations import make_invitation

    config = read_config(Home(home))
    path = out or Path(f"{name}.invitation.json")
    invitation = make_invitation(load_authority(Home(home), config), config, name)
    with closing(_registry(home)) as registry:
        write(registry, invitation, path)
    if as_json:
        expires = invitation.expires.isoformat()
        _tell({"site": name, "invitation": str(path), "address": invitation.address, "expires": expires})
        return
    typer.echo(f"{path} invites {name}, once, until {_minute(invitation.expires)}")
    typer.echo("it holds a secret: hand it over in a way that you trust")
    typer.echo(f"next, at the hospital: locum site enrol {path.name}")


@app.command()
def sites(home: HomeDir, as_json: Json = False) -> None:
    """List the sites that are enrolled, were revoked, or are invited."""
    read_config(Home(home))
    with closing(_registry(home)) as registry:
        rows = [_described(site) for site in registry.sites()]
        invited = [{"name": row.name, "expires": row.expires.isoformat()} for row in registry.open_invitations()]
    if as_json:
        _tell({"sites": rows, "invitations": invited})
        return
    if not rows and not invited:
        typer.echo("no site was invited yet")
        typer.echo(f"next: locum server invite NAME{_at(home)}")
        return
    _print_sites(rows, invited)


@app.command()
def revoke(name: _Name, home: HomeDir, as_json: Json = False) -> None:
    """Show a site out, at once: its certificates and open invitations end. It can be invited again."""
    from locum.server.log import open_log

    read_config(Home(home))
    with closing(_registry(home)) as registry:
        known = {site.name for site in registry.sites()} | {row.name for row in registry.open_invitations()}
        if name not in known:
            raise RunError(f"no site is called '{name}'", "see who is there: locum server sites")
        log = open_log(Home(home))
        changed = registry.revoke(name, noted=lambda site: log.append(_revoked(site)))
        log.seal()
    if as_json:
        _tell({"site": name, "revoked": True, "changed": changed})
        return
    typer.echo(f"{name} is revoked" if changed else f"{name} was revoked before")
    typer.echo(f"to let it in again with a new key: locum server invite {name}{_at(home)}")


def _revoked(site: SiteRow) -> SiteEntry:
    from locum.common.identity import fingerprint_of
    from locum.common.log.entries import SiteEntry
    from locum.server.log import now

    return SiteEntry(at=now(), site=site.name, event="revoked", certificate=fingerprint_of(site.certificate))


def _registry(home: Path) -> Registry:
    from locum.server.registry import Registry

    return Registry(Home(home).registry)


def _config(fields: dict[str, Any]) -> ServerConfig:
    try:
        return ServerConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise DataError(f"--{option} {first['input']}: {first['msg']}", "see locum server init --help") from error


def _host(host: str) -> str:
    from locum.common.identity import ADDRESS

    bare = host.strip("[]")
    if re.fullmatch(ADDRESS.strip("^$"), f"[{bare}]:1" if ":" in bare else f"{bare}:1") is None:
        raise DataError(f"'{host}' is no name or address of a machine", "give --host without a port or https://")
    return bare


def _free_port(wanted: int, *, but: set[int]) -> int:
    """`wanted` if nobody listens there on loopback, else a port that is free now."""
    for port in (wanted, 0, 0, 0):
        found = _bound(port)
        if found is not None and found not in but:
            return found
    raise RunError("no loopback port is free", "end what holds them")


def _bound(port: int) -> int | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def _described(site: SiteRow) -> dict[str, Any]:
    return {
        "name": site.name,
        "state": _state(site),
        "enrolled_at": site.enrolled_at.isoformat(),
        "certificate_expires": site.expires.isoformat(),
        "revoked_at": site.revoked_at.isoformat() if site.revoked_at else None,
        "node_id": site.node_id,
    }


def _state(site: SiteRow) -> str:
    from locum.common.identity import utc_now

    if site.revoked_at is not None:
        return "revoked"
    return "certificate expired" if site.expires <= utc_now() else "enrolled"


def _print_sites(rows: list[dict[str, Any]], invited: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("site", "state", "since", "until")
    for row in rows:
        since = row["revoked_at"] or row["enrolled_at"]
        until = "" if row["revoked_at"] else _minute(datetime.fromisoformat(row["certificate_expires"]))
        table.add_row(row["name"], row["state"], _minute(datetime.fromisoformat(since)), until)
    for row in invited:
        table.add_row(row["name"], "invited", "", _minute(datetime.fromisoformat(row["expires"])))
    Console().print(table)


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _at(home: Path) -> str:
    """What a next command needs to find the same folder."""
    return "" if home == default_home() else f" --home {home}"


def _tell(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))
