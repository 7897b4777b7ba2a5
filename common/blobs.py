"""What both sides of a blob's journey agree on: its name, the size of a chunk, the connection's options, the frames.

Rules:
  * A blob is named by its SHA-256; a run and a site by words that are safe as file names.
  * A chunk's bytes are framed by hand. The frames are what protobuf writes for a message with one `bytes` field, but
    protobuf copies the bytes twice on each side, which is a quarter of the time that a model is on its way.
  * The receive window is fixed. Left to gRPC it grows with the speed of the line, and so does the gateway's memory
    with the number of sites.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

#: Bytes of a blob in one message.
CHUNK = 512 << 10
SERVICE = "locum.v1.Blobs"
#: For server and channel alike. 2 MiB under way are 300 Mbit/s at 50 ms.
OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 << 20),
    ("grpc.max_receive_message_length", 4 << 20),
)

#: What a system calls a file that cannot grow: no space, no quota, a limit.
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

#: Tags of `PutChunk.data` and `Chunk.data`: the field's number and the wire type of `bytes`.
PUT_DATA, GET_DATA = 3 << 3 | 2, 1 << 3 | 2

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
SHA256 = re.compile(r"[0-9a-f]{64}")


class Blob(NamedTuple):
    """A blob's name and how long it is.

    Attributes:
        sha256: of all its bytes, 64 hexadecimal digits.
        size: bytes.
    """

    sha256: str
    size: int


def frames(descriptor: int, tag: int, *, offset: int) -> Iterator[bytes]:
    """The bytes of an open file from `offset` on, each chunk as a serialized message with the one field `tag`."""
    full = _prefix(tag, CHUNK)
    buffer = bytearray(full + bytes(CHUNK))
    data = memoryview(buffer)[len(full) :]
    while length := os.preadv(descriptor, [data], offset):
        yield bytes(buffer) if length == CHUNK else b"".join((_prefix(tag, length), data[:length]))
        offset += length


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Writes all of `content` where the file stands; raises OSError, and then a part of it may be written."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def payload(message: bytes, tag: int) -> memoryview | None:
    """The bytes in a serialized message that has only the field `tag`, in place; None if it has another form."""
    length, position = 0, 1
    while position < min(len(message), 6):
        byte = message[position]
        length |= (byte & 0x7F) << 7 * (position - 1)
        position += 1
        if byte < 0x80:
            plain = message[0] == tag and position + length == len(message)
            return memoryview(message)[position:] if plain else None
    return None


def _prefix(tag: int, length: int) -> bytes:
    """Tag and length, a base-128 varint (Protocol Buffers, "Encoding")."""
    digits = [tag]
    while length >= 0x80:
        digits.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*digits, length])
