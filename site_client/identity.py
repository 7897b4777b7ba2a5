"""The site's identity: the folder `identity/` of an agent, and nothing else about it.

site.key (0600)    the site's one private key: TLS, Flower's node key, approvals; it never leaves
site.pem           its certificate, replaced at each renewal
authority.pem      the federation's root, as the invitation brought it
log.pem            of the key that signs proposals
federation.json    {federation, site, address}
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from locum.common.durable import flush, replace_file
from locum.common.errors import DataError, RunError
from locum.common.identity import (
    ADDRESS,
    IdentityError,
    PublicKey,
    SiteName,
    Subject,
    certificate_pem,
    certified_key,
    check_issued,
    load_certificate,
    load_ec_key,
    subject_of,
)

HOME = "LOCUM_SITE_HOME"
FOLDER = "identity"
KEY = "site.key"


def default_home() -> Path:
    """The agent's folder when no `--home` is given."""
    given = os.environ.get(HOME)
    return Path(given) if given else Path("locum-site")


@contextmanager
def usable(home: Path) -> Iterator[None]:
    """An agent's folder in use: what is made there is for this account alone, and what cannot be done is told in words.

    Raises RunError for a folder that cannot be read or written.
    """
    before = os.umask(0o077)
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or home} cannot be used: {error.strerror or error}"
        raise RunError(reason, "mend its permissions, or free space") from error
    finally:
        os.umask(before)


class Membership(BaseModel):
    """`federation.json`: which federation, under which name, and where its gateway is (host:port)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    federation: str = Field(min_length=1, max_length=64)
    site: SiteName
    address: str = Field(pattern=ADDRESS)


@dataclass(frozen=True)
class SiteIdentity:
    """A site's key and certificates, checked to belong together; two are equal if their certificates are."""

    membership: Membership
    key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)
    certificate: x509.Certificate
    authority: x509.Certificate
    log_certificate: x509.Certificate

    @property
    def site(self) -> str:
        """The site's name."""
        return self.membership.site

    @property
    def subject(self) -> Subject:
        """What the site's certificate says of it."""
        return Subject(self.membership.federation, "site", self.membership.site)

    @property
    def log_key(self) -> PublicKey:
        """The key that verifies proposals."""
        return certified_key(self.log_certificate)


def check_identity(identity: SiteIdentity) -> None:
    """Raises IdentityError unless the certificates are the authority's, for this site, and of this key.

    The time is not asked: an agent whose certificate expired must say so, and not that its folder is broken.
    """
    check_issued(identity.certificate, identity.authority)
    check_issued(identity.log_certificate, identity.authority)
    if subject_of(identity.certificate) != identity.subject:
        raise IdentityError(f"the certificate is not that of {identity.site}")
    if certified_key(identity.certificate) != identity.key.public_key():
        raise IdentityError("the certificate is of another key than the site's")
    if subject_of(identity.log_certificate) != Subject(identity.membership.federation, "log", "log"):
        raise IdentityError("the log's certificate is not that of the federation's log")


def load_identity(home: Path) -> SiteIdentity:
    """The identity of an enrolled site; raises DataError."""
    folder = home / FOLDER
    if not folder.is_dir():
        raise DataError(f"{home} holds no enrolled site", "give its --home, or enrol: locum site enrol INVITE")
    identity = SiteIdentity(
        membership=_membership(folder / "federation.json"),
        key=load_ec_key(folder / KEY),
        certificate=load_certificate(folder / "site.pem"),
        authority=load_certificate(folder / "authority.pem"),
        log_certificate=load_certificate(folder / "log.pem"),
    )
    try:
        check_identity(identity)
    except IdentityError as error:
        remedy = "restore the folder, or enrol again: locum site enrol INVITE --replace"
        raise DataError(f"the identity in {folder} does not fit together: {error}", remedy) from error
    return identity


def save_identity(folder: Path, identity: SiteIdentity) -> None:
    """Writes all but the key, which lies there since it was made; each file whole or not at all."""
    replace_file(folder / "authority.pem", certificate_pem(identity.authority))
    replace_file(folder / "log.pem", certificate_pem(identity.log_certificate))
    replace_file(folder / "federation.json", identity.membership.model_dump_json(indent=2).encode() + b"\n")
    replace_file(folder / "site.pem", certificate_pem(identity.certificate))
    flush(folder)


def _membership(path: Path) -> Membership:
    try:
        return Membership.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path} cannot be read", "restore it, or enrol again") from error
