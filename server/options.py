"""Options that several of the coordinator's commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locum.server.home import default_home

HomeDir = Annotated[
    Path,
    typer.Option(
        "--home",
        metavar="DIR",
        default_factory=default_home,
        show_default="$LOCUM_SERVER_HOME or ./locum-server",
        help="The coordinator's folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
