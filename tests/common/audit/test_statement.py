"""A model's statement says of which run it is, and for no other model."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from locum.common.audit.claims import ClaimError, claim_lines, claimed
from locum.common.audit.statement import PREDICATE_TYPE, StatementError, counted, open_statement, pinned
from locum.common.canonical import sha256_hex
from locum.common.errors import DataError
from locum.common.identity import certificate_pem
from locum.common.log.entries import written
from tests.audits import RUN, Federation, model_of, sha
from tests.plans import plan


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose run has ended."""
    return Federation(tmp_path_factory.mktemp("federation"), plan())


def _statement(federation: Federation, /, **lies: Any) -> bytes:
    entries = federation.history()
    return federation.statement(entries, federation.checkpoints(map(written, entries)), **lies)


def test_the_envelope_is_what_the_standards_say(federation: Federation) -> None:
    """Read with nothing of ours: DSSE v1.0.2 and in-toto Statement v1."""
    envelope = json.loads(_statement(federation))
    assert set(envelope) == {"payloadType", "payload", "signatures"}
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"]
    encoded = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    federation.log_key.public_key().verify(base64.b64decode(envelope["signatures"][0]["sig"]), encoded)
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "model.safetensors", "digest": {"sha256": sha256_hex(model_of(2))}}]
    assert statement["predicateType"] == PREDICATE_TYPE
    assert statement["predicate"]["run"] == RUN


def test_a_statement_that_is_right_is_opened(federation: Federation) -> None:
    said = open_statement(_statement(federation), pinned(federation.fingerprint))
    assert (said.model, said.predicate.run, said.predicate.roster) == (
        sha256_hex(model_of(2)), RUN, ("north", "riverside", "st-anne")
    )  # fmt: skip
    assert counted(said.predicate) == len(federation.history())


def test_a_statement_of_another_federation_does_not_count(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(StatementError, match="another federation"):
        open_statement(_statement(federation), pinned(sha("another")))
    other = Federation(tmp_path, plan())
    mixed = {"authority": certificate_pem(other.authority.certificate).decode()}
    with pytest.raises(StatementError, match="not issued by this federation's authority"):
        open_statement(_statement(federation, **mixed), pinned(None))


def test_a_statement_that_was_changed_does_not_count(federation: Federation) -> None:
    content = _statement(federation)
    envelope = json.loads(content)
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["subject"][0]["digest"]["sha256"] = sha("another")
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    with pytest.raises(StatementError, match="not signed by the log key"):
        open_statement(json.dumps(envelope).encode(), pinned(None))


@pytest.mark.parametrize(
    "lies",
    [
        {"key": ed25519.Ed25519PrivateKey.generate()},
        {"checkpoint": "Three Rivers\n1\nAAAA\n\n— x y\n"},
        {"federation": "Elsewhere"},
        {"log": "no certificate"},
        {"at": "2056-01-01T00:00:00Z"},
    ],
)
def test_a_statement_that_contradicts_itself_does_not_count(federation: Federation, lies: dict[str, Any]) -> None:
    with pytest.raises(StatementError):
        open_statement(_statement(federation, **lies), pinned(None))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"payload": "!"}', b"x" * 100])
def test_what_is_no_statement_is_told(content: bytes) -> None:
    with pytest.raises(StatementError, match="no DSSE envelope"):
        open_statement(content, pinned(None))


def test_another_model_is_not_the_one(federation: Federation, tmp_path: Path) -> None:
    statement, model = tmp_path / "statement.json", tmp_path / "model.safetensors"
    statement.write_bytes(_statement(federation))
    model.write_bytes(model_of(2))
    said = claimed(model, statement, federation.fingerprint)
    assert any("no differential privacy" in line for line in claim_lines(said, pinned=True))
    assert any(federation.fingerprint in line for line in claim_lines(said, pinned=False))
    model.write_bytes(model_of(2)[:-1] + b"\1")
    with pytest.raises(ClaimError, match="is about another model"):
        claimed(model, statement, federation.fingerprint)
    with pytest.raises(DataError, match="cannot be read"):
        claimed(tmp_path / "nothing", statement, None)
    statement.write_bytes(b"{}")
    with pytest.raises(ClaimError, match="does not count"):
        claimed(model, statement, None)
