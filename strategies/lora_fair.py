"""LoRA-FAIR: averaged factors, with B corrected towards the ideal update (Bian et al., ICCV 2025, arXiv 2411.14961).

    min over ΔB of  S(ΔW, (B̄ + ΔB) Ā) + λ ‖ΔB‖,   ΔW = Σ p_k B_k A_k,   A ← Ā,   B ← B̄ + ΔB

The correction can only remove the part of ΔW − B̄Ā that lies in the row space of Ā. Two solvers:

* `ridge` (default): S is the squared Frobenius distance and the penalty is squared, which has a closed form,
  ΔB = (ΔW − B̄Ā) Āᵀ (ĀĀᵀ + λI)⁻¹;
* `sgd`: the paper's S, 1 − cosine similarity, by gradient descent. Differences from the paper: ΔB starts at zero (from a
  random start it does not decay at λ = 0.01); the penalty, whose gradient jumps at zero, is applied as its exact shrinkage
  of ΔB; and lr is in units of ‖BĀ‖² / λ_max(ĀĀᵀ), the natural step of a function that ignores scale. With lr ≤ 1 no step
  raises the objective (tested, not proved); where λ outweighs the gradient, as it does for a large B, ΔB = 0.

Both use r-sized products only: ΔW Āᵀ = Σ p_k B_k (A_k Āᵀ).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np

from fedlora import check
from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Fit, Unequal
from strategies.base import LoRAStrategy


class LoRAFair(LoRAStrategy):
    """Average A and B, then correct B; `lam` is λ, `steps` and `lr` belong to solver=sgd."""

    trains = "AB"
    paper = "LoRA-FAIR, 2411.14961"
    exact = False
    unequal = Unequal.PADDED
    private = Fit.WEAK
    private_because = "noise in both factors multiplies in B A"

    def __init__(
        self,
        *,
        solver: Annotated[str, "ridge (closed form) or sgd (the paper's cosine objective)"] = "ridge",
        lam: Annotated[float, "λ, the weight of the penalty on the correction of B"] = 0.01,
        steps: Annotated[int, "descent steps a round", "strategy.solver=sgd"] = 100,
        lr: Annotated[float, "step, in units of ‖BĀ‖² / λ_max(ĀĀᵀ)", "strategy.solver=sgd"] = 1.0,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        self.solver = check.one_of(("ridge", "sgd"), **{"strategy.solver": solver})
        self.lam = check.not_negative(**{"strategy.lam": lam})
        check.at_most(1e5, **{"strategy.steps": steps})
        self.steps = check.positive(**{"strategy.steps": steps})
        self.lr = check.positive(**{"strategy.lr": lr})

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(Ā, B̄ + ΔB) of every layer."""
        p, merged = shares(updates), {}
        for name, pairs in layers(updates).items():
            A = lowrank.average([pair.A for pair in pairs], p)
            B = self._ridge(pairs, p, A) if self.solver == "ridge" else self._descend(pairs, p, A)
            merged[name] = Pair(A, B.astype(pairs[0].B.dtype))
        return replace(state, adapters=merged)

    def _ridge(self, pairs: list[Pair], p: np.ndarray, A: np.ndarray) -> np.ndarray:
        """B̄ + ΔB = Σ p_k B_k (I + (A_k − Ā) Āᵀ (ĀĀᵀ + λI)⁻¹), shape (m, r), in one pass over the clients.

        It holds since Σ p_k B_k (A_k − Ā) = ΔW − B̄Ā. With λ = 0 and a rank-deficient Ā, the least-squares solution of
        smallest norm. What goes through A_k and B_k is in their own dtype, all else in float64.
        """
        wide = A.astype(np.float64)
        _, s, Ut = np.linalg.svd(np.linalg.qr(wide.T, mode="r"), full_matrices=False)  # Ā = U s Vᵀ; Uᵀ (k, r)
        kept = s > np.finfo(np.float64).eps * A.shape[1] * s[0]
        inverse = np.divide(1.0, s**2 + self.lam, out=np.zeros_like(s), where=kept)  # (ĀĀᵀ + λI)⁻¹ = U inverse Uᵀ
        directions = (wide.T @ Ut.T).astype(A.dtype)  # V s, (n, k)
        missed = np.array([(pair.A - A) @ directions for pair in pairs])  # (K, r, k)
        turns = p[:, None, None] * (np.eye(len(A)) + (missed * inverse) @ Ut)
        B = np.zeros_like(pairs[0].B)
        for pair, turn in zip(pairs, turns.astype(A.dtype), strict=True):
            B += pair.B @ turn
        return B

    def _descend(self, pairs: list[Pair], p: np.ndarray, A: np.ndarray) -> np.ndarray:
        """B̄ + ΔB, shape (m, r), after `steps` of proximal gradient descent from zero. ΔB = 0 where the cosine has no meaning.

        ΔB never leaves the columns of B̄ and ΔW Āᵀ, so that the descent is on its coordinates in a basis of them, (2r, r).
        """
        centre, ideal = lowrank.average([pair.B for pair in pairs], p), lowrank.stack(pairs, p)
        length = lowrank.norm(ideal)
        if not length * lowrank.norm(Pair(A, centre)):
            return centre
        A = A.astype(np.float64)
        goal = ideal.B @ (ideal.A @ A.T) / length  # (m, r), so that the cosine is ⟨goal, B⟩ / ‖BĀ‖
        basis, coordinates = np.linalg.qr(np.concatenate([centre, goal], axis=1))
        start, goal = np.split(coordinates, 2, axis=1)
        gram, steepest = A @ A.T, np.linalg.norm(A, 2) ** 2
        correction = np.zeros_like(start)
        for _ in range(self.steps):
            B = start + correction
            size = np.sqrt(np.sum((B @ gram) * B))  # ‖BĀ‖
            cosine = np.sum(goal * B) / size
            correction -= self.lr / steepest * (cosine * (B @ gram) - size * goal)  # the step times the gradient of S
            moved, shrinkage = np.linalg.norm(correction), self.lr / steepest * size**2 * self.lam
            correction *= max(0.0, 1.0 - shrinkage / moved) if moved else 0.0
        return centre + basis @ correction
