"""The site's secret keys, and the names that are made with them.

Rules:
  * The keys never leave the site; whoever lacks them can neither recompute a pseudonym nor predict a fold.
  * Every use has its own purpose word, and no purpose word is the beginning of another.
  * Pseudonyms can be renewed with another key; the folds of patients stay, for they have a key of their own.
"""

from __future__ import annotations

import hmac
import os
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from locum.common.errors import DataError

KEY_BYTES = 32
#: UIDs of the standard itself (SOP classes, transfer syntaxes, well-known frames of reference) name no patient.
_STANDARD_ROOT = "1.2.840.10008."
#: Dates move back by 1 to so many days: ten years at most, so that no date lies in the future (PS3.15 E.3.6).
_MOST_DAYS = 3652


@dataclass(frozen=True)
class Keys:
    """A site's keys, 32 bytes each.

    Attributes:
        names: makes pseudonyms, UIDs and shifts of dates.
        folds: makes the places of patients in the split; it outlives `names`.
    """

    names: bytes
    folds: bytes

    @classmethod
    def of(cls, key: bytes) -> Keys:
        """Keys of a site that has only ever had one."""
        return cls(key, key)

    def patient(self, patient_id: str) -> str:
        """The patient's pseudonym, 16 hexadecimal characters; empty for an empty ID."""
        return keyed(self.names, "patient", patient_id).hex()[:16] if patient_id else ""

    def accession(self, number: str) -> str:
        """The name of an accession number, 16 hexadecimal characters; empty for an empty one."""
        return keyed(self.names, "accession", number).hex()[:16] if number else ""

    def uid(self, uid: str) -> str:
        """The name of a UID: a UUID-derived UID (PS3.5 B.2) of 128 keyed bits; those of the standard stay."""
        if not uid or uid.startswith(_STANDARD_ROOT):
            return uid
        return f"2.25.{int.from_bytes(keyed(self.names, 'uid', uid)[:16], 'big')}"

    def days(self, patient_id: str) -> int:
        """By how many days a patient's dates move back, 1 to 3652."""
        return 1 + int.from_bytes(keyed(self.names, "shift", patient_id)[:8], "big") % _MOST_DAYS

    def case(self, unit: str) -> str:
        """The name of a case and of its files in the store, 16 hexadecimal characters."""
        return keyed(self.names, "case", unit).hex()[:16]

    def place(self, patient_id: str) -> float:
        """The patient's place u in [0, 1), by which the folds are cut: the same whatever `names` is."""
        pseudonym = keyed(self.folds, "patient", patient_id).hex()[:16]
        # HMAC-SHA256(key, "split" || pseudonym) / 2²⁵⁶, to the 53 bits of a float.
        return (int.from_bytes(keyed(self.folds, "split", pseudonym), "big") >> (256 - 53)) / 2.0**53

    @cached_property
    def fingerprint(self) -> str:
        """What a catalog keeps to recognise its keys, 16 hexadecimal characters; they cannot be found from it."""
        return keyed(self.names, "fingerprint", "").hex()[:16]


def keyed(key: bytes, purpose: str, text: str) -> bytes:
    """HMAC-SHA256 (RFC 2104) of `text` for one purpose: 32 bytes."""
    return hmac.digest(key, purpose.encode() + text.encode("utf-8", "surrogateescape"), "sha256")


def load_or_create_keys(path: Path) -> Keys:
    """Read a site's keys; absent ones are drawn from the system's randomness and kept with mode 0600.

    Raises:
        DataError: the file holds no key, or cannot be read or written.
    """
    try:
        return Keys.of(_create(path))
    except FileExistsError:
        return Keys.of(_read(path))
    except OSError as error:
        raise DataError(
            f"the key file {path} cannot be written: {error.strerror}", "name another place with --key-file"
        ) from None


def _create(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        key = secrets.token_bytes(KEY_BYTES)
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    return key


def _read(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise DataError(f"the key file {path} cannot be read: {error.strerror}", "mend its access rights") from None
    if len(key) != KEY_BYTES:
        raise DataError(
            f"the key file {path} holds {len(key)} bytes instead of {KEY_BYTES}",
            "restore it from a backup, or delete it and the store to start afresh",
        )
    return key
