"""FFA-LoRA: the factor A stays frozen, B is trained and averaged (Sun et al., ICLR 2024, arXiv 2403.12313).

    A = A_0,   B̄ = Σ p_k B_k,   so   B̄ A = Σ p_k B_k A   exactly

`init=orthonormal` is the control for FedSVD: under plain SGD the two have the same law (METHODS: FedSVD's row space never
leaves that of A_0). `init=pissa` takes A = √S_r V_rᵀ from the r largest singular values of W0. Difference from PiSSA: B
starts at zero instead of U_r √S_r, so W0 need not be changed and round 0 is the pretrained model.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit
from strategies.base import LoRAStrategy


class FFALoRA(LoRAStrategy):
    """Freeze A, average B."""

    trains = "B"
    downlink = "B"
    paper = "FFA-LoRA, 2403.12313"
    exact = True
    linear = True
    one_rank = "a client of lower rank would erase the columns of B that it does not hold"
    private = Fit.STRONG
    private_because = "noise in B alone enters B A linearly"

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(A, B̄) of every layer."""
        p = shares(updates)
        merged = {
            name: Pair(state.adapters[name].A, lowrank.average([pair.B for pair in pairs], p))
            for name, pairs in layers(updates).items()
        }
        return replace(state, adapters=merged)
