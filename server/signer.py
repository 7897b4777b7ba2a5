"""What the coordinator signs with in secure sums, and whom it believes."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ed25519

from locum.common.identity import load_certificate, subject_of
from locum.common.secagg.roster import Trust
from locum.server.authority import load_log_key
from locum.server.home import Home


@dataclass(frozen=True)
class Signer:
    """The coordinator of one run.

    Attributes:
        run: the run's name.
        key: the federation's log key.
        trust: its authority.
    """

    run: str
    key: ed25519.Ed25519PrivateKey = field(repr=False)
    trust: Trust


def signer_of(home: Home, run: str) -> Signer:
    """The coordinator in a folder; raises DataError or RunError."""
    authority, key = load_certificate(home.authority / "ca.pem"), load_log_key(home)
    return Signer(run, key, Trust(subject_of(authority).federation, authority, key.public_key()))
