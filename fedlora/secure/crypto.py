"""The primitives of a secure sum. None is ours: X25519, HKDF, ChaCha20 and ChaCha20-Poly1305 come from `cryptography`,
Shamir's scheme over GF(2¹²⁸) from `pycryptodome`.

A secret is 16 bytes, Shamir's block; a private key is derived from one, so that a share of the secret is a share of the key.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

SECRET, KEY, NONCE, TAG = 16, 32, 12, 16  # bytes


def public_key(secret: bytes) -> bytes:
    """The X25519 public key (32 bytes) of the private key that 16 secret bytes stand for."""
    return _private(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes, purpose: str) -> bytes:
    """The key (32 bytes) that this side's secret and the other's public key give, the same on both sides.

    Raises ValueError for a public key that gives the same key to everybody.
    """
    return derive(_private(secret).exchange(X25519PublicKey.from_public_bytes(public)), purpose)


def derive(secret: bytes, purpose: str) -> bytes:
    """A key (32 bytes) for one purpose, by HKDF-SHA256."""
    return HKDF(SHA256(), KEY, salt=None, info=f"fedlora/secure/{purpose}".encode()).derive(secret)


def keystream(key: bytes, size: int) -> np.ndarray:
    """`size` pseudo-random words, uint32: ChaCha20 from nonce zero, since each key serves one stream."""
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, "<u4")


def seal(key: bytes, data: bytes, about: bytes) -> bytes:
    """Authenticated encryption of `data`, bound to the public `about`; 28 bytes longer."""
    nonce = os.urandom(NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, data, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """What `seal` was given; raises ValueError where key, bytes or `about` are not those."""
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE], sealed[NONCE:], about)
    except InvalidTag:
        raise ValueError("an encrypted share is damaged or meant for another client") from None


def split(secret: bytes, threshold: int, shares: int) -> list[bytes]:
    """Shares (16 bytes each) of 16 secret bytes: any `threshold` of them give it back, fewer say nothing about it."""
    return [share for _, share in Shamir.split(threshold, shares, secret, False)]


def combine(places: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret from exactly `threshold` shares and their places (from 0) in what `split` returned."""
    return Shamir.combine([(place + 1, share) for place, share in zip(places, shares, strict=True)], False)


def _private(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derive(secret, "private key"))
