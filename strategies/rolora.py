"""RoLoRA: the two factors are trained and averaged in turn (Chen et al., arXiv 2409.02346).

    odd rounds:  A fixed,  B ← Σ p_k B_k        even rounds:  B fixed,  A ← Σ p_k A_k

The factor that is not trained is the same for all, so the average is exact: B̄A = Σ p_k B_k A, BĀ = Σ p_k B A_k. Differences
from the paper: none. B comes first, since with B = 0 the gradient of A is zero.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.arrays import lowrank
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit
from strategies.base import LoRAStrategy


class RoLoRA(LoRAStrategy):
    """Train and average B in odd rounds and A in even ones."""

    trains = "AB"
    paper = "RoLoRA, 2409.02346"
    exact = True
    linear = True
    one_rank = "the factor that is fixed in a round must be the same for all clients"
    private = Fit.GOOD
    private_because = "one factor is noised at a time, so that noise enters B A linearly"

    def trained(self, round: int) -> str:
        """B in odd rounds, A in even ones."""
        return "B" if round % 2 else "A"

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(A, B̄) of every layer in odd rounds, (Ā, B) in even ones."""
        p, factor, merged = shares(updates), self.trained(round), {}
        for name, pairs in layers(updates).items():
            average = lowrank.average([getattr(pair, factor) for pair in pairs], p)
            merged[name] = state.adapters[name]._replace(**{factor: average})
        return replace(state, adapters=merged)
