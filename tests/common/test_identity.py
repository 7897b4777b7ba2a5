from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from locum.common.errors import DataError
from locum.common.identity import (
    IdentityError,
    Invitation,
    Subject,
    base64url,
    base64url_bytes,
    certificate_request,
    certified_key,
    invitation_key,
    is_site_name,
    load_ec_key,
    load_key,
    new_key,
    new_token,
    parse_request,
    read_invitation,
    request_mac,
    save_key,
    subject_of,
    token_sha256,
    write_invitation,
)

SUBJECT = Subject("Federation", "site", "berlin")
REQUEST = certificate_request(SUBJECT, new_key())
ORDER = int("ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973", 16)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def _invitation(**changes: object) -> Invitation:
    fields = {
        "federation": "Federation",
        "site": "berlin",
        "address": "coordinator.example.org:8443",
        "authority": "PEM",
        "certificate": "PEM",
        "token": SecretStr(base64url(bytes(32))),
        "expires": datetime(2030, 1, 1, tzinfo=UTC),
    }
    return Invitation(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [new_key(), ed25519.Ed25519PrivateKey.generate()])
def test_a_key_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path, open_umask: None, key: object) -> None:
    save_key(tmp_path / "key", key)  # type: ignore[arg-type]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert load_key(tmp_path / "key").public_key() == key.public_key()  # type: ignore[attr-defined]


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    save_key(tmp_path / "key", new_key())
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(FileExistsError):
        save_key(tmp_path / "key", new_key())
    assert (tmp_path / "key").read_bytes() == before


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    save_key(tmp_path / "key", new_key())
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(DataError, match="can be read by others") as refused:
        load_key(tmp_path / "key")
    assert "chmod 600" in refused.value.remedy


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_key_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(DataError, match="holds no private key"):
        load_ec_key(tmp_path / "key")


def test_a_key_of_another_curve_is_refused(tmp_path: Path) -> None:
    save_key(tmp_path / "key", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(DataError, match="another kind than P-384"):
        load_ec_key(tmp_path / "key")


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_an_invitations_key_is_a_function_of_its_token_within_the_group(token: bytes) -> None:
    scalar = invitation_key(token).private_numbers().private_value
    assert scalar == invitation_key(token).private_numbers().private_value
    assert 1 <= scalar < ORDER


def test_an_invitations_key_stays_the_same_between_versions() -> None:
    """HKDF-SHA384 (RFC 5869) by hand, from HMAC alone."""
    import hmac

    token = bytes(range(32))
    extracted = hmac.digest(bytes(48), token, "sha384")
    first = hmac.digest(extracted, b"locum invitation\x01", "sha384")
    second = hmac.digest(extracted, first + b"locum invitation\x02", "sha384")
    expected = int.from_bytes((first + second)[:64], "big") % (ORDER - 1) + 1
    assert invitation_key(token).private_numbers().private_value == expected


def test_two_tokens_never_agree() -> None:
    keys = {invitation_key(new_token()).private_numbers().private_value for _ in range(50)}
    assert len(keys) == 50


def test_a_request_names_its_subject_and_key() -> None:
    key = new_key()
    request = parse_request(certificate_request(SUBJECT, key))
    assert subject_of(request) == SUBJECT
    assert certified_key(request) == key.public_key()


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_request_that_was_changed_is_refused(data: st.DataObject) -> None:
    request = x509.load_pem_x509_csr(REQUEST)
    der = bytearray(request.public_bytes(serialization.Encoding.DER))
    # How many bits of the signature's last byte count changes nothing of what is signed, and is not part of it.
    unused_bits = len(der) - len(request.signature) - 1
    place = data.draw(st.integers(0, len(der) - 1).filter(lambda place: place != unused_bits))
    der[place] ^= data.draw(st.integers(1, 255))
    body = base64url(bytes(der)).replace("-", "+").replace("_", "/")
    body += "=" * (-len(body) % 4)
    lines = "\n".join(body[start : start + 64] for start in range(0, len(body), 64))
    changed = f"-----BEGIN CERTIFICATE REQUEST-----\n{lines}\n-----END CERTIFICATE REQUEST-----\n".encode()
    with pytest.raises(IdentityError):
        parse_request(changed)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_no_bytes_are_mistaken_for_a_request(content: bytes) -> None:
    with pytest.raises(IdentityError):
        parse_request(content)


def test_a_request_of_another_curve_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(SUBJECT.to_x509()).sign(key, hashes.SHA256())
    with pytest.raises(IdentityError, match="neither P-384"):
        parse_request(request.public_bytes(serialization.Encoding.PEM))


def test_a_subject_of_other_parts_is_refused() -> None:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "berlin")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(new_key(), hashes.SHA384())
    with pytest.raises(IdentityError, match="federation, role and name"):
        subject_of(request)


def test_the_mac_depends_on_token_and_request() -> None:
    token, request = new_token(), b"request"
    macs = {
        request_mac(token_sha256(token), request),
        request_mac(token_sha256(token), b"other"),
        request_mac(token_sha256(new_token()), request),
    }
    assert len(macs) == 3


@given(st.binary(max_size=100))
def test_base64url_is_its_own_inverse(content: bytes) -> None:
    assert base64url_bytes(base64url(content)) == content


@given(st.text(max_size=60))
def test_base64url_has_one_spelling(text: str) -> None:
    try:
        content = base64url_bytes(text)
    except ValueError:
        return
    assert base64url(content) == text


@pytest.mark.parametrize("name", ["", "-a", "a" * 41, "a/b", "..", "a b", "a\n", "é", "a.b"])
def test_what_cannot_be_a_folder_is_no_sites_name(name: str) -> None:
    assert not is_site_name(name)


def test_an_invitation_survives_its_file_and_only_its_owner_reads_it(tmp_path: Path, open_umask: None) -> None:
    path = tmp_path / "invitation.json"
    token = new_token()
    invitation = _invitation(token=SecretStr(base64url(token)))
    write_invitation(path, invitation)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_invitation(path) == invitation
    assert read_invitation(path).token_bytes == token


def test_the_token_is_not_shown_by_accident() -> None:
    token = base64url(new_token())
    invitation = _invitation(token=SecretStr(token))
    assert token not in f"{invitation!r} {invitation} {invitation.model_dump()}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("token", "c2hvcnQ"),
        ("token", "!" * 43),
        ("address", "https://example.org"),
        ("address", "unix:/tmp/socket"),
        ("address", "example.org"),
        ("site", "../up"),
        ("locum", "plan"),
        ("expires", "2030-01-01T00:00:00"),
        ("more", 1),
    ],
)
def test_an_invitation_that_is_not_as_described_is_refused_without_telling_its_token(
    tmp_path: Path, key: str, value: object
) -> None:
    token = base64url(new_token())
    content = json.loads(_invitation(token=SecretStr(token)).model_dump_json()) | {key: value}
    path = tmp_path / "invitation.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"is no invitation .*{key}") as refused:
        read_invitation(path)
    assert token not in f"{refused.value!r} {refused.value.__cause__!r}"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b"{" * 100_000, b" " * 200_000])
def test_what_is_no_invitation_ends_in_words(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match="is no invitation"):
        read_invitation(tmp_path / "file")
