"""The primitives of a secure sum: X25519, HKDF, ChaCha20 and ChaCha20-Poly1305 come from `cryptography`.

Shamir's scheme over GF(2¹²⁸) splits by `pycryptodome`. `combine` is its inverse, written here: many secrets are combined from
the same places, and pycryptodome computes the weights of the places for each secret again (35 s for 100 clients).

A secret is 16 bytes, Shamir's block; a private key is derived from one, so that a share of the secret is a share of the key.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache

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
DIGEST = 16  # bytes of a share's digest: whoever has the share would need 2¹²⁸ trials for another of the same digest
FIELD = 2**128 + 2**7 + 2**2 + 2 + 1  # the polynomial that GF(2¹²⁸) is taken modulo, as in pycryptodome


def public_key(secret: bytes) -> bytes:
    """The X25519 public key (32 bytes) of the private key that 16 secret bytes stand for."""
    return _private(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes, purpose: str) -> bytes:
    """The key (32 bytes) that this side's secret and the other's public key give, the same on both sides.

    Raises ValueError for a public key of low order, which gives the same key to everybody.
    """
    try:
        return derive(_private(secret).exchange(X25519PublicKey.from_public_bytes(public)), purpose)
    except ValueError:
        raise ValueError("a public key is of low order") from None


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


def digest(share: bytes, about: str) -> bytes:
    """16 bytes that bind to 16 random ones and say nothing about them: SHA-256, which takes 2¹²⁷ trials to invert."""
    return hashlib.sha256(f"fedlora/secure/{about}/".encode() + share).digest()[:DIGEST]


def split(secret: bytes, threshold: int, shares: int) -> list[bytes]:
    """Shares (16 bytes each) of 16 secret bytes: any `threshold` of them give it back, fewer say nothing about it."""
    return [share for _, share in Shamir.split(threshold, shares, secret, False)]


def combine(places: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret from exactly `threshold` shares and their places (from 0) in what `split` returned.

    The time depends on the shares: use it where the secret is meant to be learnt.
    """
    secret = 0
    for weight, share in zip(_weights(tuple(places)), shares, strict=True):
        secret ^= _times(weight, int.from_bytes(share, "big"))
    return secret.to_bytes(SECRET, "big")


@lru_cache(maxsize=64)
def _weights(places: tuple[int, ...]) -> list[int]:
    """The Lagrange polynomials of the points `places` + 1 at 0, elements of GF(2¹²⁸): Π x_m / (x_j + x_m) over m ≠ j."""
    points = [place + 1 for place in places]
    if len(set(points)) < len(points):
        raise ValueError("a share is there twice")
    weights = []
    for own in points:
        above = below = 1
        for other in points:
            if other != own:
                above, below = _times(above, other), _times(below, own ^ other)
        weights.append(_times(above, _inverse(below)))
    return weights


def _times(a: int, b: int) -> int:
    """The product of two elements of GF(2¹²⁸), integers whose bits are coefficients."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a >> 128:
            a ^= FIELD
        b >>= 1
    return product


def _inverse(a: int) -> int:
    """1 / a = a^(2¹²⁸ − 2), of an element that is not 0."""
    power, result = a, 1
    for _ in range(127):
        power = _times(power, power)
        result = _times(result, power)
    return result


def _private(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derive(secret, "private key"))
