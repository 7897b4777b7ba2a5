"""The statement that goes with a released model, made from what the log says of the run.

Written as `statement.json` beside the model when a run has ended; :mod:`locum.common.audit.statement` says what it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from locum.common.audit.statement import Loss, Release, seal_statement
from locum.common.durable import replace_file
from locum.common.errors import RunError
from locum.common.log.entries import EndEntry, Entry, RosterEntry, RoundEntry, read_entry
from locum.common.log.note import opened
from locum.server.home import Home
from locum.server.log import FederationLog, now

FILE = "statement.json"


def write_statement(folder: Path, log: FederationLog, run: str) -> None:
    """Writes what is said of a run's model into the run's folder.

    Raises:
        RunError: the log says nothing of the run's end.
        NotLoggedError: no checkpoint that counts the end can be signed.
        OSError: it cannot be written.
    """
    roster: tuple[str, ...] = ()
    epsilon: dict[str, Loss] = {}
    end: EndEntry | None = None
    for entry in entries_of(log, run):
        if isinstance(entry, RosterEntry):
            roster = entry.sites
        elif isinstance(entry, RoundEntry):
            epsilon |= {site: _loss(envelope) for site, envelope in entry.spent.items()}
        elif isinstance(entry, EndEntry):
            end = entry
    if end is None:
        raise RunError(f"the log does not say how {run} ended", f"locum resume {run}")
    authority = Home(log.folder.parent).authority
    release = Release(
        federation=log.federation,
        run=run,
        plan=end.plan,
        round=end.round,
        status=end.status,
        roster=roster,
        epsilon=epsilon,
        checkpoint=_own_note(log.seal()),
        at=now(),
        authority=(authority / "ca.pem").read_text(),
        log=(authority / "log.pem").read_text(),
    )
    replace_file(folder / FILE, seal_statement(end.model, release, log.key))


def entries_of(log: FederationLog, run: str) -> Iterator[Entry]:
    """What a log says of a run, in order; raises LogError."""
    mine = f'"run":"{run}"'.encode()
    return (read_entry(leaf) for leaf in log.store.entries() if mine in leaf)


def _loss(envelope: str) -> Loss:
    """What a site said it has spent; its signature was checked before it came into the log."""
    said = json.loads(envelope)["body"]
    return Loss(epsilon=said["epsilon"], delta=said["delta"])


def _own_note(note: str) -> str:
    """A checkpoint with the log key's line, which is its first, alone: who witnesses it is told by the bundle."""
    checkpoint, (own, *_) = opened(note)
    return f"{checkpoint.text()}\n{own.text()}\n"
