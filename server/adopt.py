"""What a registry knows and the log does not: of a coordinator that had no log, or whose registry is a newer backup."""

from __future__ import annotations

from collections.abc import Iterator

from locum.common.canonical import sha256_hex
from locum.common.envelope import EnvelopeError, open_proposal
from locum.common.identity import certified_key, fingerprint_of, public_key_sha256
from locum.common.log.entries import ApprovalEntry, Entry, ProposalEntry, SiteEntry
from locum.server.log import FederationLog, now
from locum.server.registry import Registry


def adopt(registry: Registry, log: FederationLog) -> None:
    """Writes the members, proposals and standing approvals that are missing; raises RegistryError or NotLoggedError."""
    log.append_new(*_members(registry), *_plans(registry, log))


def _members(registry: Registry) -> Iterator[Entry]:
    keys: set[str] = set()
    for name, certificate in registry.certificates():
        key = public_key_sha256(certified_key(certificate))
        event = "renewed" if key in keys else "enrolled"
        keys.add(key)
        yield SiteEntry.model_validate(
            {"at": now(), "site": name, "event": event, "certificate": fingerprint_of(certificate)}
        )
    for site in registry.sites():
        if site.revoked_at is not None:
            yield SiteEntry(at=now(), site=site.name, event="revoked", certificate=fingerprint_of(site.certificate))


def _plans(registry: Registry, log: FederationLog) -> Iterator[Entry]:
    sites = {site.name: fingerprint_of(site.certificate) for site in registry.sites()}
    for envelope in reversed(registry.proposals()):
        try:
            plan = open_proposal(envelope, log.key.public_key()).digest
        except EnvelopeError:
            continue  # no site takes it for one either
        yield ProposalEntry(at=now(), plan=plan, statement=sha256_hex(envelope))
        for site, approval in registry.approvals(plan).items():
            yield ApprovalEntry(
                at=now(), site=site, plan=plan, statement=approval.envelope.decode(), certificate=sites[site]
            )
