"""Who somebody is: keys, certificates and their names, and the invitation that a hospital is given.

Rules:
  * A private key is made where it is used, lies in a file that only its owner can read (0600, never overwritten), and
    never travels. The one secret that is handed over is an invitation's token, good for one site, once, for a day.
  * A certificate's subject says all: O the federation, OU the role, CN the name (RFC 5280). Keys are EC P-384; the
    log's key is Ed25519.
  * An invitation's key is derived from its token (RFC 5869), so that the file holds no key and both sides agree.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_serializer,
    field_validator,
)

from locum.common.errors import DataError

Role = Literal["authority", "server", "site", "invitation", "log"]
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

#: A site's name: it stands in certificates, folders and messages.
SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$"
SiteName = Annotated[str, StringConstraints(pattern=SITE_NAME)]

TOKEN_BYTES = 32
#: Certificates begin this long before they are issued, for clocks that disagree.
BACKDATED = timedelta(hours=1)
_CURVE = ec.SECP384R1()
ADDRESS = r"^(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):[0-9]{1,5}$"
_MOST_INVITATION = 64 << 10


class IdentityError(ValueError):
    """A key, a certificate or a request that is not what it must be; the text says why, in one sentence."""


def utc_now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def is_site_name(name: str) -> bool:
    """Whether a site may be called so."""
    return re.fullmatch(SITE_NAME.rstrip("$"), name) is not None


def new_key() -> ec.EllipticCurvePrivateKey:
    """A new P-384 key, from the operating system's randomness."""
    return ec.generate_private_key(_CURVE)


def write_secret(path: Path, content: bytes) -> None:
    """Writes a file that only its owner can read, durably; raises FileExistsError if there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask takes away
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def key_pem(key: PrivateKey) -> bytes:
    """A private key, PKCS#8 PEM, not encrypted: for a file of mode 0600 and for TLS."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_key_sha256(key: PublicKey) -> str:
    """The SHA-256 of a public key (SubjectPublicKeyInfo, DER), hexadecimal."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def save_key(path: Path, key: PrivateKey) -> None:
    """Writes a private key, mode 0600; raises FileExistsError."""
    write_secret(path, key_pem(key))


def load_key(path: Path) -> PrivateKey:
    """Reads a private key; raises DataError if it is missing, readable by others, or no key of ours."""
    try:
        others = path.stat().st_mode & 0o077
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"the key {path} cannot be read: {error.strerror}", "restore it, or enrol again") from error
    if others:
        raise DataError(f"the key {path} can be read by others", f"chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DataError(f"{path} holds no private key", "restore it, or enrol again") from error
    if not isinstance(key, PrivateKey):
        raise DataError(f"{path} holds a key of another kind", "restore it, or enrol again")
    return key


def load_ec_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads a P-384 private key; raises DataError."""
    key = load_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_p384(key.public_key()):
        raise DataError(f"{path} holds a key of another kind than P-384", "restore it, or enrol again")
    return key


def is_p384(key: object) -> bool:
    """Whether a public key is an EC key on P-384."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)


# --- certificates -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What a certificate says of its holder: federation (O), role (OU) and name (CN)."""

    federation: str
    role: str
    name: str

    def to_x509(self) -> x509.Name:
        """The distinguished name."""
        parts = {
            NameOID.ORGANIZATION_NAME: self.federation,
            NameOID.ORGANIZATIONAL_UNIT_NAME: self.role,
            NameOID.COMMON_NAME: self.name,
        }
        return x509.Name([x509.NameAttribute(oid, value) for oid, value in parts.items()])


def subject_of(named: x509.Certificate | x509.CertificateSigningRequest) -> Subject:
    """The subject of a certificate or of a request; raises IdentityError unless it is exactly O, OU, CN."""
    try:
        found = {attribute.oid: str(attribute.value) for attribute in named.subject}
        if len(list(named.subject)) == 3:
            return Subject(
                found[NameOID.ORGANIZATION_NAME],
                found[NameOID.ORGANIZATIONAL_UNIT_NAME],
                found[NameOID.COMMON_NAME],
            )
    except (KeyError, ValueError) as error:
        raise IdentityError("the subject does not name federation, role and name") from error
    raise IdentityError("the subject does not name federation, role and name")


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate, PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


@lru_cache(maxsize=1024)
def parse_certificate(content: bytes) -> x509.Certificate:
    """Reads one PEM certificate; raises IdentityError."""
    try:
        return x509.load_pem_x509_certificate(content)
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise IdentityError("this is no PEM certificate") from error


def load_certificate(path: Path) -> x509.Certificate:
    """Reads a certificate's file; raises DataError."""
    try:
        return parse_certificate(path.read_bytes())
    except OSError as error:
        raise DataError(f"the certificate {path} cannot be read: {error.strerror}", "restore it") from error
    except IdentityError as error:
        raise DataError(f"{path} holds no certificate", "restore it") from error


def serial_of(certificate: x509.Certificate) -> str:
    """The serial number, hexadecimal."""
    return format(certificate.serial_number, "x")


def fingerprint_of(certificate: x509.Certificate) -> str:
    """The SHA-256 of the certificate (DER), hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def certified_key(certificate: x509.Certificate | x509.CertificateSigningRequest) -> PublicKey:
    """The public key of a certificate or of a request; raises IdentityError unless it is P-384 or Ed25519."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError("the public key cannot be read") from error
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and is_p384(key):
        return key
    raise IdentityError("the public key is neither P-384 nor Ed25519")


def check_issued(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Raises IdentityError unless `authority` issued the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError("the certificate was not issued by this federation's authority") from error


def check_valid(certificate: x509.Certificate, now: datetime) -> None:
    """Raises IdentityError unless `now` is within the certificate's time."""
    if now < certificate.not_valid_before_utc:
        raise IdentityError(
            f"the certificate is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        )
    if now >= certificate.not_valid_after_utc:
        raise IdentityError(f"the certificate expired at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")


def renewal_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether less than a third of the certificate's lifetime is left."""
    ends = certificate.not_valid_after_utc
    return ends - now < (ends - certificate.not_valid_before_utc - BACKDATED) / 3


# --- requests ---------------------------------------------------------------------------------------------------------


def certificate_request(subject: Subject, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request for a certificate of `key`, signed with it: PKCS#10, PEM (RFC 2986)."""
    request = x509.CertificateSigningRequestBuilder().subject_name(subject.to_x509()).sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM)


def parse_request(content: bytes) -> x509.CertificateSigningRequest:
    """Reads a request; raises IdentityError unless it is signed with its own key and that is P-384."""
    try:
        request = x509.load_pem_x509_csr(content)
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise IdentityError("this is no PEM certificate request") from error
    if not signed:
        raise IdentityError("the certificate request is not signed with its own key")
    if not is_p384(certified_key(request)):
        raise IdentityError("the certificate request's key is not on P-384")
    return request


# --- invitations ------------------------------------------------------------------------------------------------------


def new_token() -> bytes:
    """An invitation's secret: 32 random bytes."""
    return secrets.token_bytes(TOKEN_BYTES)


def token_sha256(token: bytes) -> bytes:
    """What the registry keeps of a token."""
    return hashlib.sha256(token).digest()


def invitation_key(token: bytes) -> ec.EllipticCurvePrivateKey:
    """The invitation's TLS key: HKDF-SHA384(token, info="locum invitation") as a scalar in [1, n - 1].

    64 bytes are taken for 48, so that the reduction's bias is below 2^-128 (FIPS 186-5, A.2.1).
    """
    drawn = HKDF(hashes.SHA384(), 64, salt=None, info=b"locum invitation").derive(token)
    return ec.derive_private_key(int.from_bytes(drawn) % (_CURVE.group_order - 1) + 1, _CURVE)


def request_mac(token_digest: bytes, request: bytes) -> bytes:
    """HMAC-SHA256 of a certificate request under the SHA-256 of the token."""
    return hmac.digest(token_digest, request, "sha256")


class Invitation(BaseModel):
    """The file that a hospital is given: whom to call, how to know them, and a token that works once.

    Attributes:
        federation: the federation's name.
        site: the name that the hospital will have; no other can be asked for.
        address: the gateway, host:port.
        authority: the federation's root certificate, PEM.
        certificate: the invitation's own, PEM, of the key derived from the token.
        token: 32 bytes, base64url without padding: the only secret.
        expires: when the invitation ends.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    locum: Literal["invitation"] = "invitation"
    federation: str = Field(min_length=1, max_length=64)
    site: SiteName
    address: str = Field(pattern=ADDRESS)
    authority: str = Field(max_length=16384)
    certificate: str = Field(max_length=16384)
    token: SecretStr
    expires: AwareDatetime

    @field_validator("token")
    @classmethod
    def _of_right_length(cls, token: SecretStr) -> SecretStr:
        if len(base64url_bytes(token.get_secret_value())) != TOKEN_BYTES:
            raise ValueError("the token is not 32 bytes in base64url")
        return token

    @field_serializer("token", when_used="json")
    def _written(self, token: SecretStr) -> str:
        return token.get_secret_value()

    @property
    def token_bytes(self) -> bytes:
        """The token itself."""
        return base64url_bytes(self.token.get_secret_value())


def base64url(content: bytes) -> str:
    """Base64url without padding (RFC 4648, section 5)."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def base64url_bytes(text: str) -> bytes:
    """The bytes of base64url without padding; raises ValueError unless `text` is the one way to write them."""
    content = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64url(content) != text:
        raise ValueError("this is not base64url")
    return content


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Writes an invitation, mode 0600; raises FileExistsError."""
    write_secret(path, invitation.model_dump_json(indent=2).encode() + b"\n")


def read_invitation(path: Path) -> Invitation:
    """Reads an invitation; raises DataError."""
    remedy = "ask the coordinator for another: locum server invite NAME"
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_INVITATION + 1)
    except OSError as error:
        raise DataError(f"the invitation {path} cannot be read: {error.strerror}", "check the path") from error
    try:
        return Invitation.model_validate_json(content[: _MOST_INVITATION + 1])
    except ValidationError as error:
        # The library's own text repeats what was given, and that may be the token.
        wrong = ", ".join(sorted({str(item["loc"][0]) for item in error.errors() if item["loc"]})) or "not JSON"
        raise DataError(f"{path} is no invitation ({wrong})", remedy) from None
