"""Which clients take part in which round.

Without privacy, and where single records are private, the seed alone says so: participation is public, and known before the
run begins. Where whole clients are private it is a secret: see `draw_secretly`.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from fedlora import seeds


def draw_cohort(seed: int, round: int, clients: list[int], size: int, poisson: bool = False) -> list[int]:
    """A cohort of the clients from the stream (seed, participation, round); sorted.

    `size` of them without replacement; with `poisson`, each by itself with probability size / clients, so that the number
    varies and may be 0.
    """
    rng = seeds.stream(seed, "participation", round=round)
    if poisson:
        return _by_chance(clients, size, rng.random(len(clients)))
    return sorted(clients[i] for i in rng.choice(len(clients), size, replace=False))


def draw_secretly(key: bytes, clients: list[int], size: int, poisson: bool) -> list[int]:
    """The same from a secret key of 32 bytes, which serves one round."""
    chances = seeds.Stream(key).random(len(clients))
    if poisson:
        return _by_chance(clients, size, chances)
    return sorted(clients[i] for i in np.argsort(chances)[:size])


def schedule(seed: int, rounds: int, clients: int, size: int) -> Counter[int]:
    """Client → the number of the rounds 1 … `rounds` in which the seed draws it; a client that never is counts 0."""
    everyone = list(range(clients))
    drawn = (draw_cohort(seed, round, everyone, size) for round in range(1, rounds + 1))
    return Counter(client for cohort in drawn for client in cohort)


def _by_chance(clients: list[int], size: int, chances: np.ndarray) -> list[int]:
    return sorted(client for client, chance in zip(clients, chances, strict=True) if chance * len(clients) < size)
