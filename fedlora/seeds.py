"""Named, independent random streams: one run seed, one stream for each (purpose, client, round).

No stream depends on another having been drawn from, so changing the strategy or the number of rounds does not change
the split of the data, and a client's batches are the same on any worker. The key is hashed, so that neighbouring
clients, rounds and seeds get unrelated streams.

The purposes in use: partition, domains train, domains test, holdout, test split, adapters, head, participation, ranks,
batches, dropout, noise, sketch, audit.
"""

from __future__ import annotations

import hashlib

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
