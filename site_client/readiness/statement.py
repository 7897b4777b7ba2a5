"""What a site signs about its data: measured anew against the catalog as it is, and made by the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec

from locum.common.envelope import seal_readiness
from locum.common.errors import Code, DataError, SiteFailure
from locum.common.identity import is_site_name, utc_now
from locum.common.plan import Plan
from locum.site_client import gate
from locum.site_client.configuration import FILE, read_configuration, read_policy
from locum.site_client.gate import Policy, Ready
from locum.site_client.identity import FOLDER as IDENTITY
from locum.site_client.identity import load_identity
from locum.site_client.imaging.catalog import FILE_NAME, Catalog, read_meta
from locum.site_client.readiness.clauses import Measured, measure

#: The name in a statement of a site that nobody has enrolled or named.
_NOBODY = "unnamed"


class Signing(Protocol):
    """In whose name a statement is made; without a key it is not signed."""

    @property
    def site(self) -> str:
        """The site's name."""

    @property
    def key(self) -> ec.EllipticCurvePrivateKey | None:
        """Its key."""


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
    signer: Callable[[], Signing]
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
        """What may be said of it, signed if the site has a key."""
        signer = self.signer()
        found = gate.readiness(self.policy, plan, measured, site=signer.site, run=run, at=self.now().timestamp())
        return Ready(found, None if signer.key is None else seal_readiness(found, signer.key).decode())


@dataclass(frozen=True)
class Name:
    """Who speaks; without a key where nobody has enrolled the site."""

    site: str
    key: ec.EllipticCurvePrivateKey | None


def open_steward(home: Path, stores: Sequence[Path]) -> Steward:
    """The steward of an agent's folder, or of stores alone.

    Raises:
        DataError: site.yaml cannot be read, or there is neither a store nor a site.yaml that names one.
    """
    enrolled, configured = (home / IDENTITY).is_dir(), (home / FILE).is_file()
    if not stores and not configured:
        raise DataError(f"{home} holds no {FILE}, and no store is given", "give one: --store DIR, or --home DIR")
    policy = read_policy(home / FILE) if configured else Policy()
    folders = tuple(stores) or read_configuration(home / FILE).stores
    for folder in stores:
        Catalog.open(folder).close()

    def signer() -> Name:
        if not enrolled:
            return Name(_name_of(folders), None)
        identity = load_identity(home)
        return Name(identity.site, identity.key)

    return Steward(folders, policy, signer, utc_now)


def _name_of(stores: Sequence[Path]) -> str:
    """What the site file called the site of the first store that has a catalog."""
    for store in stores:
        if (store / FILE_NAME).is_file():
            with closing(Catalog.open(store)) as catalog:
                name = str(read_meta(catalog.connection, "site", "")).casefold().replace("_", "-")
                return name if is_site_name(name) else _NOBODY
    return _NOBODY
