"""Canonical bytes and their digest: the one way a document gets an identity (RFC 8785, FIPS 180-4)."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785


def canonical_json(value: Any) -> bytes:
    """RFC 8785 canonical JSON of plain data; raises :class:`rfc8785.CanonicalizationError`."""
    return rfc8785.dumps(value)


def sha256_hex(content: bytes | memoryview) -> str:
    """The SHA-256 of `content`, as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def digest(value: Any) -> str:
    """The SHA-256 of the canonical JSON of `value`, as 64 hexadecimal digits."""
    return sha256_hex(canonical_json(value))
