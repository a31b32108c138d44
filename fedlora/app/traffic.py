"""Bytes of the arrays that a run sends, before it is run: from the shapes of what travels, exact where cohorts are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import RecordDict

from fedlora.arrays import compression, messages
from fedlora.arrays.messages import ServerState
from fedlora.server.participation import draw_cohort, schedule
from strategies import LoRAStrategy

if TYPE_CHECKING:
    from fedlora.config import Config


@dataclass(frozen=True)
class Traffic:
    """What the clients of a run send and are sent; tests of clients are counted in the bytes, and are no trainings."""

    up: int  # bytes of all clients and rounds
    down: int
    trainings: int  # client rounds
    first: float  # bytes down to a client in the first round, on average over its cohort
    last: float  # and in the last
    tests: int  # bytes of `down` that go to clients which test the model

    @property
    def up_each(self) -> float:
        """Bytes up of a client and round, on average."""
        return self.up / max(1, self.trainings)

    @property
    def down_each(self) -> float:
        """Bytes down to a client and round of training, on average."""
        return (self.down - self.tests) / max(1, self.trainings)


def of_run(config: Config, strategy: LoRAStrategy, state: ServerState) -> Traffic:
    """The traffic of a run that begins with this state, whose clients all reply.

    What has moved into the base is sent to every client from then on, and grows by the rank of each update until it is full.
    """
    times = participations(config)
    ranks = _ranks(config, strategy)
    ups = {rank: bytes_up(state, strategy, rank) for rank in set(ranks)}
    downs = {rank: bytes_down(state, strategy, rank) for rank in set(ranks)}
    tested = {rank: bytes_of(strategy.sent_down(state, rank)) for rank in set(ranks)}
    up = sum(times[client] * ups[rank] for client, rank in enumerate(ranks))
    begins = sum(times[client] * downs[rank] for client, rank in enumerate(ranks))
    everyone = sum(tested[rank] for rank in ranks)
    size, corrections = config.cohort_size, list(_corrections(config, strategy, state))
    after = [after for round, (_, after) in enumerate(corrections, 1) if strategy.evaluates(round)]
    tests = len(after) * everyone + config.clients * sum(after)
    trained = begins + size * sum(before for before, _ in corrections)
    each = begins / max(1.0, sum(times.values()))
    return Traffic(round(up), round(trained + tests), round(sum(times.values())), each, each + corrections[-1][0], round(tests))


def participations(config: Config) -> Mapping[int, float]:
    """Client → the rounds in which it is drawn; those to be expected where cohorts are a secret (privacy=user)."""
    if config.privacy.name == "user":
        return dict.fromkeys(range(config.clients), config.rounds * config.cohort_size / config.clients)
    return schedule(config.seed, config.rounds, config.clients, config.cohort_size)


def bytes_up(state: ServerState, strategy: LoRAStrategy, rank: int | None = None) -> float:
    """Bytes of a client's reply in a round; the mean of two neighbouring rounds, which may differ in what is trained.

    `rank` is the client's, where clients have ranks of their own.
    """
    further = bytes_of(strategy.sent_further(state)[0])
    return further + sum(bytes_of(strategy.sent_up(state, round, rank)) for round in (1, 2)) / 2


def bytes_down(state: ServerState, strategy: LoRAStrategy, rank: int | None = None) -> int:
    """Bytes of what a client is sent in a round, before anything has moved into the base."""
    return bytes_of(strategy.sent_down(state, rank)) + bytes_of(strategy.sent_further(state)[1])


def bytes_of(arrays: dict[str, np.ndarray]) -> int:
    """Bytes of one message with these arrays."""
    return messages.array_bytes(RecordDict({messages.ARRAYS: messages.record(arrays)}))


def _ranks(config: Config, strategy: LoRAStrategy) -> list[int | None]:
    return [None] * config.clients if strategy.ranks is None else list(strategy.ranks)


def _corrections(config: Config, strategy: LoRAStrategy, state: ServerState) -> Iterator[tuple[int, int]]:
    """Round by round, the bytes of the base correction that its clients are sent, and those after its merge."""
    if strategy.moves([]) is None:
        yield from [(0, 0)] * config.rounds
        return
    shapes = [(len(pair.B), pair.A.shape[1]) for pair in state.adapters.values()]
    full, own = max(min(shape) for shape in shapes), next(iter(state.adapters.values())).rank
    rank, before = 0, 0

    @cache
    def size(rank: int, m: int, n: int) -> int:
        pair = {"A": np.zeros((min(rank, m, n), n), np.float32), "B": np.zeros((m, min(rank, m, n)), np.float32)}
        return bytes_of(compression.encode(pair, strategy.encodes[0] if strategy.derive else "none", 1.0))

    for round in range(1, config.rounds + 1):
        if rank < full:
            rank += strategy.moves(_merged_ranks(config, strategy, own, round)) or 0
        after = sum(size(min(rank, full), m, n) for m, n in shapes)
        yield before, after
        before = after


def _merged_ranks(config: Config, strategy: LoRAStrategy, own: int, round: int) -> list[int]:
    """The ranks of the updates that are merged after a round; one update stands for all where they are mixed before."""
    if config.privacy.name == "user" or config.server.mean in ("median", "trimmed"):
        return [own]
    if strategy.ranks is None:
        return [own] * config.cohort_size
    cohort = draw_cohort(config.seed, round, list(range(config.clients)), config.cohort_size)
    return [strategy.ranks[client] for client in cohort]
