"""Secure aggregation: the server learns the weighted mean of what clients changed, and nobody's own changes.

Each client's changes since the broadcast, in fixed point and weighted by its examples, go masked by what it shares with every
other client; the masks cancel in the sum (`fedlora.secure`). What is merged is one update, the mean, which is all that the
`linear` strategies need.
"""

from __future__ import annotations

import numpy as np

from fedlora import messages
from fedlora.messages import ServerState, Update
from fedlora.secure import Terms, secure_sum
from strategies.wire import Ask, SumOf


def make(bound: float) -> SumOf:
    """The function of (state, updates without arrays, factors sent, ask) → the mean as the one update to merge.

    `bound` is that of |change| in every coordinate; a client beyond it drops out. More than half of the clients that trained,
    and two at least, must stay to the end, else RunError. Guarantee: the mean is that of the plain sum to K · bound / 2³² a
    coordinate where all have as many examples as the largest.
    """

    def mean(state: ServerState, updates: list[Update], sends: str, ask: Ask) -> list[Update]:
        start = messages.named(state.adapters, state.dense, sends)
        clients = [update.client for update in updates]
        terms = Terms(max(2, len(clients) // 2 + 1), bound, max(update.examples for update in updates))
        total = secure_sum(ask, clients, sum(array.size for array in start.values()), terms)
        moved = np.split(total.sum / total.examples, np.cumsum([array.size for array in start.values()])[:-1])
        arrays = {name: array + move.reshape(array.shape) for (name, array), move in zip(start.items(), moved, strict=True)}
        factors, dense, _ = messages.sort(arrays)
        named = {(layer, f): array for layer, both in factors.items() for f, array in both.items()}
        return [messages.update_of(state, named | {(n, ""): array for n, array in dense.items()}, total.examples)]

    return mean
