"""HetLoRA: factors of different ranks are padded and weighted by their norms (Cho et al., EMNLP 2024, arXiv 2401.06432).

    w_k = ‖B_k A_k‖_F / Σ_j ‖B_j A_j‖_F,   A ← Σ w_k [A_k; 0],   B ← Σ w_k [B_k, 0]        (per layer)

A client of rank r_k gets the first r_k rows of A and columns of B. Differences from the paper: clients do not prune their own
ranks; where all products are zero w_k = p_k; a row that no client of the round holds keeps A as it was (B is zero there), since
with a zero on both sides it could never be trained again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit, Unequal
from strategies.base import LoRAStrategy


class HetLoRA(LoRAStrategy):
    """Pad A and B to the largest rank and average them, weighted by the norm of their product."""

    trains = "AB"
    paper = "HetLoRA, 2401.06432"
    exact = False
    unequal = Unequal.NATIVE
    private = Fit.WEAK
    private_because = "noise in both factors multiplies in B A, and the noisiest client weighs most"

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(Σ w_k A_k, Σ w_k B_k) of every layer, padded to the state's rank."""
        p, merged = shares(updates), {}
        for name, pairs in layers(updates).items():
            old, norms = state.adapters[name], np.array([lowrank.norm(pair) for pair in pairs])
            w = norms / norms.sum() if norms.any() else p
            mean, held = lowrank.mean([lowrank.pad(pair, old.rank) for pair in pairs], w), max(pair.rank for pair in pairs)
            merged[name] = Pair(np.concatenate([mean.A[:held], old.A[held:]]), mean.B)
        return replace(state, adapters=merged)
