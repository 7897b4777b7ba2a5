"""Whether a model's file is the one that a statement is about, and what the statement says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from locum.common.audit.rules import shown
from locum.common.audit.statement import MOST_BYTES, Statement, StatementError, counted, open_statement, pinned
from locum.common.errors import DataError, LocumError
from locum.common.identity import fingerprint_of, parse_certificate


class ClaimError(LocumError):
    """A model that a statement does not vouch for."""


def claimed(model: Path, statement: Path, authority: str | None) -> Statement:
    """The statement, if it counts and is about this file.

    Args:
        model: the model's file.
        statement: the signed statement.
        authority: the SHA-256 of the authority's certificate that is trusted; None for the one in the statement.

    Raises:
        DataError: a file cannot be read.
        ClaimError: the statement does not count, or is about another model.
    """
    try:
        with statement.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        with model.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}", "check the path") from error
    try:
        said = open_statement(content, pinned(authority))
    except StatementError as error:
        raise ClaimError(
            f"{statement} does not count: {error}", "ask whoever gave it to you for the right one"
        ) from error
    if said.model != digest:
        raise ClaimError(
            f"{statement} is about another model: that one has the SHA-256 {said.model}, and {model} has {digest}",
            "do not use this model under that statement",
        )
    return said


def claim_lines(said: Statement, *, pinned: bool) -> Iterator[str]:
    """What a statement says, in lines."""
    release = said.predicate
    yield f"this is the model that {shown(release.federation)} released, SHA-256 {said.model}"
    yield f"run {release.run}, {release.status}, round {release.round}, plan {release.plan}"
    yield f"sites: {', '.join(release.roster)}"
    spent = ", ".join(
        f"{site} {loss.epsilon:.3g} at delta {loss.delta:g}" for site, loss in sorted(release.epsilon.items())
    )
    yield f"epsilon: {spent}" if spent else "no differential privacy: nothing bounds what it tells of a single patient"
    yield f"said {release.at}, on a log of {counted(release)} entries"
    if not pinned:
        authority = fingerprint_of(parse_certificate(release.authority.encode()))
        yield "note: the authority came out of the statement itself. Compare, or give it:"
        yield f"  --fingerprint {authority}"
