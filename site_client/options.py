"""Options that several commands of `locum site` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from locum.site_client.identity import default_home

Home = Annotated[
    Path,
    typer.Option(
        "--home",
        metavar="DIR",
        default_factory=default_home,
        show_default="$LOCUM_SITE_HOME or ./locum-site",
        help="The agent's folder.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
