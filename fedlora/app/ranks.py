"""The rank of each client's adapters, where they differ: as listed, by shares, or by the memory that a client has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fedlora import seeds
from fedlora.arrays.lowrank import Adapters
from fedlora.check import ConfigError
from fedlora.config import Config

MEGABYTE = 1_000_000


def of_clients(config: Config, adapters: Adapters, trains: str) -> list[int] | None:
    """Rank by client; None where all have `adapter.rank`. Who gets which share is drawn from the stream (seed, ranks).

    Raises ConfigError for a memory in which not even rank 1 can be trained.
    """
    if config.adapter.ranks is not None:
        return [int(rank) for rank in dealt(config.adapter.ranks, config.clients, config.seed)]
    if config.adapter.memory is not None:
        have = dealt(config.adapter.memory, config.clients, config.seed)
        needs = training_bytes(config, adapters, trains)
        return [_largest(megabytes, needs, config.adapter.rank) for megabytes in have]
    return None


def dealt(values: Any, clients: int, seed: int) -> list[float]:
    """A list as it is; of {value: share}, each value to its share of the clients (largest remainders), at random."""
    if isinstance(values, list):
        return list(values)
    kinds = sorted((float(value), share) for value, share in values.items())  # in whatever order they were written
    exact = np.array([share for _, share in kinds]) * clients
    counts = np.floor(exact + 1e-9).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: clients - counts.sum()]:
        counts[place] += 1
    hand = np.repeat([value for value, _ in kinds], counts)
    return [float(value) for value in seeds.stream(seed, "ranks").permutation(hand)]


def training_bytes(config: Config, adapters: Adapters, trains: str) -> Callable[[int], int]:
    """Rank → bytes that a client needs for its adapters in training.

    Both factors in float32; of those trained also the gradient, the optimiser's moments, and, with record-level privacy, a
    gradient for each example of a batch. The base model and its activations are not in it: they do not depend on the rank.
    """
    moments = 2 if config.train.optimizer == "adamw" else int(bool(config.train.momentum))
    copies = 1 + moments + (config.train.batch_size if config.privacy.name == "record" else 0)
    sizes = {"A": sum(pair.A.shape[1] for pair in adapters.values()), "B": sum(len(pair.B) for pair in adapters.values())}
    held, trained = sum(sizes.values()), sum(sizes[factor] for factor in "AB" if factor in trains)
    return lambda rank: 4 * rank * (held + copies * trained)


def _largest(megabytes: float, needs: Callable[[int], int], highest: int) -> int:
    rank = min(highest, int(megabytes * MEGABYTE // needs(1)))
    if not rank:
        least = needs(1) / MEGABYTE
        raise ConfigError(f"adapter.memory={megabytes:g} MB is too little: training at rank 1 takes {least:.3g} MB; raise it")
    return rank
