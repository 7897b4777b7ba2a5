"""A model on its way down: its file under AES-256 in counter mode, from the first byte to the last.

The content key is given to each site of the roster, sealed. The mode hides and does not prove. What proves is the
SHA-256 of the file in the clear: it stands in the signed context of the sum, and nothing is used that has another.
"""

from __future__ import annotations

import os
from pathlib import Path

from locum.common.blobs import write_all
from locum.common.secagg import keys
from locum.common.secagg.masks import Stream

_PIECE = 1 << 20


def name_of(key: bytes) -> str:
    """Under which name the encrypted file travels: 64 hexadecimal digits that tell nothing of key or content."""
    return keys.derive(key, "name").hex()


def seal_file(source: Path, target: Path, key: bytes) -> None:
    """Writes the encrypted bytes of a file to another; raises OSError."""
    stream, out = Stream(key), bytearray(_PIECE)
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as sealed:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        data = memoryview(bytearray(_PIECE))
        while length := file.readinto(data):
            stream.mix(data[:length], memoryview(out)[:length])
            write_all(sealed.fileno(), memoryview(out)[:length])


def seal_bytes(content: bytes, key: bytes) -> bytes:
    """A small file's bytes, encrypted; encrypted ones, as they were."""
    out = bytearray(len(content))
    Stream(key).mix(memoryview(content), memoryview(out))
    return bytes(out)
