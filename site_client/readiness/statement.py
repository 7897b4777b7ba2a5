"""What a site signs about its data: measured anew against the catalog as it is, and made by the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from locum.common.envelope import seal_readiness
from locum.common.errors import Code, DataError, SiteFailure
from locum.common.plan import Plan
from locum.site_client import gate
from locum.site_client.gate import Policy, Ready
from locum.site_client.privacy.budget import Signer
from locum.site_client.readiness.clauses import Measured, measure


@dataclass(frozen=True)
class Steward:
    """Says whether a site's data meet a plan's contract.

    Attributes:
        stores: folders of catalogs.
        policy: what the site allows.
        signer: who signs; renewal and enrolment replace the key.
        now: the time.
    """

    stores: tuple[Path, ...]
    policy: Policy
    signer: Callable[[], Signer]
    now: Callable[[], datetime]

    def ready(self, plan: Plan, run: str | None) -> Ready:
        """The statement for a run, measured now and signed; raises SiteFailure (DATA_UNREADABLE)."""
        try:
            return self.said(plan, self.measured(plan), run)
        except DataError as error:
            raise SiteFailure(Code.DATA_UNREADABLE, str(error)) from error

    def measured(self, plan: Plan) -> Measured:
        """What there is, exactly: for the steward; raises DataError."""
        return measure(self.stores, plan, least_cell=self.policy.least_cell)

    def said(self, plan: Plan, measured: Measured, run: str | None = None) -> Ready:
        """What may be said of it, signed."""
        signer = self.signer()
        found = gate.readiness(self.policy, plan, measured, site=signer.site, run=run, at=self.now().timestamp())
        return Ready(found, seal_readiness(found, signer.key).decode())
