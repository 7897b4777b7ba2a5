"""Who is calling: one question, asked at every call of every service.

Rules:
  * TLS has proved that the caller holds the key of a certificate of this federation's authority. Here the rest is
    asked: the role, the time, and the registry, at every call, so that a revocation counts at once.
  * Fail closed: whatever cannot be read or established is a refusal. The caller is told a sentence, the log the name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import grpc
from cryptography import x509

from locum.common.identity import (
    IdentityError,
    PublicKey,
    certified_key,
    check_valid,
    fingerprint_of,
    parse_certificate,
    serial_of,
    subject_of,
    utc_now,
)
from locum.common.log.store import LogError
from locum.server.log import NotLoggedError
from locum.server.registry import InvitationRow, RefusedError, Registry, RegistryError

log = logging.getLogger("locum.gateway")

_HOLDER = {"site": "an enrolled site", "invitation": "an invitation"}


class Refusal(Exception):
    """A call that is not answered: the status, and a sentence for the caller."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        super().__init__(code, sentence)
        self.code = code
        self.sentence = sentence


@dataclass(frozen=True)
class Peer:
    """A caller whose certificate was admitted."""

    name: str
    certificate: x509.Certificate

    @property
    def public_key(self) -> PublicKey:
        """The key that the caller holds."""
        return certified_key(self.certificate)


def site_of(context: grpc.ServicerContext, registry: Registry) -> str:
    """The name of the enrolled site that calls; ends the call for everybody else."""
    return site_peer(context, registry).name


def site_peer(context: grpc.ServicerContext, registry: Registry) -> Peer:
    """The enrolled site that calls, with its certificate; ends the call for everybody else."""
    try:
        return admit_site(_presented(context), registry, utc_now())
    except (Refusal, RegistryError) as error:
        refuse(context, error)


def invited(context: grpc.ServicerContext, registry: Registry) -> InvitationRow:
    """The invitation that calls; ends the call for everybody else. Whether it is still open is asked at redemption."""
    try:
        return admit_invitation(_presented(context), registry, utc_now())
    except (Refusal, RegistryError) as error:
        refuse(context, error)


def refuse(
    context: grpc.ServicerContext, error: Refusal | RefusedError | RegistryError | LogError | NotLoggedError
) -> NoReturn:
    """Ends a call with the status and sentence of what was raised."""
    if isinstance(error, Refusal):
        code, sentence = error.code, error.sentence
    elif isinstance(error, RegistryError):
        log.error("%s", error.message)
        code, sentence = grpc.StatusCode.UNAVAILABLE, "the coordinator's registry cannot be read"
    elif isinstance(error, LogError | NotLoggedError):
        log.error("%s", error.message)
        code, sentence = grpc.StatusCode.UNAVAILABLE, "the coordinator's log cannot be written"
    else:
        code, sentence = grpc.StatusCode.PERMISSION_DENIED, error.message
    log.warning("refused %s: %s", context.peer(), sentence)
    context.abort(code, sentence)
    raise AssertionError("abort returned")


def admit_site(presented: bytes, registry: Registry, now: datetime) -> Peer:
    """The site whose PEM certificate this is; raises Refusal or RegistryError."""
    certificate = _certificate(presented, "site", now)
    state = registry.certificate_state(serial_of(certificate))
    if state == "revoked":
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "this site's certificate was revoked")
    if state == "unknown":
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "this certificate is not in the registry")
    return Peer(subject_of(certificate).name, certificate)


def admit_invitation(presented: bytes, registry: Registry, now: datetime) -> InvitationRow:
    """The invitation whose PEM certificate this is; raises Refusal or RegistryError."""
    certificate = _certificate(presented, "invitation", now)
    found = registry.invitation(fingerprint_of(certificate))
    if found is None or found.name != subject_of(certificate).name:
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "this invitation is not in the registry")
    return found


def _certificate(presented: bytes, role: str, now: datetime) -> x509.Certificate:
    try:
        certificate = parse_certificate(presented)
        found = subject_of(certificate).role
        check_valid(certificate, now)
    except IdentityError as error:
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, str(error)) from error
    if found != role:
        raise Refusal(
            grpc.StatusCode.PERMISSION_DENIED, f"this call needs the certificate of a {role}, not of a {found}"
        )
    return certificate


def _presented(context: grpc.ServicerContext) -> bytes:
    found = context.auth_context().get("x509_pem_cert", ())
    if len(found) != 1:
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "this call needs a certificate of the federation")
    return bytes(found[0])
