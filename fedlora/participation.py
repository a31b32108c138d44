"""Which clients take part in which round: drawn from the seed alone, so known before the run begins."""

from __future__ import annotations

from collections import Counter

from fedlora import seeds


def draw_cohort(seed: int, round: int, clients: list[int], size: int, poisson: bool = False) -> list[int]:
    """A cohort of the clients from the stream (seed, participation, round); sorted.

    `size` of them without replacement; with `poisson`, each by itself with probability size / clients, so that the number
    varies and may be 0.
    """
    rng = seeds.stream(seed, "participation", round=round)
    if poisson:
        return sorted(client for client, u in zip(clients, rng.random(len(clients)), strict=True) if u * len(clients) < size)
    return sorted(clients[i] for i in rng.choice(len(clients), size, replace=False))


def schedule(seed: int, rounds: int, clients: int, size: int, poisson: bool = False) -> Counter[int]:
    """Client → the number of the rounds 1 … `rounds` in which it is drawn; a client that never is counts 0."""
    everyone = list(range(clients))
    drawn = (draw_cohort(seed, round, everyone, size, poisson) for round in range(1, rounds + 1))
    return Counter(client for cohort in drawn for client in cohort)
