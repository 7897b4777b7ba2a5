"""Notes: published ones verify, a parser of the test's own agrees, and whatever is changed is refused."""

from __future__ import annotations

import base64
import hashlib
import struct
from datetime import UTC, datetime

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from locum.common.log.note import (
    MOST_BYTES,
    Checkpoint,
    Line,
    NoteError,
    check_cosignature,
    check_signature,
    cosign,
    key_hash,
    opened,
    sign,
    with_lines,
)

ROOT = bytes(range(32))
ORIGIN = "log.example.org/federation"
CHECKPOINT = Checkpoint(ORIGIN, 42, ROOT)
LOG = Ed25519PrivateKey.from_private_bytes(bytes(32))
NORTH, SOUTH = (ec.derive_private_key(number, ec.SECP384R1()) for number in (3, 5))
AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
NOTE = sign(CHECKPOINT, ORIGIN, LOG)
WITNESSED = with_lines(NOTE, [cosign(NOTE, "north", NORTH, AT), cosign(NOTE, "south", SOUTH, AT)])

#: The tree head of Go's checksum database that C2SP's tlog-checkpoint and tlog-cosignature show.
SUM_GOLANG = """\
go.sum database tree
20852163
CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=

— sum.golang.org Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=
"""
#: NAME+HASH+KEY, as they are published.
SUM_GOLANG_KEY = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
NEUMANN_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"


def published(key: str) -> tuple[str, str, Ed25519PublicKey]:
    """Name, key hash and key of a verifier key of Go's `note` package."""
    name, hashed, content = key.split("+", 2)
    typed = base64.b64decode(content)
    assert typed[0] == 1
    return name, hashed, Ed25519PublicKey.from_public_bytes(typed[1:])


def taken_apart(note: str) -> tuple[bytes, list[tuple[str, bytes, bytes]]]:
    """A second reader of notes, after the words of C2SP signed-note: the text, and (name, key hash, signature)."""
    content = note.encode()
    blank = content.rindex(b"\n\n")
    lines = []
    for line in content[blank + 2 :].decode().splitlines():
        dash, name, signature = line.split(" ")
        assert dash == "\u2014"
        decoded = base64.b64decode(signature)
        lines.append((name, decoded[:4], decoded[4:]))
    return content[: blank + 1], lines


# --- what is published


@pytest.mark.parametrize("key", [SUM_GOLANG_KEY, NEUMANN_KEY])
def test_the_hash_of_a_published_key_is_the_published_one(key: str) -> None:
    name, hashed, public = published(key)
    assert key_hash(name, public).hex() == hashed


def test_a_published_checkpoint_is_read_and_verifies() -> None:
    name, _, public = published(SUM_GOLANG_KEY)
    checkpoint = check_signature(SUM_GOLANG, name, public)
    assert (checkpoint.origin, checkpoint.size) == ("go.sum database tree", 20852163)
    assert checkpoint.root == base64.b64decode("CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=")
    with pytest.raises(NoteError, match="is not of this checkpoint"):
        check_signature(SUM_GOLANG.replace("20852163", "20852164"), name, public)


def test_a_published_checkpoint_with_our_witness_is_still_one() -> None:
    name, _, public = published(SUM_GOLANG_KEY)
    both = with_lines(SUM_GOLANG, [cosign(SUM_GOLANG, "north", NORTH, AT)])
    assert both.startswith(SUM_GOLANG)
    check_signature(both, name, public)
    assert check_cosignature(both, "north", NORTH.public_key()) == AT


# --- what is written


def test_the_text_is_three_lines() -> None:
    assert CHECKPOINT.text() == f"{ORIGIN}\n42\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"
    assert Checkpoint.parse(CHECKPOINT.text()) == CHECKPOINT


def test_another_reader_finds_the_logs_signature_over_the_text() -> None:
    text, ((name, hashed, signature),) = taken_apart(NOTE)
    public = LOG.public_key().public_bytes_raw()
    assert text == CHECKPOINT.text().encode()
    assert name == ORIGIN
    assert hashed == hashlib.sha256(ORIGIN.encode() + b"\x0a\x01" + public).digest()[:4]
    LOG.public_key().verify(signature, text)


def test_another_reader_finds_a_witnesss_signature_over_time_and_text() -> None:
    text, lines = taken_apart(WITNESSED)
    assert [name for name, _, _ in lines] == [ORIGIN, "north", "south"]
    _, hashed, content = lines[1]
    numbers = NORTH.public_key().public_numbers()
    point = bytes([2 + numbers.y % 2]) + numbers.x.to_bytes(48, "big")
    assert hashed == hashlib.sha256(b"north\n\xfflocum.p384-cosignature/v1" + point).digest()[:4]
    (time,) = struct.unpack(">Q", content[:8])
    assert time == AT.timestamp()
    message = b"cosignature/v1\ntime %d\n" % time + text
    NORTH.public_key().verify(content[8:], message, ec.ECDSA(hashes.SHA384()))
    with pytest.raises(InvalidSignature):
        NORTH.public_key().verify(content[8:], text, ec.ECDSA(hashes.SHA384()))


def test_both_kinds_of_line_verify_beside_each_other() -> None:
    assert check_signature(WITNESSED, ORIGIN, LOG.public_key()) == CHECKPOINT
    assert check_cosignature(WITNESSED, "north", NORTH.public_key()) == AT
    assert check_cosignature(WITNESSED, "south", SOUTH.public_key()) == AT


def test_a_site_signs_its_own_log_in_the_form_of_a_cosignature() -> None:
    note = sign(Checkpoint("north.example/log", 1, ROOT), "north", NORTH, AT)
    assert check_signature(note, "north", NORTH.public_key()).origin == "north.example/log"
    assert check_cosignature(note, "north", NORTH.public_key()) == AT
    with pytest.raises(NoteError, match="a site signs with the time"):
        sign(CHECKPOINT, "north", NORTH)


@given(st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32), st.datetimes(datetime(1970, 1, 2)))
def test_what_is_signed_is_read_again(size: int, root: bytes, at: datetime) -> None:
    checkpoint, time = Checkpoint("ward 7 (Łódź)", size, root), at.replace(tzinfo=UTC)
    note = sign(checkpoint, "log", LOG)
    note = with_lines(note, [cosign(note, "north", NORTH, time)])
    assert opened(note)[0] == checkpoint
    assert check_cosignature(note, "north", NORTH.public_key()) == time.replace(microsecond=0)
    assert with_lines(note, [line.text() for line in opened(note)[1]]) == note


def test_a_key_signs_a_note_once() -> None:
    later = cosign(NOTE, "north", NORTH, AT.replace(year=2027))
    assert with_lines(WITNESSED, [later]) == WITNESSED
    with pytest.raises(NoteError, match="a key has signed this note twice"):
        opened(f"{WITNESSED}{later}\n")


# --- what is refused


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("log.example.org/other", LOG.public_key()),
        (ORIGIN, Ed25519PrivateKey.from_private_bytes(b"1" * 32).public_key()),
        (ORIGIN, NORTH.public_key()),
        ("north", LOG.public_key()),
        ("north", SOUTH.public_key()),
        ("east", NORTH.public_key()),
    ],
)
def test_another_name_or_another_key_did_not_sign(name: str, key: Ed25519PublicKey | ec.EllipticCurvePublicKey) -> None:
    with pytest.raises(NoteError, match="is not signed by"):
        check_signature(WITNESSED, name, key)


@pytest.mark.parametrize("changed", ["log.example.org/other\n42", f"{ORIGIN}\n43"])
def test_signatures_are_not_of_another_checkpoint(changed: str) -> None:
    note = WITNESSED.replace(f"{ORIGIN}\n42", changed)
    with pytest.raises(NoteError, match=f"{ORIGIN} is not of this checkpoint"):
        check_signature(note, ORIGIN, LOG.public_key())
    with pytest.raises(NoteError, match="north is not of this checkpoint"):
        check_cosignature(note, "north", NORTH.public_key())


def test_the_time_of_a_witness_is_signed_too() -> None:
    north = opened(WITNESSED)[1][1]
    time = int.from_bytes(north.signature[:8], "big") + 1
    moved = Line("north", north.key_hash, time.to_bytes(8, "big") + north.signature[8:]).text()
    with pytest.raises(NoteError, match="north is not of this checkpoint"):
        check_cosignature(with_lines(NOTE, [moved]), "north", NORTH.public_key())


def test_a_logs_signature_cannot_be_passed_off_as_anothers() -> None:
    ours = opened(NOTE)[1][0]
    stolen = Line("north", key_hash("north", NORTH.public_key()), ours.signature).text()
    with pytest.raises(NoteError, match="north"):
        check_cosignature(with_lines(NOTE, [stolen]), "north", NORTH.public_key())


@given(st.integers(0, len(WITNESSED.encode()) - 1), st.integers(0, 7))
def test_no_bit_of_what_is_verified_can_be_changed(at: int, bit: int) -> None:
    content = bytearray(WITNESSED.encode())
    content[at] ^= 1 << bit
    with pytest.raises((NoteError, UnicodeDecodeError)):  # noqa: PT012
        note = content.decode()
        check_signature(note, ORIGIN, LOG.public_key())
        check_cosignature(note, "north", NORTH.public_key())
        check_cosignature(note, "south", SOUTH.public_key())


_TEXT, _LINES = NOTE.split("\n\n")
_SIGNATURE = _LINES.split()[2]


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("", "a note has a blank line before its signatures"),
        (_TEXT, "a note has a blank line before its signatures"),
        (NOTE[:-1], "a note ends with a signature line and its line feed"),
        (f"{_TEXT}\n\n", "a note ends with a signature line and its line feed"),
        (f"{_TEXT}\n\n\n", "a signature line is a dash, a name and base64"),
        (NOTE.replace("— ", "- "), "a signature line is a dash, a name and base64"),
        (NOTE.replace("— ", "—"), "a signature line is a dash, a name and base64"),
        (f"{_TEXT}\n\n— {ORIGIN}\n", "a signature line is a dash, a name and base64"),
        (f"{_TEXT}\n\n—  {_SIGNATURE}\n", "a key's name has letters, and neither space nor plus"),
        (f"{_TEXT}\n\n— a+b {_SIGNATURE}\n", "a key's name has letters, and neither space nor plus"),
        (f"{_TEXT}\n\n— a\u00a0b {_SIGNATURE}\n", "a key's name has letters, and neither space nor plus"),
        (f"{_TEXT}\n\n— a\tb {_SIGNATURE}\n", "a key's name has letters, and neither space nor plus"),
        (f"{_TEXT}\n\n— log {_SIGNATURE}=\n", "a signature is not base64"),
        (f"{_TEXT}\n\n— log  {_SIGNATURE}\n", "a signature is not base64"),
        (f"{_TEXT}\n\n— log {_SIGNATURE} \n", "a signature is not base64"),
        (f"{_TEXT}\n\n— log {_SIGNATURE}\r\n", "a signature is not base64"),
        (f"{_TEXT}\n\n— log AAAA\n", "a signature line holds no signature"),
        (f"{_TEXT}\n\n— log AAAAAB==\n", "a signature is not base64 in its one spelling"),
        (f"{_TEXT}\nextension\n\n{_LINES}", "a checkpoint is three lines: origin, size and root"),
        (f"{ORIGIN}\n42\n\n{_LINES}", "a checkpoint is three lines: origin, size and root"),
        (NOTE.replace("\n42\n", "\n042\n"), "the size of a checkpoint is a whole number, below 2^63"),
        (NOTE.replace("\n42\n", "\n+42\n"), "the size of a checkpoint is a whole number, below 2^63"),
        (NOTE.replace("\n42\n", "\n٤٢\n"), "the size of a checkpoint is a whole number, below 2^63"),
        (NOTE.replace("\n42\n", f"\n{2**63}\n"), "the size of a checkpoint is a whole number, below 2^63"),
        (NOTE.replace("\nAAEC", "\nAA EC"), "the root of a checkpoint is not base64"),
        (NOTE.replace("\nAAEC", "\n"), "the root of a checkpoint has 32 bytes"),
        (NOTE.replace("Hh8=\n", "Hh9=\n"), "the root of a checkpoint is not base64 in its one spelling"),
        (NOTE.replace(f"{ORIGIN}\n42", "\n42"), "the origin of a checkpoint is one line of text"),
        (NOTE.replace(f"{ORIGIN}\n42", "a\tb\n42"), "the origin of a checkpoint is one line of text"),
        (NOTE.replace(f"{ORIGIN}\n42", "a\r\n42"), "the origin of a checkpoint is one line of text"),
        (NOTE.replace(f"{ORIGIN}\n42", "\ud800\n42"), "a note is UTF-8"),
        (NOTE + " " * MOST_BYTES, f"a note is at most {MOST_BYTES} bytes"),
    ],
)
def test_a_malformed_note_is_refused_in_one_sentence(note: str, message: str) -> None:
    with pytest.raises(NoteError) as refused:
        opened(note)
    assert str(refused.value) == message


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\u2003b", "a\ud800"])
def test_nobody_signs_under_a_name_that_can_be_none(name: str) -> None:
    for key in (LOG, NORTH):
        with pytest.raises(NoteError, match="a key's name"):
            sign(CHECKPOINT, name, key, AT)


@pytest.mark.parametrize(
    ("origin", "size", "root"),
    [("", 1, ROOT), ("a\nb", 1, ROOT), ("\ud800", 1, ROOT), ("a", -1, ROOT), ("a", 2**63, ROOT), ("a", 1, b"")],
)
def test_a_checkpoint_that_could_not_be_read_is_not_made(origin: str, size: int, root: bytes) -> None:
    with pytest.raises(NoteError):
        Checkpoint(origin, size, root)


def test_a_time_before_1970_is_not_signed() -> None:
    with pytest.raises(NoteError, match="before 1970"):
        cosign(NOTE, "north", NORTH, datetime(1969, 1, 1, tzinfo=UTC))


def test_a_key_on_another_curve_is_none() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(NoteError, match="neither P-384 nor Ed25519"):
        cosign(NOTE, "north", other, AT)
    with pytest.raises(NoteError, match="neither P-384 nor Ed25519"):
        check_cosignature(WITNESSED, "north", other.public_key())
    with pytest.raises(NoteError, match="a site's key is P-384"):
        check_cosignature(WITNESSED, ORIGIN, LOG.public_key())
