"""The federation's authority: the coordinator's folder from nothing, and every certificate in it.

Rules:
  * One root (EC P-384, path length 0) issues all: the gateway's, the sites', the invitations' and the log's.
  * A certificate can be used for its role only: a site's or an invitation's is no server's (extended key usage).
  * Certificates begin an hour in the past, for clocks that disagree, and never outlive the root.
  * Everything about time takes `now`, so that the past and the future can be tested.
"""

from __future__ import annotations

import ipaddress
import secrets
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import grpc
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from locum.common.durable import flush, replace_file, write_synced
from locum.common.errors import RunError
from locum.common.identity import (
    BACKDATED,
    PublicKey,
    Subject,
    base64url,
    certificate_pem,
    certified_key,
    key_pem,
    load_certificate,
    load_ec_key,
    load_key,
    new_key,
    save_key,
    subject_of,
    utc_now,
    write_secret,
)
from locum.server.home import Home, ServerConfig
from locum.server.registry import Registry

INVITATION_LIFE = timedelta(hours=24)
_ROOT_LIFE = timedelta(days=25 * 365)
_LOG_LIFE = timedelta(days=10 * 365)
_SERVER_LIFE = timedelta(days=397)
_SERVER_REISSUE = timedelta(days=30)
#: Shared secrets of the processes on the coordinator's machine, by file below `superlink/`.
SECRETS = ("hints.secret", "control.secret", "superexec.secret")


@dataclass(frozen=True)
class Authority:
    """The root, its key, and how long what it issues lasts."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    site_life: timedelta

    @property
    def federation(self) -> str:
        """The federation's name."""
        return subject_of(self.certificate).federation

    def issue_site(self, name: str, key: PublicKey, *, now: datetime | None = None) -> x509.Certificate:
        """A certificate of an enrolled site."""
        return self._issue(Subject(self.federation, "site", name), key, life=self.site_life, now=now)

    def issue_invitation(self, name: str, key: PublicKey, *, now: datetime | None = None) -> x509.Certificate:
        """A certificate that may enrol as `name`, for 24 hours."""
        return self._issue(Subject(self.federation, "invitation", name), key, life=INVITATION_LIFE, now=now)

    def issue_server(self, host: str, key: PublicKey, *, now: datetime | None = None) -> x509.Certificate:
        """The gateway's certificate, for the name or address under which hospitals reach it."""
        subject = Subject(self.federation, "server", host[:64])
        return self._issue(subject, key, life=_SERVER_LIFE, now=now, hosts=(host,))

    def issue_log(self, key: PublicKey, *, now: datetime | None = None) -> x509.Certificate:
        """The certificate of the key that signs proposals and the log."""
        return self._issue(Subject(self.federation, "log", "log"), key, life=_LOG_LIFE, now=now)

    def _issue(
        self, subject: Subject, key: PublicKey, *, life: timedelta, now: datetime | None, hosts: tuple[str, ...] = ()
    ) -> x509.Certificate:
        begins = now or utc_now()
        ends = min(begins + life, self.certificate.not_valid_after_utc)
        builder = _builder(subject.to_x509(), key, begins - BACKDATED, ends)
        builder = builder.issuer_name(self.certificate.subject).add_extension(_key_identifier(self.key), critical=False)
        for extension, critical in _extensions(subject.role, hosts):
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.key, hashes.SHA384())


def _builder(name: x509.Name, key: PublicKey, begins: datetime, ends: datetime) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(name).public_key(key).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(begins).not_valid_after(ends)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _key_identifier(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _extensions(role: str, hosts: tuple[str, ...]) -> list[tuple[x509.ExtensionType, bool]]:
    found: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(digital_signature=True), True),
    ]
    if role == "server":
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        found += [(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False), (names, False)]
    elif role in {"site", "invitation"}:
        found.append((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False))
    elif role == "log":  # neither end of a TLS connection
        found.append((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), True))
    return found


def _usage(*, digital_signature: bool = False, certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _root(name: x509.Name, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = new_key()
    builder = _builder(name, key.public_key(), now - BACKDATED, now + _ROOT_LIFE).issuer_name(name)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(certificates=True), critical=True)
    return key, builder.sign(key, hashes.SHA384())


# --- the folder -------------------------------------------------------------------------------------------------------


def initialise(home: Home, config: ServerConfig, *, now: datetime | None = None) -> Authority:
    """Makes a coordinator's folder: authority, gateway's and log's keys, secrets, and `server.yaml` last.

    Raises:
        RunError: there is a coordinator already, or half of one.
    """
    _check_absent(home)
    began = now or utc_now()
    for folder in (home.path, home.authority, home.superlink, home.runs, home.spool, home.logs):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = found(home, config.name, timedelta(days=config.certificate_days), now=began)
    server_key = new_key()
    server = authority.issue_server(config.host, server_key.public_key(), now=now)
    _write_pair(home.authority / "server", server_key, server)
    _prepare_superlink(home.superlink, config.name, began)
    Registry.create(home.registry).close()
    replace_file(home.configuration, yaml.safe_dump(config.model_dump(), sort_keys=False).encode())
    return authority


def found(home: Home, federation: str, site_life: timedelta, *, now: datetime) -> Authority:
    """Makes a federation's root and the log's key in `home.authority`, which is empty."""
    key, certificate = _root(Subject(federation, "authority", federation).to_x509(), now)
    authority, log_key = Authority(key, certificate, site_life), ed25519.Ed25519PrivateKey.generate()
    _write_pair(home.authority / "ca", key, certificate)
    _write_pair(home.authority / "log", log_key, authority.issue_log(log_key.public_key(), now=now))
    return authority


def _check_absent(home: Home) -> None:
    if home.configuration.exists():
        raise RunError(f"{home.path} holds a coordinator already", "give another --home, or go on with this one")
    for path in (home.authority, home.superlink, home.registry):
        if path.exists():
            raise RunError(
                f"{home.path} holds '{path.name}' but no server.yaml: it was lost, or an init was interrupted",
                "restore server.yaml, or remove the folder if no site was ever invited",
            )


def _write_pair(
    stem: Path, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, certificate: x509.Certificate
) -> None:
    save_key(stem.with_suffix(".key"), key)
    write_synced(stem.with_suffix(".pem"), certificate_pem(certificate))
    flush(stem.parent)


def _prepare_superlink(folder: Path, federation: str, now: datetime) -> None:
    """Secrets of the loopback, and the SuperLink's certificate by a small authority whose key nobody keeps."""
    for name in SECRETS:
        write_secret(folder / name, base64url(secrets.token_bytes(32)).encode())
    root_key, root = _root(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "locum loopback")]), now)
    key = new_key()
    builder = _builder(
        Subject(federation, "superlink", "localhost").to_x509(), key.public_key(), now - BACKDATED, now + _ROOT_LIFE
    )
    builder = builder.issuer_name(root.subject).add_extension(_key_identifier(root_key), critical=False)
    for extension, critical in _extensions("server", ("127.0.0.1", "localhost")):
        builder = builder.add_extension(extension, critical=critical)
    _write_pair(folder / "tls", key, builder.sign(root_key, hashes.SHA384()))
    write_synced(folder / "tls-ca.pem", certificate_pem(root))


def load_authority(home: Home, config: ServerConfig) -> Authority:
    """The authority of an initialised coordinator; raises DataError."""
    return Authority(
        load_ec_key(home.authority / "ca.key"),
        load_certificate(home.authority / "ca.pem"),
        timedelta(days=config.certificate_days),
    )


def load_log_key(home: Home) -> ed25519.Ed25519PrivateKey:
    """The key that signs proposals and the log; raises DataError."""
    key = load_key(home.authority / "log.key")
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise RunError(f"{home.authority / 'log.key'} is no Ed25519 key", "restore it")
    return key


def load_log_certificate(home: Home) -> x509.Certificate:
    """The certificate of the log's key; raises DataError."""
    return load_certificate(home.authority / "log.pem")


def refresh_server_certificate(home: Home, authority: Authority, host: str, *, now: datetime | None = None) -> bool:
    """Issues the gateway's certificate again when fewer than 30 days are left or the host has another name.

    The key stays, so that the one file to change is replaced whole. Returns whether it did.
    """
    path = home.authority / "server.pem"
    current = load_certificate(path)
    left = current.not_valid_after_utc - (now or utc_now())
    if left >= _SERVER_REISSUE and subject_of(current).name == host[:64]:
        return False
    replace_file(path, certificate_pem(authority.issue_server(host, certified_key(current), now=now)))
    return True


def door_credentials(home: Home, authority: Authority, host: str) -> grpc.ServerCredentials:
    """The gateway's TLS: this federation's clients only, and a certificate that is renewed while it runs."""
    key = key_pem(load_ec_key(home.authority / "server.key"))
    root = certificate_pem(authority.certificate)

    def configuration() -> grpc.ServerCertificateConfiguration:
        certificate = (home.authority / "server.pem").read_bytes()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root)

    one_at_a_time = threading.Lock()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """At every handshake: something new only when the certificate was issued again."""
        with one_at_a_time:
            return configuration() if refresh_server_certificate(home, authority, host) else None

    refresh_server_certificate(home, authority, host)
    return grpc.dynamic_ssl_server_credentials(configuration(), fetch, require_client_authentication=True)
