"""The site's secret keys, and the names that are made with them.

Rules:
  * The keys never leave the site; whoever lacks them can neither recompute a pseudonym nor predict a fold.
  * Every use has its own purpose word, and no purpose word is the beginning of another.
  * Pseudonyms can be renewed with another key; the folds of patients stay, for they have a key of their own.
  * The key file is whole at any moment, and readable by its owner only. It keeps earlier keys, so that a name that was
    given once can be found again.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import unicodedata
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

from pydicom._uid_dict import UID_dictionary

from locum.common.durable import flush, replace_file
from locum.common.errors import DataError
from locum.common.identity import utc_now

KEY_BYTES = 32
_FORMAT = "locum-site-keys"
#: Dates move back by 1 to so many days: ten years at most, so that no date lies in the future (PS3.15 E.3.6).
_MOST_DAYS = 3652


@dataclass(frozen=True)
class Keys:
    """A site's keys, 32 bytes each.

    Attributes:
        names: makes pseudonyms, UIDs and shifts of dates.
        folds: makes the places of patients in the split; it outlives `names`.
    """

    names: bytes = field(repr=False)
    folds: bytes = field(repr=False)

    @classmethod
    def of(cls, key: bytes) -> Keys:
        """Keys of a site that has only ever had one."""
        return cls(key, key)

    def patient(self, patient_id: str) -> str:
        """The patient's pseudonym, 16 hexadecimal characters; empty for an empty ID."""
        return keyed(self.names, "patient", _one_form(patient_id)).hex()[:16] if patient_id else ""

    def accession(self, number: str) -> str:
        """The name of an accession number, 16 hexadecimal characters; empty for an empty one."""
        return keyed(self.names, "accession", _one_form(number)).hex()[:16] if number else ""

    def uid(self, uid: str) -> str:
        """The name of a UID: a UUID-derived UID (PS3.5 B.2) of 128 keyed bits; those of the standard stay.

        SOP classes, transfer syntaxes and the like (PS3.6 Annex A) name no patient. Another UID below the standard's
        root may: somebody has made it up, of a number or a date.
        """
        if not uid or uid in UID_dictionary:
            return uid
        return f"2.25.{int.from_bytes(keyed(self.names, 'uid', uid)[:16], 'big')}"

    def days(self, patient_id: str) -> int:
        """By how many days a patient's dates move back, 1 to 3652."""
        return 1 + int.from_bytes(keyed(self.names, "shift", _one_form(patient_id))[:8], "big") % _MOST_DAYS

    def case(self, unit: str) -> str:
        """The name of a case and of its files in the store, 16 hexadecimal characters."""
        return keyed(self.names, "case", unit).hex()[:16]

    def place(self, patient_id: str) -> float:
        """The patient's place u in [0, 1), by which the folds are cut: the same whatever `names` is."""
        pseudonym = keyed(self.folds, "patient", _one_form(patient_id)).hex()[:16]
        # HMAC-SHA256(key, "split" || pseudonym) / 2²⁵⁶, to the 53 bits of a float.
        return (int.from_bytes(keyed(self.folds, "split", pseudonym), "big") >> (256 - 53)) / 2.0**53

    @cached_property
    def fingerprint(self) -> str:
        """What a catalog keeps to recognise its keys, 16 hexadecimal characters; they cannot be found from it."""
        return keyed(self.names, "fingerprint", "").hex()[:16]


def _one_form(text: str) -> str:
    """A name in one of the forms that Unicode has for it (NFC): systems write the same letters in different ones."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


@lru_cache(maxsize=256)  # the images of a study name the same patient and the same UIDs
def keyed(key: bytes, purpose: str, text: str) -> bytes:
    """HMAC-SHA256 (RFC 2104) of `text` for one purpose: 32 bytes."""
    return hmac.digest(key, purpose.encode() + text.encode("utf-8", "surrogateescape"), "sha256")


# --- the file


@dataclass(frozen=True)
class KeyRing:
    """All keys that a site has ever had, as its key file holds them.

    Attributes:
        folds: 32 bytes; drawn once.
        names: 32 bytes each, the oldest first; the last one makes names now.
        drawn: when each of `names` was drawn, in UTC; empty if nobody wrote it down.
    """

    folds: bytes = field(repr=False)
    names: tuple[bytes, ...] = field(repr=False)
    drawn: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.drawn):
            raise ValueError("a key ring has a key for names, and a time for each")
        if any(len(key) != KEY_BYTES for key in (self.folds, *self.names)):
            raise ValueError(f"a key has {KEY_BYTES} bytes")

    @classmethod
    def new(cls) -> KeyRing:
        """A ring with a first key of each kind, from the system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES), (secrets.token_bytes(KEY_BYTES),), (_now(),))

    def rotated(self) -> KeyRing:
        """The ring with one more key for names; folds stay."""
        return replace(self, names=(*self.names, secrets.token_bytes(KEY_BYTES)), drawn=(*self.drawn, _now()))

    @property
    def keys(self) -> Keys:
        """The keys that are used now."""
        return Keys(self.names[-1], self.folds)

    @cached_property
    def fingerprint(self) -> str:
        """By which shares of a ring are recognised, 16 hexadecimal characters; no key can be found from it."""
        return keyed(self.folds, "ring", "".join(key.hex() for key in self.names)).hex()[:16]

    def to_bytes(self) -> bytes:
        """The content of a key file."""
        names = [{"key": key.hex(), "drawn": drawn} for key, drawn in zip(self.names, self.drawn, strict=True)]
        document = {"format": _FORMAT, "version": 1, "folds": self.folds.hex(), "names": names}
        return json.dumps(document, indent=2).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes) -> KeyRing:
        """What :meth:`to_bytes` wrote, or the 32 bytes of a site that has only ever had one key; raises ValueError."""
        if len(content) == KEY_BYTES:
            return cls(content, (content,), ("",))
        try:
            document = json.loads(content)
            if document["format"] != _FORMAT or document["version"] != 1:
                raise ValueError("another format")
            names = tuple(bytes.fromhex(name["key"]) for name in document["names"])
            drawn = tuple(str(name["drawn"]) for name in document["names"])
            return cls(bytes.fromhex(document["folds"]), names, drawn)
        except (KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"no key ring: {type(error).__name__}") from None


def _now() -> str:
    return utc_now().strftime("%Y-%m-%dT%H:%M:%SZ")


def load_or_create_keys(path: Path) -> Keys:
    """Read a site's keys; absent ones are drawn from the system's randomness and kept with mode 0600.

    Raises:
        DataError: the file holds no key, or cannot be read or written.
    """
    try:
        ring = KeyRing.new()
        create_ring(path, ring)
    except FileExistsError:
        ring = load_ring(path)
    except OSError as error:
        raise DataError(
            f"the key file {path} cannot be written: {error.strerror}", "name another place with --key-file"
        ) from None
    return ring.keys


def load_ring(path: Path) -> KeyRing:
    """Read a key file.

    Raises:
        DataError: it is not there, cannot be read, or holds no key.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no key file {path}", "name it with --key-file; ingest draws one") from None
    except OSError as error:
        raise DataError(f"the key file {path} cannot be read: {error.strerror}", "mend its access rights") from None
    try:
        return KeyRing.from_bytes(content)
    except ValueError:
        raise DataError(
            f"the key file {path} holds {len(content)} bytes that are no key",
            "restore it from a backup or from its shares (locum site key restore)",
        ) from None


def create_ring(path: Path, ring: KeyRing) -> None:
    """Write a key file where none is, whole or not at all; raises FileExistsError, OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write_private(beside, ring.to_bytes())
        os.link(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    flush(path.parent)


def replace_ring(path: Path, ring: KeyRing) -> None:
    """Replace a key file, atomically; raises OSError and then leaves the old one."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)  # of a run that was killed: it may hold a key
    replace_file(path, lambda beside: write_private(beside, ring.to_bytes()))


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may ever read, and flush it to the disk."""
    path.unlink(missing_ok=True)  # of an interrupted run; its mode would stay
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
