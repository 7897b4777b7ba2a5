"""Keys of secure aggregation: sealing to somebody, deriving one key from another, and boxes that are sealed once.

* Sealing is HPKE in base mode (RFC 9180) with X-Wing (ML-KEM-768 and X25519 together: what was recorded today stays
  sealed as long as one of them holds), HKDF-SHA256 and AES-256-GCM. It says nothing of the sender: who must be known
  signs.
* Keys are derived with HKDF-SHA256 (RFC 5869); the label says what for.
* A box is AES-256-GCM under a key that seals one box and no other, so its nonce is zero.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
PUBLIC_BYTES = 1184 + 32
#: What sealing and a box add to what they hold.
SEAL_BYTES, BOX_BYTES = 1120 + 16, 16
_MLKEM_SEED, _MLKEM_PUBLIC = 64, 1184
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_NONCE = bytes(12)


class SealError(ValueError):
    """Something that was not sealed with this key, for this purpose, or was changed."""


def new_private() -> bytes:
    """A new X-Wing private key: the seed of ML-KEM-768 (64 bytes), then the X25519 key (32)."""
    return MLKEM768PrivateKey.generate().private_bytes_raw() + X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The public key, in X-Wing's form: that of ML-KEM-768 (1184 bytes), then that of X25519 (32)."""
    kem, curve = _parts(private)
    return kem.public_key().public_bytes_raw() + curve.public_key().public_bytes_raw()


def seal(public: bytes, purpose: bytes, content: bytes) -> bytes:
    """Seals `content` to the holder of a public key; raises SealError for bytes that are no public key."""
    try:
        key = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_PUBLIC]),
            X25519PublicKey.from_public_bytes(public[_MLKEM_PUBLIC:]),
        )
        return _SUITE.encrypt(content, key, purpose)
    except ValueError as error:
        raise SealError("this is no public key of X-Wing") from error


def unseal(private: bytes, purpose: bytes, sealed: bytes) -> bytes:
    """What was sealed to this key for this purpose; raises SealError."""
    try:
        return _SUITE.decrypt(sealed, MLKEM768X25519PrivateKey(*_parts(private)), purpose)
    except (InvalidTag, ValueError) as error:
        raise SealError("this was not sealed to this key for this purpose") from error


def _parts(private: bytes) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    seed, curve = private[:_MLKEM_SEED], private[_MLKEM_SEED:]
    return MLKEM768PrivateKey.from_seed_bytes(seed), X25519PrivateKey.from_private_bytes(curve)


def derive(key: bytes, label: str, salt: bytes = b"") -> bytes:
    """A key of 32 bytes for what `label` says: HKDF-SHA256 with info "locum secagg " and the label."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=b"locum secagg " + label.encode()).derive(key)


def close_box(key: bytes, content: bytes) -> bytes:
    """A box under a key that no other box has."""
    return AESGCM(key).encrypt(_NONCE, content, None)


def open_box(key: bytes, box: bytes) -> bytes:
    """What a box holds; raises SealError."""
    try:
        return AESGCM(key).decrypt(_NONCE, box, None)
    except InvalidTag as error:
        raise SealError("this box was not closed with this key") from error
