"""Secure aggregation: the server learns the weighted mean of what clients changed, and nobody's own changes.

Each client's changes since the broadcast, in fixed point and weighted by its examples, go masked by what it shares with every
other client; the masks cancel in the sum (`fedlora.secure`). What is merged is one update, the mean, which is all that the
`linear` strategies need.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedlora.arrays import messages
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import RunError
from fedlora.secure import Sets, Terms, secure_sum
from fedlora.server.wire import Ask

Drop = Callable[[int, str], object]


class SecureMean:
    """The function that turns updates without arrays into their mean, as the one update to merge.

    `bound` is that of |change| in every coordinate; a client beyond it drops out. More than half of the clients that trained,
    and `least`, must stay to the end, else RunError: of two clients each learns the other's changes from the sum, so `least`
    is 3, or 2 where the changes are private by themselves. Guarantee: the mean is that of the plain sum to K · bound / 2³² a
    coordinate where all have as many examples as the largest.
    """

    def __init__(self, bound: float, least: int = 3) -> None:
        self.bound, self.least = bound, least
        self.sets: Sets | None = None
        self.lineage = ""

    def remember(self, sets: Sets, lineage: str) -> None:
        """From now on a round of the run `lineage` that is taken again has the clients that it had, else RunError."""
        self.sets, self.lineage = sets, lineage

    def __call__(self, state: ServerState, updates: list[Update], round: int, sends: str, ask: Ask, drop: Drop) -> list[Update]:
        """The mean over those that stay, of the factors that clients send; `drop` is told who does not, and why."""
        examples = self._counted(updates, drop)
        digest = messages.digest(messages.named(state.adapters, state.dense, "AB", state.base_correction))
        first = self.sets.first(self.lineage, round, digest) if self.sets else None
        if first is not None:
            examples = _again(first, examples, round)

        def settle(clients: list[int]) -> None:
            if self.sets:
                self.sets.note(self.lineage, round, digest, clients)

        start = messages.named(state.adapters, state.dense, sends)
        terms = Terms(max(self.least, len(examples) // 2 + 1), self.bound, max(examples.values(), default=1))
        total = secure_sum(ask, examples, sum(array.size for array in start.values()), terms, drop, settle)
        moved = np.split(total.sum / total.examples, np.cumsum([array.size for array in start.values()])[:-1])
        arrays = {name: array + move.reshape(array.shape) for (name, array), move in zip(start.items(), moved, strict=True)}
        factors, dense, _ = messages.sort(arrays)
        named = {(layer, f): array for layer, both in factors.items() for f, array in both.items()}
        return [messages.update_of(state, named | {(n, ""): array for n, array in dense.items()}, total.examples)]

    def _counted(self, updates: list[Update], drop: Drop) -> dict[int, int]:
        """The examples of each client, without those that have more than the sum can count."""
        largest = (2**32 - 1) // max(1, len(updates))
        for update in updates:
            if not 1 <= update.examples <= largest:
                said = f"it says that it has {update.examples:.3g} examples"
                drop(update.client, f"{said}, and a secure sum counts {largest:.3g} of each client")
        return {update.client: int(update.examples) for update in updates if 1 <= update.examples <= largest}


def _again(first: list[int], examples: dict[int, int], round: int) -> dict[int, int]:
    """Those of a round that was summed before; the others' changes would be laid open."""
    if absent := [client for client in first if client not in examples]:
        raise RunError(
            f"round {round} was summed over clients {', '.join(map(str, first))} before the run was broken off, and client "
            f"{absent[0]} has not trained now; a sum without it would lay its changes open: start its device and go on, or "
            "begin anew with another seed"
        )
    return {client: examples[client] for client in first}
