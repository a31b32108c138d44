"""Fed-SB: both factors are frozen, an r × r matrix between them is trained (Singhal et al., arXiv 2502.15436).

    W = W0 + s · B R A,   B and A frozen,   R̄ = Σ p_k R_k,   so   B R̄ A = Σ p_k B R_k A   exactly

R begins at zero and travels alone, as `<layer>.lora_R.weight`, r² floats a layer of any size. Difference from the paper: A
has orthonormal rows and B orthonormal columns drawn from the run's seed, where the paper takes the singular vectors of a
first gradient. That costs no privacy, since it looks at no data, and loses what the gradient would tell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fedlora.arrays import lowrank
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError
from fedlora.server.updates import shares
from fedlora.server.wire import Fit
from strategies.base import LoRAStrategy


class FedSB(LoRAStrategy):
    """Freeze orthonormal A and B, train and average R."""

    trains = "R"
    downlink = "R"
    paper = "Fed-SB, 2502.15436"
    exact = True
    linear = True
    one_rank = "R̄ needs clients of one rank"
    private = Fit.STRONG
    private_because = "noise enters B R A linearly and in r² coordinates a layer, and the frozen factors are public"

    def __init__(self, *, init: Annotated[str, "how A and B begin: orthonormal"] = "orthonormal", **keywords: Any) -> None:
        super().__init__(init=init, **keywords)
        if init != "orthonormal":
            raise ConfigError(f"strategy.init={init} does not suit fed_sb, whose frozen factors are orthonormal; leave it out")

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """R̄ of every layer; A and B as they were."""
        p, names = shares(updates), [f"{layer}.lora_R.weight" for layer in state.adapters]
        averaged = {name: lowrank.average([update.dense[name] for update in updates], p) for name in names}
        return replace(state, dense=state.dense | averaged)
