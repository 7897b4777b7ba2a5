"""What left a site, read from its own log after that was checked.

Rules:
  * Every entry is hashed and compared with the tree, and every checkpoint with both; each must be signed with the
    site's key, or with one that it had before it enrolled anew.
  * Nothing is told of a log that was changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from locum.common.identity import PublicKey, certified_key, load_certificate
from locum.common.log.entries import RefusalEntry, ReleaseEntry, read_entry
from locum.common.log.note import Checkpoint, NoteError, check_cosignature, opened
from locum.common.log.store import Log, LogError
from locum.site_client.identity import FOLDER as IDENTITY
from locum.site_client.identity import load_identity
from locum.site_client.releases import COSIGNATURE, FOLDER, REPORT, open_releases


@dataclass(frozen=True)
class Released:
    """One release.

    Attributes:
        index: of its entry, from 0.
        entry: what was written down.
        clause: of an answer that refuses, the policy's key.
    """

    index: int
    entry: ReleaseEntry
    clause: str | None = None

    @property
    def is_routine(self) -> bool:
        """Whether it says only what the agent does, or that it has seen the federation's log."""
        return self.entry.purpose == COSIGNATURE or self.entry.purpose.startswith(f"{REPORT}.")

    def as_dict(self) -> dict[str, object]:
        """The entry for scripts."""
        return {"index": self.index, **self.entry.model_dump(mode="json", exclude={"kind"}), "clause": self.clause}


@dataclass(frozen=True)
class Account:
    """A site's own log, checked, with a checkpoint of all of it.

    Attributes:
        log: the entries.
        checkpoint: signed now, or before if nothing has come since.
    """

    log: Log
    checkpoint: Checkpoint

    def releases(self, run: str | None = None, since: str = "") -> Iterator[Released]:
        """What left, in order; of one run, or since a time as it stands in entries."""
        clause: str | None = None
        for index, leaf in enumerate(self.log.entries(0, self.checkpoint.size)):
            entry = read_entry(leaf)
            if isinstance(entry, ReleaseEntry) and entry.at >= since and run in {None, entry.run}:
                yield Released(index, entry, clause)
            clause = entry.clause if isinstance(entry, RefusalEntry) else None


def account(home: Path) -> Account:
    """Checks a site's log and signs it as it is; raises LogError, DataError if nobody is enrolled, and OSError."""
    releases = open_releases(home)
    _check(releases.log, home)
    releases.seal()
    note = releases.log.latest()
    if note is None:
        raise ValueError("the log has just been signed")
    return Account(releases.log, opened(note)[0])


def _check(log: Log, home: Path) -> None:
    keys = list(_keys(home))
    for note in log.checkpoints():
        checkpoint, _ = opened(note)
        if log.root(checkpoint.size) != checkpoint.root:
            raise _changed(home, checkpoint, "it is not that of the entries")
        if not any(_is_signed(note, log.origin, key) for key in keys):
            raise _changed(home, checkpoint, "no key that this site has or had signed it")


def _changed(home: Path, checkpoint: Checkpoint, why: str) -> LogError:
    reason = f"the log in {home / FOLDER} was changed: of the checkpoint of {checkpoint.size} entries, {why}"
    return LogError(reason, "restore the folder from a backup, and find out who wrote there")


def _keys(home: Path) -> Iterator[PublicKey]:
    """The site's key, and those of identities that were replaced."""
    yield load_identity(home).key.public_key()
    for folder in home.glob(f"{IDENTITY}.until-*"):
        yield certified_key(load_certificate(folder / "site.pem"))


def _is_signed(note: str, name: str, key: PublicKey) -> bool:
    try:
        check_cosignature(note, name, key)
    except NoteError:
        return False
    return True
