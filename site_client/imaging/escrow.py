"""Shares of a site's keys, for people who do not trust one drawer: any t of n restore the key file, fewer tell nothing.

Rules:
  * Every key of the ring is shared by Shamir's scheme; a share file holds the same place of all of them.
  * A share says which ring it is of, how many are needed, and carries a checksum: a misread one is named, not used.
  * What is restored is compared with the fingerprint that each share carries: wrong shares give an error, never a
    wrong key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from locum.common.canonical import digest
from locum.common.errors import DataError
from locum.common.secagg.shares import ShareError, combine, split
from locum.site_client.imaging.keys import KeyRing, write_private

_FORMAT = "locum-key-share"
MOST_HOLDERS = 99


@dataclass(frozen=True)
class KeyShare:
    """One holder's share of a ring.

    Attributes:
        ring: the ring's fingerprint.
        place: of the holder, from 1.
        threshold: how many shares restore the ring.
        folds: 33 bytes in hexadecimal; so is each of `names`.
        drawn: the times of the ring, which are no secret.
    """

    ring: str
    place: int
    threshold: int
    holders: int
    folds: str
    names: tuple[str, ...]
    drawn: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """The content of a share file."""
        content = {"format": _FORMAT, "version": 1, **_plain(self)}
        return json.dumps({**content, "checksum": digest(content)}, indent=2).encode() + b"\n"

    @property
    def file_name(self) -> str:
        """How its file is called."""
        return f"locum-key-{self.ring}-share-{self.place:02d}-of-{self.holders:02d}.json"


def _plain(share: KeyShare) -> dict[str, object]:
    return {**asdict(share), "names": list(share.names), "drawn": list(share.drawn)}


def shares_of(ring: KeyRing, threshold: int, holders: int) -> tuple[KeyShare, ...]:
    """The shares of a ring; other ones at each call.

    Raises:
        DataError: not 2 ≤ threshold ≤ holders ≤ 99.
    """
    if not 2 <= threshold <= holders <= MOST_HOLDERS:
        raise DataError(
            f"{threshold} of {holders} shares cannot be", f"at least 2 must be needed, of at most {MOST_HOLDERS}"
        )
    folds = split(ring.folds, threshold, holders)
    names = [split(key, threshold, holders) for key in ring.names]
    return tuple(
        KeyShare(
            ring=ring.fingerprint,
            place=at + 1,
            threshold=threshold,
            holders=holders,
            folds=folds[at].hex(),
            names=tuple(key[at].hex() for key in names),
            drawn=ring.drawn,
        )
        for at in range(holders)
    )


def write_shares(shares: Sequence[KeyShare], folder: Path) -> tuple[Path, ...]:
    """Write each share to a file of its own that only its owner may read.

    Raises:
        DataError: the folder cannot be written.
    """
    paths = [folder / share.file_name for share in shares]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for share, path in zip(shares, paths, strict=True):
            write_private(path, share.to_bytes())
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}", "name another folder with --into") from None
    return tuple(paths)


def read_share(path: Path) -> KeyShare:
    """Read a share file.

    Raises:
        DataError: it cannot be read, is no share, or its checksum is wrong.
    """
    try:
        document = json.loads(path.read_bytes())
        stated = document.pop("checksum")
        written = {"format": document.pop("format"), "version": document.pop("version")}
        share = KeyShare(**{**document, "names": tuple(document["names"]), "drawn": tuple(document["drawn"])})
        bytes.fromhex("".join((share.folds, *share.names)))
    except OSError as error:
        raise DataError(f"the share {path} cannot be read: {error.strerror}", "check its path") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is no share of a key", "give the files that locum site key escrow wrote") from None
    if written != {"format": _FORMAT, "version": 1}:
        raise DataError(f"the share {path} is in another format", "use the software that wrote it")
    if digest({**written, **_plain(share)}) != stated:
        raise DataError(f"the share {path} is damaged: its checksum is wrong", "use another holder's share")
    return share


def restored(shares: Sequence[KeyShare]) -> KeyRing:
    """The ring of at least `threshold` shares.

    Raises:
        DataError: they are of different rings or splits, too few, or do not make the ring that they name.
    """
    if not shares or len({(share.ring, share.threshold, share.holders) for share in shares}) != 1:
        raise DataError("the shares are not of one key", "give shares with the same name up to 'share'")
    first = shares[0]
    placed = {share.place: share for share in shares}
    if len(placed) < first.threshold:
        raise DataError(
            f"{len(placed)} different shares are too few", f"{first.threshold} of {first.holders} are needed"
        )
    chosen = dict(sorted(placed.items())[: first.threshold])
    try:
        folds = combine({place: bytes.fromhex(share.folds) for place, share in chosen.items()})
        names = [
            combine({place: bytes.fromhex(share.names[at]) for place, share in chosen.items()})
            for at in range(len(first.names))
        ]
        ring = KeyRing(folds, tuple(names), first.drawn)
    except (ShareError, ValueError, IndexError):
        raise _no_ring() from None
    if ring.fingerprint != first.ring:
        raise _no_ring()
    return ring


def _no_ring() -> DataError:
    return DataError("these shares do not make the key that they name", "they are of different escrows: use one set")
