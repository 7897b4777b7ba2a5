"""Statements of readiness of sites whose data are made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from locum.common.envelope import CLAUSES, Readiness, seal_readiness
from locum.common.identity import utc_now
from locum.common.plan import Plan
from locum.site_client.gate import Ready


def ready(
    of: Plan, site: str, key: ec.EllipticCurvePrivateKey, run: str | None, failing: Sequence[str] = (), /, **lies: Any
) -> Ready:
    """What a site says of its data, signed; `failing` are clauses that they do not meet."""
    fields = {
        "site": site, "run": run, "plan": of.digest, "at": utc_now().timestamp(), "step": 10,
        "clauses": {name: name not in failing for name in CLAUSES}, "ready": not failing,
        "patients": None if failing else 40, **lies,
    }  # fmt: skip
    said = Readiness(**fields)
    return Ready(said, seal_readiness(said, key).decode())
