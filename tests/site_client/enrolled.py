"""A hospital that enrolled over a real wire, and a coordinator's log key that signs proposals for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from locum.common.envelope import Proposal, seal_proposal
from locum.common.plan import Plan
from locum.server.authority import load_log_key
from locum.site_client.approvals import Approvals, open_approvals
from locum.site_client.gate import Policy
from tests.plans import plan
from tests.server.door import open_door

NOW = 1_800_000_000.0


@dataclass(frozen=True)
class Hospital:
    """An agent's folder, and the other side's key."""

    home: Path
    log_key: Ed25519PrivateKey

    def proposal(self, of: Plan, *, key: Ed25519PrivateKey | None = None, **changes: Any) -> bytes:
        """A proposal as the coordinator sends it, or one with changes."""
        fields = {"digest": of.digest, "plan": of.model_dump(mode="json"), "proposed_at": NOW, "by": "Team A"}
        return seal_proposal(Proposal(**{**fields, **changes}), key or self.log_key)

    def approvals(self, **policy: Any) -> Approvals:
        """The folder's approvals under a policy, opened anew as another process would."""
        return open_approvals(self.home, Policy.model_validate(policy))

    def proposed(self, **changes: Any) -> Plan:
        """A plan that this site has received."""
        of = plan(**changes)
        self.approvals().receive(self.proposal(of))
        return of


def enrol_hospital(folder: Path) -> Hospital:
    """Enrols a site at a coordinator that is then gone."""
    with open_door(folder / "coordinator") as door:
        door.enrol("north")
        return Hospital(door.site_home("north"), load_log_key(door.home))


def copy_of(hospital: Hospital, home: Path) -> Hospital:
    """The same site with a folder of its own."""
    shutil.copytree(hospital.home, home)
    return Hospital(home, hospital.log_key)
