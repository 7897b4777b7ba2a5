"""`locum site enrol`: join a federation with an invitation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from locum.site_client.identity import default_home, usable
from locum.site_client.options import Home, Json


def enrol(
    invitation: Annotated[
        Path, typer.Argument(metavar="INVITE", show_default=False, help="The file that the coordinator sent.")
    ],
    home: Home,
    proxy: Annotated[
        str | None, typer.Option("--proxy", metavar="URL", help="An HTTP proxy on the way: http://host:port.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Join anew; the old identity is kept aside.")] = False,
    as_json: Json = False,
) -> None:
    """Join a federation: the key is made here and stays here, the coordinator certifies it."""
    from locum.site_client.enrolment import enrol as join
    from locum.site_client.starter import write_starter

    with usable(home):
        identity = join(invitation, home, proxy=_checked(proxy), replace=replace)
        begun = write_starter(home, proxy)
    member = identity.membership
    expires = identity.certificate.not_valid_after_utc
    if as_json:
        told = {"site": member.site, "federation": member.federation, "address": member.address}
        typer.echo(json.dumps({**told, "home": str(home), "certificate_expires": expires.isoformat()}, indent=2))
        return
    typer.echo(
        f"{member.site} is a site of {member.federation}; its certificate lasts until {expires:%Y-%m-%d} and renews"
    )
    typer.echo(f"{invitation} is used up: remove it")
    if begun:
        typer.echo(f"{home / 'site.yaml'} is this agent's configuration: name its images and its policy there")
    elif proxy is not None:
        typer.echo(f"write `proxy: {proxy}` into {home / 'site.yaml'}, so that the agent takes the same way")
    typer.echo(f"next: locum site start{'' if home == default_home() else f' --home {home}'}")


def _checked(proxy: str | None) -> str | None:
    from locum.site_client.configuration import checked_proxy

    try:
        return None if proxy is None else checked_proxy(proxy)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--proxy") from error
