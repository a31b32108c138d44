"""FedIT: Federated averaging of both LoRA factors (Zhang et al., arXiv 2305.05644).

    Ā = Σ p_k A_k,   B̄ = Σ p_k B_k

The product B̄Ā is not Σ p_k B_k A_k: the metric `aggregation_bias` says by how much. Differences from the paper: none.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.arrays import lowrank
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit, Unequal
from strategies.base import LoRAStrategy


class FedAvg(LoRAStrategy):
    """Average A and average B."""

    trains = "AB"
    paper = "FedIT, 2305.05644"
    exact = False
    linear = True
    unequal = Unequal.PADDED
    private = Fit.WEAK
    private_because = "noise in both factors multiplies in B A"

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(Ā, B̄) of every layer."""
        p = shares(updates)
        return replace(state, adapters={name: lowrank.mean(pairs, p) for name, pairs in layers(updates).items()})
