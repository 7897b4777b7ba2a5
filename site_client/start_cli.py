"""`locum site start`: the agent."""

from __future__ import annotations

from locum.site_client.identity import usable
from locum.site_client.options import Home


def start(
    home: Home,
) -> None:
    """Run the agent until Ctrl-C or SIGTERM: it connects out, and waits for plans that this site has approved."""
    from locum.site_client.start import start as run

    with usable(home):
        run(home.absolute())
