"""Signed checkpoints in the text form of C2SP: signed-note, tlog-checkpoint and tlog-cosignature.

Rules:
  * A checkpoint is three lines: whose log (the origin), its number of entries, its root in base64. We write no
    extension lines, and refuse them: all that is signed is understood.
  * A signature is one line, `— NAME BASE64`, of four bytes that tell the key and what the key made. The log's key is
    Ed25519 (type 0x01). A site has one key and that is P-384 (decision 0010), which C2SP has no type for: its lines are
    of type 0xff with the identifier :data:`COSIGNATURE`, and hold the time (8 bytes, big-endian, seconds since 1970)
    and an ECDSA signature with SHA-384 (DER).
  * What a site signs is the message of tlog-cosignature: "cosignature/v1", the time, the checkpoint. It signs its own
    log in the same form.
  * A note is spelt in one way. A key signs it once.
  * A line whose key nobody asks for is carried and not judged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from locum.common.identity import PrivateKey, PublicKey, is_p384
from locum.common.log.merkle import HASH_BYTES

#: What stands for the signature type of a site's lines.
COSIGNATURE = "locum.p384-cosignature/v1"
#: A thousand witnesses have room.
MOST_BYTES = 256 << 10
_ED25519, _OTHER = b"\x01", b"\xff"
_KEY_HASH_BYTES, _TIME_BYTES = 4, 8
_ECDSA = ec.ECDSA(hashes.SHA384())
_DASH = "— "
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NO_NAME = re.compile(r"[\s+\x00-\x1f\x7f\ud800-\udfff]")
#: Seconds since 1970: up to the year 9999.
_MOST_TIME = 253_402_300_799


class NoteError(ValueError):
    """A note that is malformed, or not signed as it should be; the text says why, in one sentence."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a log.

    Attributes:
        origin: whose log it is, one line.
        size: how many entries it has.
        root: the root of the tree over them, 32 bytes.
    """

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        if not self.origin or "\n" in self.origin or _CONTROL.search(self.origin):
            raise NoteError("the origin of a checkpoint is one line of text")
        if not 0 <= self.size < 1 << 63:
            raise NoteError("the size of a checkpoint is a whole number, below 2^63")
        if len(self.root) != HASH_BYTES:
            raise NoteError(f"the root of a checkpoint has {HASH_BYTES} bytes")

    def text(self) -> str:
        """What is signed: three lines, each with its end."""
        return f"{self.origin}\n{self.size}\n{_base64(self.root)}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """The checkpoint that a text is; raises NoteError."""
        lines = text.split("\n")
        if len(lines) != 4 or lines[-1]:
            raise NoteError("a checkpoint is three lines: origin, size and root")
        origin, size, root, _ = lines
        if not _SIZE.fullmatch(size):
            raise NoteError("the size of a checkpoint is a whole number, below 2^63")
        return cls(origin, int(size), _base64_bytes(root, "the root of a checkpoint"))


@dataclass(frozen=True)
class Line:
    """A signature line.

    Attributes:
        name: of the key: letters without space or plus.
        key_hash: which key, 4 bytes.
        signature: what the key made; its form is that of the key's type.
    """

    name: str
    key_hash: bytes
    signature: bytes

    def text(self) -> str:
        """The line, without its end."""
        return f"{_DASH}{self.name} {_base64(self.key_hash + self.signature)}"

    @classmethod
    def parse(cls, text: str) -> Line:
        """A line, without its end; raises NoteError."""
        name, space, signature = text.removeprefix(_DASH).partition(" ")
        if not text.startswith(_DASH) or not space:
            raise NoteError("a signature line is a dash, a name and base64")
        _check_name(name)
        content = _base64_bytes(signature, "a signature")
        if len(content) <= _KEY_HASH_BYTES:
            raise NoteError("a signature line holds no signature")
        return cls(name, content[:_KEY_HASH_BYTES], content[_KEY_HASH_BYTES:])


def key_hash(name: str, public_key: PublicKey) -> bytes:
    """SHA-256(name ‖ line feed ‖ type ‖ public key), the first 4 bytes; raises NoteError for a name that is none."""
    _check_name(name)
    if isinstance(public_key, ed25519.Ed25519PublicKey):
        typed = _ED25519 + public_key.public_bytes_raw()
    elif is_p384(public_key):
        point = public_key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        typed = _OTHER + COSIGNATURE.encode() + point
    else:
        raise NoteError("the key is neither P-384 nor Ed25519")
    return hashlib.sha256(name.encode() + b"\n" + typed).digest()[:_KEY_HASH_BYTES]


# --- signing


def sign(checkpoint: Checkpoint, name: str, key: PrivateKey, at: datetime | None = None) -> str:
    """A note: the checkpoint and a signature by the log's owner.

    Args:
        checkpoint: what to sign.
        name: of the key; C2SP recommends the origin.
        key: the log's key, or a site's. A site's signs in the form of a cosignature.
        at: the time, for a site's key.

    Raises:
        NoteError: a name that can be none, or no time for a site's key.
    """
    text = checkpoint.text()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        line = Line(name, key_hash(name, key.public_key()), key.sign(text.encode())).text()
    elif at is None:
        raise NoteError("a site signs with the time")
    else:
        line = _cosigned(text, name, key, at)
    return f"{text}\n{line}\n"


def cosign(note: str, name: str, key: ec.EllipticCurvePrivateKey, at: datetime) -> str:
    """A witness's line, without its end; whether the log is a continuation is for the caller to know.

    Raises NoteError for a note that is none, and a name or a time that can be none.
    """
    return _cosigned(opened(note)[0].text(), name, key, at)


def _cosigned(text: str, name: str, key: ec.EllipticCurvePrivateKey, at: datetime) -> str:
    time = int(at.replace(microsecond=0).timestamp())
    if not 0 <= time <= _MOST_TIME:
        raise NoteError("a time before 1970 cannot be signed")
    signature = key.sign(_cosignature_message(text, time), _ECDSA)
    return Line(name, key_hash(name, key.public_key()), time.to_bytes(_TIME_BYTES, "big") + signature).text()


def _cosignature_message(text: str, time: int) -> bytes:
    return f"cosignature/v1\ntime {time}\n{text}".encode()


def with_lines(note: str, lines: Iterable[str]) -> str:
    """The note with more lines; of a key that has signed, no second one. Raises NoteError."""
    checkpoint, found = opened(note)
    kept = {(line.name, line.key_hash): line for line in found}
    for text in lines:
        line = Line.parse(text)
        kept.setdefault((line.name, line.key_hash), line)
    return f"{checkpoint.text()}\n{''.join(line.text() + chr(10) for line in kept.values())}"


# --- reading


def opened(note: str) -> tuple[Checkpoint, tuple[Line, ...]]:
    """What a note says and who signed it; no signature is checked. Raises NoteError."""
    try:
        size = len(note.encode())
    except UnicodeEncodeError as error:
        raise NoteError("a note is UTF-8") from error
    if size > MOST_BYTES:
        raise NoteError(f"a note is at most {MOST_BYTES} bytes")
    text, blank, signatures = note.partition("\n\n")
    if not blank:
        raise NoteError("a note has a blank line before its signatures")
    if not signatures.endswith("\n"):
        raise NoteError("a note ends with a signature line and its line feed")
    lines = tuple(Line.parse(line) for line in signatures[:-1].split("\n"))
    if len({(line.name, line.key_hash) for line in lines}) < len(lines):
        raise NoteError("a key has signed this note twice")
    return Checkpoint.parse(text + "\n"), lines


def check_signature(note: str, name: str, public_key: PublicKey) -> Checkpoint:
    """The checkpoint, if the key of that name signed it; a site's key in its own form. Raises NoteError."""
    if not isinstance(public_key, ed25519.Ed25519PublicKey):
        check_cosignature(note, name, public_key)
        return opened(note)[0]
    checkpoint, line = _line_of(note, name, public_key)
    _verify_ed25519(public_key, line, checkpoint.text().encode())
    return checkpoint


def check_cosignature(note: str, name: str, public_key: PublicKey) -> datetime:
    """When the site of that name signed this checkpoint, by its clock, UTC. Raises NoteError."""
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        raise NoteError("a site's key is P-384")
    checkpoint, line = _line_of(note, name, public_key)
    time = int.from_bytes(line.signature[:_TIME_BYTES], "big")
    if len(line.signature) <= _TIME_BYTES or time > _MOST_TIME:
        raise NoteError(f"the line of {name} holds no time and signature")
    try:
        public_key.verify(line.signature[_TIME_BYTES:], _cosignature_message(checkpoint.text(), time), _ECDSA)
    except InvalidSignature as error:
        raise NoteError(f"the signature of {name} is not of this checkpoint") from error
    return datetime.fromtimestamp(time, UTC)


def _line_of(note: str, name: str, public_key: PublicKey) -> tuple[Checkpoint, Line]:
    checkpoint, lines = opened(note)
    expected = key_hash(name, public_key)
    for line in lines:
        if (line.name, line.key_hash) == (name, expected):
            return checkpoint, line
    raise NoteError(f"the checkpoint is not signed by {name} with the key expected")


def _verify_ed25519(key: ed25519.Ed25519PublicKey, line: Line, content: bytes) -> None:
    try:
        key.verify(line.signature, content)
    except InvalidSignature as error:
        raise NoteError(f"the signature of {line.name} is not of this checkpoint") from error


# --- letters


def _check_name(name: str) -> None:
    if not name or _NO_NAME.search(name):
        raise NoteError("a key's name has letters, and neither space nor plus")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _base64_bytes(text: str, what: str) -> bytes:
    """The bytes of standard base64 (RFC 4648, section 4), of which there is one spelling; raises NoteError."""
    try:
        content = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise NoteError(f"{what} is not base64") from error
    if _base64(content) != text:
        raise NoteError(f"{what} is not base64 in its one spelling")
    return content
