"""Named, independent random streams: one run seed, one stream for each (purpose, client, round).

What privacy rests on has streams of another kind, `Stream`: each from a key of 32 bytes of its own.

No stream depends on another having been drawn from, so changing the strategy or the number of rounds does not change
the split of the data, and a client's batches are the same on any worker. The key is hashed, so that neighbouring
clients, rounds and seeds get unrelated streams.

The purposes in use: partition, domains train, domains test, holdout, test split, adapters, head, participation, evaluation,
ranks, batches, dropout, noise, sketch, audit. Those of `private_key`: training; a training's own: batches, noise, dropout.
"""

from __future__ import annotations

import hashlib
import hmac
import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms


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


def private_key(*parts: object) -> bytes:
    """32 bytes that stand for these parts: SHA-256 over their types and values. Raises TypeError as `derive` does."""
    return hashlib.sha256(b"fedlora private " + _encoded(parts)).digest()


def derive(key: bytes, *parts: object) -> bytes:
    """32 bytes for a part of what `key` (32 bytes) stands for: HMAC-SHA-256. They say nothing of the key, nor of other parts.

    Parts are int, float, str or bytes; another type raises TypeError, since equal values must give equal keys everywhere.
    """
    return hmac.digest(key, _encoded(parts), "sha256")


def _encoded(parts: tuple[object, ...]) -> bytes:
    for part in parts:
        if type(part) not in (int, float, str, bytes):
            raise TypeError(f"{part!r} is a {type(part).__name__}; a key is derived from int, float, str and bytes")
    return repr(parts).encode()  # tells 1, 1.0, "1" and b"1" apart, and ("a", "b") from ("ab",)


class Stream:
    """Random numbers from a key of 32 bytes: the keystream of ChaCha20 (RFC 8439) with nonce 0. A key serves one stream.

    Guarantee: without the key, the numbers cannot be told from independent uniform bits by any known means, however many
    of them are seen; equal keys give equal numbers. What privacy rests on is drawn from here, not from numpy or torch,
    whose generators have a state that can be searched (torch's on a CPU takes 32 bits of a seed).

    | drawn               | law                                                                               |
    |---------------------|-----------------------------------------------------------------------------------|
    | `random`            | uniform over the multiples of 2⁻⁵³ in [0, 1), float64                             |
    | `standard_normal`   | N(0, 1), float64, up to |x| ≤ 9.35; what is cut off has probability 1e-20         |
    | size 0              | an empty array; nothing is drawn                                                  |
    | a key of other size | ValueError                                                                        |
    | beyond 256 GiB      | ValueError: 3.4e10 numbers are drawn                                              |
    """

    def __init__(self, key: bytes) -> None:
        self._keystream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def words(self, count: int, kind: str = "<u8") -> np.ndarray:
        """The next `count` unsigned integers of this kind, all of whose bits are random. Not to be written to."""
        return np.frombuffer(self._keystream.update(bytes(count * np.dtype(kind).itemsize)), kind)

    def random(self, size: int | tuple[int, ...]) -> np.ndarray:
        """Uniform numbers in [0, 1), float64."""
        uniform = (self.words(math.prod(_shape(size))) >> np.uint64(11)) * 2.0**-53
        return uniform.reshape(size)

    def standard_normal(self, size: int | tuple[int, ...]) -> np.ndarray:
        """Standard normal numbers, float64, by Box and Muller: √(−2 ln u) (cos 2πv, sin 2πv), u and v of 63 bits, u > 0."""
        import torch  # its logarithm and sines are three times as fast as numpy's

        count = math.prod(_shape(size))
        half = (count + 1) // 2
        whole = torch.from_numpy((self.words(2 * half) >> np.uint64(1)).view(np.int64)).to(torch.float64)
        radius = whole[:half].add_(1).mul_(2.0**-63).log_().mul_(-2).sqrt_()
        angle = whole[half:].mul_(2.0**-62 * math.pi)
        both = torch.cat((radius * angle.cos(), radius * angle.sin()))[:count]
        drawn: np.ndarray = both.numpy().reshape(size)
        return drawn


def _shape(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else size
