"""Whose log it is, and who signs: the names that stand in checkpoints (C2SP tlog-checkpoint: an origin is unique).

A federation's name may hold spaces, and no name of a key may: they are written as in an address (RFC 3986, 2.1).
"""

from __future__ import annotations

from urllib.parse import quote


def federation_origin(federation: str) -> str:
    """The federation's log; the log key signs under the same name."""
    return f"locum.{quote(federation, safe='')}/log"


def site_origin(federation: str, site: str) -> str:
    """A site: the log of what it released, and the name under which it signs that one and cosigns the federation's."""
    return f"locum.{quote(federation, safe='')}/sites/{site}"
