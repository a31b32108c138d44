"""FedSVD: A is refactored by the server, B alone is trained (Lee et al., NeurIPS 2025, arXiv 2505.12805).

    B = Σ p_k B_k,   U S Vᵀ = svd(B A),   A ← V_rᵀ (orthonormal rows),   B ← U_r S_r

The product is unchanged; only its factors are. Differences from the paper: the SVD goes through QR of the thin factors
and an r × r core, which is exact; B = 0 is never refactored, since it says nothing about A.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fedlora import check
from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit
from strategies.base import LoRAStrategy


class FedSVD(LoRAStrategy):
    """Average B, then refactor B A by its SVD; `every` = k refactors in every k-th round only."""

    trains = "B"
    downlink = "BR"
    paper = "FedSVD, 2505.12805"
    exact = True
    linear = True
    keeps_basis = False
    one_rank = "a client of lower rank would erase the columns of B that it does not hold"
    private = Fit.STRONG
    private_because = "noise in B alone enters B A linearly, and refactoring is post-processing"

    def __init__(self, *, every: Annotated[int, "refactor in every k-th round only"] = 1, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.every = check.positive(**{"strategy.every": every})

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(V_rᵀ, U_r S_r) of every layer in a refactoring round, else (A, B̄)."""
        p, merged = shares(updates), {}
        for name, pairs in layers(updates).items():
            pair = Pair(state.adapters[name].A, lowrank.average([pair.B for pair in pairs], p))
            refactor = round % self.every == 0 and pair.B.any()
            merged[name] = lowrank.recompress(pair, pair.rank) if refactor else pair
        return replace(state, adapters=merged)
