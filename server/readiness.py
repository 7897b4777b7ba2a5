"""What sites say of their data: checked before it counts. A site whose data do not meet the contract is not selected.

Rules:
  * A statement counts if the key in the site's certificate signed it, and if it is of this site, run and plan.
  * A site whose certificate is known must make one. Only in one process, among sites that have no keys, is there none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cryptography import x509

from locum.common.envelope import EnvelopeError, Readiness, open_readiness
from locum.common.errors import Code
from locum.common.identity import certified_key
from locum.common.log.entries import ReadinessEntry, read_entry
from locum.common.messages import Description
from locum.server.admission import Refused
from locum.server.home import Home
from locum.server.log import open_log
from locum.server.registry import Registry

#: In the bytes of every entry that is a statement of readiness: a log has millions of others.
_MARK = b'"kind":"readiness"'


@dataclass(frozen=True)
class Heard:
    """A site's signed statement of readiness: the envelope, and what it says."""

    envelope: str
    said: Readiness


def heard(found: Description, certificate: x509.Certificate | None, *, run: str) -> Heard | Refused | None:
    """The statement in a site's description, or why the site cannot be selected; None where none can be checked."""
    if found.readiness is None:
        return None if certificate is None else Refused("it does not say whether its data meet the contract")
    if certificate is None:
        return Refused("its statement of readiness cannot be checked: its certificate is not known")
    try:
        said = open_readiness(found.readiness.encode(), certified_key(certificate))
    except EnvelopeError as error:
        return Refused(f"its statement of readiness does not count: {error}")
    if (said.site, said.run, said.plan) != (found.site, run, found.plan_digest):
        return Refused("its statement of readiness is about something else")
    return Heard(found.readiness, said)


def unable(found: Description, statement: Heard | None) -> Refused | None:
    """Why a site that answered well cannot take part; None if it can."""
    if statement is not None and not statement.said.ready:
        reason = found.reason or f"the contract is not met: {', '.join(statement.said.failing)}"
        return Refused(reason, Code.NOT_READY)
    return None if found.able else Refused(found.reason, Code.NO_DATA)


def newest(home: Home, registry: Registry, plan: str) -> dict[str, Readiness]:
    """By site, what it said last of its data for a plan: in the log of runs, or before any.

    Only of sites that are enrolled, under the keys that they have now. Raises LogError and RegistryError.
    """
    keys = {site.name: certified_key(site.certificate) for site in registry.sites() if site.revoked_at is None}
    said = [(site, envelope.decode()) for site, envelope in registry.readiness(plan).items()]
    said += [(entry.site, entry.statement) for entry in _logged(home) if entry.plan == plan]
    found: dict[str, Readiness] = {}
    for site, envelope in said:
        try:
            one = open_readiness(envelope.encode(), keys[site])
        except (KeyError, EnvelopeError):
            continue  # of a site that has left, or under a key that it has no more
        if one.plan == plan and (site not in found or one.at > found[site].at):
            found[site] = one
    return found


def _logged(home: Home) -> Iterator[ReadinessEntry]:
    for content in open_log(home).store.entries():
        if _MARK in content and isinstance(entry := read_entry(content), ReadinessEntry):
            yield entry
