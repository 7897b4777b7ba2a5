from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.common.canonical import canonical_json, digest
from locum.common.envelope import (
    MOST_BYTES,
    Approval,
    EnvelopeError,
    Proposal,
    open_approval,
    open_proposal,
    seal,
    seal_approval,
    seal_proposal,
    unseal,
)
from locum.common.identity import new_key
from tests.plans import plan

SITE_KEY, LOG_KEY = new_key(), ed25519.Ed25519PrivateKey.generate()
KEYS = [SITE_KEY, LOG_KEY]
SEALED = [seal("test", {"digest": "ab" * 32, "at": 12.5}, key) for key in KEYS]

_SAFE = 2**53 - 1
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-_SAFE, _SAFE) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
_BODIES = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=12), _PLAIN, max_size=6)


def _approval(**changes: Any) -> Approval:
    fields = {"site": "berlin", "digest": "ab" * 32, "at": 1.5e9, "decision": "approve", "steward": "Dr. Weiß"}
    return Approval(**(fields | changes))


def _proposal() -> Proposal:
    proposed = plan()
    return Proposal(digest=proposed.digest, plan=json.loads(proposed.canonical()), proposed_at=1.5e9, by="the ML team")


@settings(max_examples=80, deadline=None)
@given(_BODIES, st.sampled_from(KEYS))
def test_what_was_sealed_is_what_is_read(body: dict[str, Any], key: Any) -> None:
    assert canonical_json(unseal(seal("test", body, key), "test", key.public_key())) == canonical_json(body)


@settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from(KEYS))
def test_one_changed_byte_is_noticed(data: st.DataObject, key: Any) -> None:
    content = bytearray(SEALED[KEYS.index(key)])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(EnvelopeError):
        unseal(bytes(content), "test", key.public_key())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | _PLAIN.map(canonical_json))
def test_whatever_comes_in_ends_in_an_envelope_error(content: bytes) -> None:
    with pytest.raises(EnvelopeError):
        unseal(content, "test", LOG_KEY.public_key())


@pytest.mark.parametrize("key", KEYS)
def test_a_statement_of_one_kind_is_none_of_another(key: Any) -> None:
    content = seal("approval", {}, key)
    with pytest.raises(EnvelopeError, match="no proposal"):
        unseal(content, "proposal", key.public_key())
    relabelled = canonical_json(json.loads(content) | {"kind": "proposal"})
    with pytest.raises(EnvelopeError, match="not signed"):
        unseal(relabelled, "proposal", key.public_key())


@pytest.mark.parametrize("key", [new_key(), LOG_KEY, ec.generate_private_key(ec.SECP256R1())])
def test_another_key_does_not_verify(key: Any) -> None:
    with pytest.raises(EnvelopeError):
        unseal(seal("test", {"a": 1}, SITE_KEY), "test", key.public_key())


def test_a_second_spelling_is_refused() -> None:
    content = seal("test", {"b": 1, "a": 1.5}, LOG_KEY)
    for spelling in (json.dumps(json.loads(content)).encode(), content + b"\n", content.replace(b"1.5", b"1.50")):
        with pytest.raises(EnvelopeError, match="canonical"):
            unseal(spelling, "test", LOG_KEY.public_key())


def test_a_further_field_is_refused() -> None:
    content = canonical_json(json.loads(seal("test", {}, LOG_KEY)) | {"more": 1})
    with pytest.raises(EnvelopeError, match="no envelope"):
        unseal(content, "test", LOG_KEY.public_key())


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b" " * (MOST_BYTES + 1)])
def test_deep_long_and_large_input_is_refused(content: bytes) -> None:
    with pytest.raises(EnvelopeError):
        unseal(content, "test", LOG_KEY.public_key())


@pytest.mark.parametrize("body", [{"a": float("nan")}, {"a": 2**60}, {"a": b"bytes"}, {"a": "\ud800"}])
def test_what_is_not_plain_data_is_not_signed(body: dict[str, Any]) -> None:
    with pytest.raises(EnvelopeError, match="canonical"):
        seal("test", body, LOG_KEY)


def test_a_proposal_carries_the_plan_to_the_digest() -> None:
    found = open_proposal(seal_proposal(_proposal(), LOG_KEY), LOG_KEY.public_key())
    assert found.parsed_plan().digest == found.digest == plan().digest


def test_a_proposal_of_another_plan_than_its_digest_is_refused() -> None:
    other = _proposal().model_copy(update={"plan": json.loads(plan(rounds=9).canonical())})
    with pytest.raises(EnvelopeError, match="does not have the digest"):
        open_proposal(seal_proposal(other, LOG_KEY), LOG_KEY.public_key())
    assert digest(other.plan) != other.digest


def test_an_approval_is_read_back() -> None:
    approval = _approval()
    assert open_approval(seal_approval(approval, SITE_KEY), SITE_KEY.public_key()) == approval


@pytest.mark.parametrize(
    "changes",
    [{"decision": "maybe"}, {"at": -1.0}, {"at": "now"}, {"site": "../x"}, {"digest": "AB" * 32}, {"more": 1}],
)
def test_an_approval_of_other_fields_is_refused_though_it_is_signed(changes: dict[str, Any]) -> None:
    content = seal("approval", _approval().model_dump() | changes, SITE_KEY)
    with pytest.raises(EnvelopeError, match="other fields"):
        open_approval(content, SITE_KEY.public_key())
