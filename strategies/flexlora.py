"""FlexLoRA: the ideal update, truncated to the adapter's rank (Bai et al., NeurIPS 2024, arXiv 2402.11505).

    U S Vᵀ = svd(Σ p_k B_k A_k),   A ← V_rᵀ,   B ← U_r S_r

Clients may differ in rank: one of rank r_k gets the first r_k rows of A and columns of B. Differences from the paper: the SVD
goes through QR of the stacked factors, which is exact and forms no m × n matrix; a product of zero leaves A what it was.
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


class FlexLoRA(LoRAStrategy):
    """Truncate the SVD of the ideal update at the adapter's rank."""

    trains = "AB"
    paper = "FlexLoRA, 2402.11505"
    exact = False
    keeps_basis = False
    unequal = Unequal.NATIVE
    private = Fit.WEAK
    private_because = "noise in both factors multiplies in B A, and the largest directions of the noise are kept"

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(V_rᵀ, U_r S_r) of every layer's Σ p_k B_k A_k."""
        p, merged = shares(updates), {}
        for name, pairs in layers(updates).items():
            ideal, old = lowrank.stack(pairs, p), state.adapters[name]
            merged[name] = lowrank.recompress(ideal, old.rank) if ideal.B.any() else Pair(old.A, np.zeros_like(old.B))
        return replace(state, adapters=merged)
