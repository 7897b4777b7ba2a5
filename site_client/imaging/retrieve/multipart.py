"""The parts of a multipart answer (RFC 2046 5.1.1), as they come, each bounded.

Rules:
  * One part is in memory at a time.
  * An answer that ends before its closing line has broken off, and its last part is not handed over: PACSs send answers
    without a length, so that nothing else tells a whole image from half of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from email.message import Message

_BLANK = b"\r\n\r\n"
#: RFC 2046 lets anything stand before the first part; this much is read for it, and for the lines at a part's head.
_MOST_HEAD = 64 << 10


class MultipartError(Exception):
    """An answer that is not what its kind says."""


class BrokenOffError(MultipartError):
    """An answer that ends before its end."""


def media_type(header: str) -> tuple[str, str]:
    """The kind of an answer and its boundary, from Content-Type."""
    message = Message()
    message["content-type"] = header
    return message.get_content_type(), message.get_boundary("") or ""


def parts(chunks: Iterable[bytes], boundary: str, most: int) -> Iterator[bytes]:
    """The contents of the parts.

    Args:
        chunks: the answer, in pieces of any size.
        boundary: of Content-Type.
        most: bytes of one part.

    Raises:
        MultipartError: it is no multipart, or a part is larger than `most`.
        BrokenOffError: it ends before its closing line.
    """
    if not boundary:
        raise MultipartError("no boundary")
    line = b"\r\n--" + boundary.encode("latin-1", "replace")
    rest = iter(chunks)
    data = bytearray(b"\r\n")  # the first delimiter may stand at the very beginning
    _read_to(data, line, rest, _MOST_HEAD)
    while True:
        del data[: data.index(line) + len(line)]
        if _closes(data, rest):
            return
        head = _read_to(data, _BLANK, rest, _MOST_HEAD) + len(_BLANK)
        del data[:head]
        # An empty part's delimiter shares its line end with the head; DICOM has none.
        end = _read_to(data, line, rest, most)
        yield bytes(memoryview(data)[:end])


def _closes(data: bytearray, rest: Iterator[bytes]) -> bool:
    while len(data) < 2:
        data += _next(rest)
    return data.startswith(b"--")


def _read_to(data: bytearray, mark: bytes, rest: Iterator[bytes], most: int) -> int:
    """Read on until `mark` is in the data; returns where."""
    begin = 0
    while (found := data.find(mark, begin)) < 0:
        if len(data) > most:
            raise MultipartError(f"more than {most} bytes in one part")
        # A mark may straddle two chunks.
        begin = max(0, len(data) - len(mark) + 1)
        data += _next(rest)
    if found > most:
        raise MultipartError(f"more than {most} bytes in one part")
    return found


def _next(rest: Iterator[bytes]) -> bytes:
    chunk = next(rest, None)
    if chunk is None:
        raise BrokenOffError
    return chunk
