"""Which clients take part in which round: drawn from the seed alone, so known before the run begins."""

from __future__ import annotations

from collections import Counter

from fedlora import seeds


def draw_cohort(seed: int, round: int, clients: list[int], size: int) -> list[int]:
    """`size` of the clients without replacement, from the stream (seed, participation, round); sorted."""
    drawn = seeds.stream(seed, "participation", round=round).choice(len(clients), size, replace=False)
    return sorted(clients[i] for i in drawn)


def schedule(seed: int, rounds: int, clients: int, size: int) -> Counter[int]:
    """Client → the number of the rounds 1 … `rounds` in which it is drawn; a client that never is counts 0."""
    everyone = list(range(clients))
    return Counter(client for round in range(1, rounds + 1) for client in draw_cohort(seed, round, everyone, size))
