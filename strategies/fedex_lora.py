"""FedEx-LoRA: averaged factors, and what the averages miss goes into the base (Singhal et al., ACL 2025, arXiv 2410.09432).

    A ← Ā,   B ← B̄,   W0 ← W0 + s · (Σ p_k B_k A_k − B̄Ā),   the residual being Σ p_k (B_k − B̄)(A_k − Ā)

So the model after a round is exactly the ideal one. Differences from the paper: W0 itself is never changed, the residuals are
kept beside it as a pair of thin factors, and no m × n residual is formed; clients are weighted by p_k, not alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit
from strategies.base import LoRAStrategy


class FedExLoRA(LoRAStrategy):
    """Average A and average B, and move the aggregation bias into the base."""

    trains = "AB"
    corrects = True
    paper = "FedEx-LoRA, 2410.09432"
    exact = True
    one_rank = "Ā and B̄ need clients of one rank"
    private = Fit.WEAK
    private_because = "noise in both factors multiplies in B A, and the base keeps it"

    def moves(self, ranks: Sequence[int]) -> int:
        """(B_k − B̄)(A_k − Ā) of every client; nothing of one alone."""
        return sum(ranks) if len(ranks) > 1 else 0

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(Ā, B̄) of every layer, and base correction ⊕ (Σ p_k B_k A_k − B̄Ā)."""
        p, averaged, moved = shares(updates), {}, {}
        for name, pairs in layers(updates).items():
            averaged[name] = lowrank.mean(pairs, p)
            missed = Pair(*(factor.astype(averaged[name].A.dtype) for factor in lowrank.bias(pairs, p)))
            moved[name] = lowrank.add(state.base_correction.get(name), missed)
        return replace(state, adapters=averaged, base_correction=moved)
