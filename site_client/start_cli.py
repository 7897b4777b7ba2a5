"""`locum site start`: the agent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locum.site_client.identity import default_home, usable


def start(
    home: Annotated[
        Path,
        typer.Option(
            "--home",
            metavar="DIR",
            default_factory=default_home,
            show_default="$LOCUM_SITE_HOME or ./locum-site",
            help="The agent's folder.",
        ),
    ],
) -> None:
    """Run the agent until Ctrl-C or SIGTERM: it connects out, and waits for plans that this site has approved."""
    from locum.site_client.start import start as run

    with usable(home):
        run(home.absolute())
