"""Named, independent random streams: one run seed, one stream for each (purpose, client, round).

No stream depends on another having been drawn from, so changing the strategy or the number of rounds does not change
the split of the data, and a client's batches are the same on any worker. The key is hashed, so that neighbouring
clients, rounds and seeds get unrelated streams.

The purposes in use: partition, domains train, domains test, holdout, test split, adapters, head, participation, ranks,
batches, dropout, noise, sketch, audit.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def key(seed: int, purpose: str, client: int = 0, round: int = 0) -> int:
    """A 128-bit integer that stands for one stream; equal arguments give equal keys on every machine."""
    text = f"fedlora/{seed}/{purpose}/{client}/{round}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def stream(seed: int, purpose: str, client: int = 0, round: int = 0) -> np.random.Generator:
    """A numpy generator of its own for (seed, purpose, client, round)."""
    return np.random.default_rng(key(seed, purpose, client, round))


def torch_seed(seed: int, purpose: str, client: int = 0, round: int = 0) -> int:
    """The same stream as a seed for `torch.manual_seed`, which takes 63 bits."""
    return key(seed, purpose, client, round) >> 65


# ---- A minimal version of what helper streams writes: to be dropped for that one at the merge.


def private_key(*parts: object) -> bytes:
    """32 bytes that stand for these parts."""
    return hashlib.sha256(json.dumps([[type(part).__name__, str(part)] for part in parts]).encode()).digest()


def derive(key: bytes, *parts: object) -> bytes:
    """32 bytes that follow from the key and these parts."""
    return private_key(key.hex(), *parts)


class Stream:
    """Numbers from the ChaCha20 key stream of a 32-byte key."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def random(self, size: int | tuple[int, ...]) -> np.ndarray:
        """float64 in [0, 1)."""
        words = np.frombuffer(self._keystream.update(bytes(8 * int(np.prod(size)))), np.uint64)
        return ((words >> np.uint64(11)) * 2.0**-53).reshape(size)

    def standard_normal(self, size: int | tuple[int, ...]) -> np.ndarray:
        """float64 with the standard normal law."""
        u, v = self.random((2, int(np.prod(size))))
        return (np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)).reshape(size)
