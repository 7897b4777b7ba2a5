"""Inviting a site: a token, its certificate, and the one file that a hospital is given."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from pydantic import SecretStr

from locum.common.errors import DataError
from locum.common.identity import (
    Invitation,
    base64url,
    certificate_pem,
    fingerprint_of,
    invitation_key,
    is_site_name,
    new_token,
    parse_certificate,
    token_sha256,
    write_invitation,
)
from locum.server.authority import Authority
from locum.server.home import ServerConfig
from locum.server.registry import Registry


def gateway_address(config: ServerConfig) -> str:
    """Where hospitals reach the gateway, host:port."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{host}:{config.port}"


def make_invitation(
    authority: Authority, config: ServerConfig, name: str, *, now: datetime | None = None
) -> Invitation:
    """An invitation for a site of this name, for 24 hours; raises DataError if a site cannot be called so."""
    if not is_site_name(name):
        raise DataError(f"'{name}' is no site's name", "use at most 40 letters, digits, - and _, a letter first")
    token = new_token()
    certificate = authority.issue_invitation(name, invitation_key(token).public_key(), now=now)
    return Invitation(
        federation=authority.federation,
        site=name,
        address=gateway_address(config),
        authority=certificate_pem(authority.certificate).decode(),
        certificate=certificate_pem(certificate).decode(),
        token=SecretStr(base64url(token)),
        expires=certificate.not_valid_after_utc,
    )


def invite(registry: Registry, invitation: Invitation, path: Path) -> None:
    """Writes an invitation's file and notes it in the registry; raises DataError, RefusedError or RegistryError.

    The file is removed again if the registry does not take it.
    """
    try:
        write_invitation(path, invitation)
    except OSError as error:
        reason = f"the invitation {path} cannot be written: {error.strerror}"
        raise DataError(reason, "remove that file, or name another with --out") from error
    try:
        registry.invite(
            invitation.site,
            token_sha256=token_sha256(invitation.token_bytes),
            fingerprint=fingerprint_of(parse_certificate(invitation.certificate.encode())),
            expires=invitation.expires,
        )
    except BaseException:
        path.unlink()
        raise
