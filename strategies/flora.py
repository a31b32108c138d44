"""FLoRA: clients' factors are stacked and added to the base, exactly (Wang et al., NeurIPS 2024, arXiv 2409.05976).

    A_s = [A_1; A_2; …],   B_s = [p_1 B_1, p_2 B_2, …],   W0 ← W0 + s · B_s A_s,   A drawn anew,   B ← 0

B_s A_s = Σ p_k B_k A_k for clients of any ranks. Differences from the paper: W0 itself is never changed, what was added to
it is kept beside it as a pair of thin factors; p_k multiplies B_k, not A_k, which is the same product; the new A is drawn
from the run's seed and the round, so that clients can draw it too and it need not travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedlora import seeds
from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit, Unequal
from strategies.base import LoRAStrategy


class FLoRA(LoRAStrategy):
    """Stack all factors into the base and begin anew from a random A and B = 0."""

    trains = "AB"
    downlink = ""
    resamples_A = True
    corrects = True
    paper = "FLoRA, 2409.05976"
    exact = True
    keeps_basis = False
    unequal = Unequal.NATIVE
    private = Fit.WEAK
    private_because = "noise in both factors multiplies in B A, and the base keeps it"

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        if self.init == "pissa":
            raise ConfigError("strategy.init=pissa takes A from W0, and flora draws A anew; use kaiming or orthonormal")

    def moves(self, ranks: Sequence[int]) -> int:
        """All that is stacked."""
        return sum(ranks)

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """Base correction ⊕ Σ p_k B_k A_k, and (A drawn for the next round, 0), of every layer."""
        p, rng = shares(updates), seeds.stream(self.seed, "adapters", round=round)
        moved, fresh = {}, {}
        for name, pairs in sorted(layers(updates).items()):
            moved[name] = lowrank.add(state.base_correction.get(name), lowrank.stack(pairs, p))
            A, B = state.adapters[name]
            fresh[name] = Pair(lowrank.draw(A.shape, self.init, rng).astype(A.dtype), np.zeros_like(B))
        return replace(state, adapters=fresh, base_correction=moved)
