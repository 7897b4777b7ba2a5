"""The site's secret key, and the names that are made with it.

Rules:
  * The key never leaves the site; whoever lacks it can neither recompute a pseudonym nor predict a fold.
  * Every use has its own purpose word, and no purpose word is the beginning of another.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path

from locum.common.errors import DataError

KEY_BYTES = 32


def keyed(key: bytes, purpose: str, text: str) -> bytes:
    """HMAC-SHA256 (RFC 2104) of `text` for one purpose: 32 bytes."""
    return hmac.digest(key, purpose.encode() + text.encode("utf-8", "surrogateescape"), "sha256")


def pseudonym(key: bytes, patient_id: str) -> str:
    """The patient's name within the catalog: 16 hexadecimal characters."""
    return keyed(key, "patient", patient_id).hex()[:16]


def case_id(key: bytes, unit: str) -> str:
    """The name of a case and of its files in the store: 16 hexadecimal characters."""
    return keyed(key, "case", unit).hex()[:16]


def fingerprint(key: bytes) -> str:
    """What a catalog keeps to recognise its key, 16 hexadecimal characters; the key cannot be found from it."""
    return keyed(key, "fingerprint", "").hex()[:16]


def load_or_create_key(path: Path) -> bytes:
    """Read a site key of 32 bytes; an absent one is drawn from the system's randomness and kept with mode 0600.

    Raises:
        DataError: the file is no key, or cannot be read or written.
    """
    try:
        return _create(path)
    except FileExistsError:
        return _read(path)
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
