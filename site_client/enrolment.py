"""Joining a federation, staying in it, and the connection to it.

Rules:
  * The key is made here, before anything is asked, in a folder that is the invitation's own; so an enrolment whose
    reply was lost is finished by the same command, with the same key.
  * Nothing is believed that the root of the invitation has not signed: neither the gateway, nor the certificates.
  * What leaves goes through `releases.py`, which writes it down first: the log of a site begins with its enrolment.
  * `identity/` appears whole or not at all. One that is there is moved aside only when asked to.
"""

from __future__ import annotations

import fcntl
import ipaddress
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from datetime import datetime
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from locum.common.blobs import OPTIONS
from locum.common.durable import flush
from locum.common.errors import DataError, RunError
from locum.common.identity import (
    IdentityError,
    Invitation,
    Subject,
    certificate_pem,
    certificate_request,
    check_valid,
    invitation_key,
    key_pem,
    load_ec_key,
    new_key,
    parse_certificate,
    read_invitation,
    renewal_due,
    request_mac,
    save_key,
    token_sha256,
    utc_now,
)
from locum.common.proto import locum_pb2 as pb
from locum.common.proto.locum_pb2_grpc import RegistryStub
from locum.site_client.identity import (
    FOLDER,
    KEY,
    Membership,
    SiteIdentity,
    check_identity,
    load_identity,
    save_identity,
)
from locum.site_client.releases import FOLDER as RELEASES
from locum.site_client.releases import Releases, begin_releases, set_aside

CALL_SECONDS = 30.0
_PENDING = ".enrolling"
_ANOTHER = "ask the coordinator for another invitation"
#: What gRPC says when the other end is not who it must be.
_NOT_THEM = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification", "WRONG_VERSION_NUMBER")
_OPTIONS: tuple[tuple[str, int], ...] = (
    # A path that a firewall forgot is noticed in half a minute, and an idle one is not forgotten.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 15_000),
    *((name, value) for name, value in OPTIONS if name != "grpc.max_receive_message_length"),
    ("grpc.max_receive_message_length", 32 << 20),
)


# --- joining ----------------------------------------------------------------------------------------------------------


def enrol(path: Path, home: Path, *, proxy: str | None = None, replace: bool = False) -> SiteIdentity:
    """Makes the site's key, gets its certificate with the invitation at `path`, and writes `home/identity`.

    Args:
        path: the invitation.
        home: the agent's folder.
        proxy: `http://host:port` of an HTTP proxy that carries the connection.
        replace: whether an identity that is there is moved aside.

    Raises:
        DataError: the invitation cannot be used, or the site is enrolled already.
        RunError: the coordinator was not reached or refused.
    """
    invitation = read_invitation(path)
    _check_invitation(invitation, utc_now())
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(home):
        if (home / FOLDER).exists() and not replace:
            raise DataError(f"{home} is enrolled already", "to join anew and keep the old key aside: --replace")
        pending = home / f"{_PENDING}-{token_sha256(invitation.token_bytes).hex()[:16]}"
        set_aside(home, invitation.federation, invitation.site)
        releases = begin_releases(home / RELEASES, invitation.federation, invitation.site)
        identity = _asked(invitation, _pending_key(pending), proxy, releases)
        save_identity(pending, identity)
        _establish(home, pending)
    return load_identity(home)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    with (home / f"{_PENDING}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another enrolment goes on in {home}", "wait for its end") from error
        yield


def _check_invitation(invitation: Invitation, now: datetime) -> None:
    if now >= invitation.expires:
        raise DataError(f"the invitation expired at {invitation.expires:%Y-%m-%d %H:%M} UTC", _ANOTHER)
    try:
        parse_certificate(invitation.authority.encode())
        parse_certificate(invitation.certificate.encode())
    except IdentityError as error:
        raise DataError("the invitation's certificates cannot be read", _ANOTHER) from error


def _pending_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """The key of this enrolment: the one that is there, or a new one, on the disk before it is used."""
    folder.mkdir(mode=0o700, exist_ok=True)
    path, beside = folder / KEY, folder / f"{KEY}.new"
    if not path.exists():
        beside.unlink(missing_ok=True)  # of an attempt that was interrupted
        save_key(beside, new_key())
        beside.rename(path)
        flush(folder)
        flush(folder.parent)
    return load_ec_key(path)


def _asked(
    invitation: Invitation, key: ec.EllipticCurvePrivateKey, proxy: str | None, releases: Releases
) -> SiteIdentity:
    request = certificate_request(Subject(invitation.federation, "site", invitation.site), key)
    mac = request_mac(token_sha256(invitation.token_bytes), request)
    tls = grpc.ssl_channel_credentials(
        invitation.authority.encode(), key_pem(invitation_key(invitation.token_bytes)), invitation.certificate.encode()
    )
    with _channel(invitation.address, tls, proxy) as channel:
        try:
            asked, stub = pb.EnrolRequest(request=request, mac=mac), RegistryStub(channel)
            reply = releases.enrolment(request, lambda: stub.Enrol(asked, timeout=CALL_SECONDS))
        except grpc.RpcError as error:
            raise connection_error(error, invitation.address) from error
    membership = Membership(federation=invitation.federation, site=invitation.site, address=invitation.address)
    try:
        identity = SiteIdentity(
            membership=membership,
            key=key,
            certificate=parse_certificate(reply.certificate),
            authority=parse_certificate(invitation.authority.encode()),
            log_certificate=parse_certificate(reply.log_certificate),
        )
        check_identity(identity)
    except IdentityError as error:
        raise RunError(f"the coordinator's answer cannot be used: {error}", _ANOTHER) from error
    return identity


def _establish(home: Path, pending: Path) -> None:
    target = home / FOLDER
    if target.exists():
        target.rename(home / f"{FOLDER}.until-{utc_now():%Y%m%dT%H%M%S.%fZ}")
    pending.rename(target)
    flush(home)
    for abandoned in home.glob(f"{_PENDING}-*"):  # of invitations that are of no use any more
        shutil.rmtree(abandoned)


# --- staying ----------------------------------------------------------------------------------------------------------


def needs_renewal(identity: SiteIdentity, now: datetime | None = None) -> bool:
    """Whether less than a third of the certificate's lifetime is left."""
    return renewal_due(identity.certificate, now or utc_now())


def renew(
    identity: SiteIdentity, home: Path, channel: grpc.Channel, releases: Releases, now: datetime | None = None
) -> SiteIdentity:
    """The identity with a new certificate of the same key, on the disk; open the channel again to use it.

    `now` is the time by the coordinator's clock, if this machine's is not to be trusted.

    Raises:
        grpc.RpcError: the coordinator was not reached or refused; the old certificate goes on to count.
        IdentityError: its answer is not a certificate of this site.
    """
    request = certificate_request(identity.subject, identity.key)
    asked, stub = pb.RenewRequest(request=request), RegistryStub(channel)
    reply = releases.renewal(request, lambda: stub.Renew(asked, timeout=CALL_SECONDS))
    renewed = changed(
        identity,
        certificate=parse_certificate(reply.certificate),
        log_certificate=parse_certificate(reply.log_certificate),
    )
    check_identity(renewed)
    check_valid(renewed.certificate, now or utc_now())
    save_identity(home / FOLDER, renewed)
    return renewed


# --- the connection ---------------------------------------------------------------------------------------------------


def open_channel(identity: SiteIdentity, proxy: str | None = None) -> grpc.Channel:
    """The site's one outbound connection: mutual TLS, kept alive, opened again with back-off up to 15 s.

    Without `proxy` the environment's `https_proxy`, `http_proxy` and `no_proxy` count, except on loopback.
    """
    tls = grpc.ssl_channel_credentials(
        certificate_pem(identity.authority), key_pem(identity.key), certificate_pem(identity.certificate)
    )
    return _channel(identity.membership.address, tls, proxy)


def _channel(address: str, tls: grpc.ChannelCredentials, proxy: str | None) -> grpc.Channel:
    options: list[tuple[str, int | str]] = list(_OPTIONS)
    if proxy is not None:
        options.append(("grpc.http_proxy", proxy))
    elif on_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.secure_channel(address, tls, options=options)


def on_loopback(address: str) -> bool:
    """Whether an address, host:port, is this machine's own."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connection_error(error: grpc.RpcError, address: str) -> RunError:
    """What a failed call means, in words, and what to do."""
    code, details = error.code(), error.details() or ""
    if any(sign in details for sign in _NOT_THEM):
        return RunError(
            f"who answers at {address} is not this federation's gateway",
            "ask whether a proxy opens TLS on the way; it must let this address pass untouched",
        )
    if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
        return RunError(
            f"the gateway at {address} was not reached: {details}",
            "check that the coordinator runs, and that this machine may connect to it (a proxy: --proxy)",
        )
    return RunError(f"the coordinator refused: {details}", "ask the coordinator")
