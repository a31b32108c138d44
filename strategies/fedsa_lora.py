"""FedSA-LoRA: clients share A and keep their own B (Guo et al., ICLR 2025, arXiv 2410.01463).

    A ← Ā = Σ p_k A_k,   client k goes on from (Ā, B_k)

Every client has a model of its own, W0 + s · B_k Ā, and its own head: the server's state has B = 0, which is the model of a
client that has never trained. Differences from the paper: none in the averages; the head stays on the client too.
"""

from __future__ import annotations

from dataclasses import replace

from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit
from strategies.base import LoRAStrategy


class FedSALoRA(LoRAStrategy):
    """Train A and B, average A; B and the head stay on the client."""

    trains = "AB"
    personal = "B"
    downlink = "A"
    paper = "FedSA-LoRA, 2410.01463"
    exact = False
    linear = True
    one_rank = "Ā needs clients of one rank"
    private = Fit.POSSIBLE
    private_because = "only A leaves the client, but the noise of both factors is in each client's model"

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(Ā, B) of every layer, B being the one with which a client begins."""
        p = shares(updates)
        merged = {
            name: Pair(lowrank.average([pair.A for pair in pairs], p), state.adapters[name].B)
            for name, pairs in layers(updates).items()
        }
        return replace(state, adapters=merged)
