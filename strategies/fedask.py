"""FedASK: the ideal update is found from random sketches of the clients' products (Guo et al., arXiv 2507.09990).

    Y = Σ p_k B_k (A_k Ω),   Q = qr(Y),   U S Vᵀ = Q · Σ p_k (Qᵀ B_k) A_k,   A ← √S_r V_rᵀ,   B ← U_r √S_r

Ω is n × l, standard normal, l = r + oversampling. If l is at least the rank of Σ p_k B_k A_k, the sketch loses nothing, and
what is merged is its best approximation of rank r: with `factors=B` (the paper's choice under DP) the ideal update itself.
Differences from the paper: Ω is drawn by every client from the run's seed, anew in each round; l is at most min(m, n); a
direction whose singular value is zero keeps a row of A, so that it can be trained again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np

from fedlora import check
from fedlora.arrays import lowrank, sketch
from fedlora.arrays.lowrank import Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import layers, shares
from fedlora.server.wire import Ask, Fit, Shapes
from strategies.base import LoRAStrategy


class FedASK(LoRAStrategy):
    """Ask clients for sketches, then for projections on what they span, and truncate the SVD of the sum."""

    trains = "AB"
    two_phase = True
    paper = "FedASK, 2507.09990"
    exact = False  # of both factors: a sum of K clients has rank up to K·r; with factors=B it is
    keeps_basis = False
    one_rank = "the paper's sketch is for clients of one rank"
    private = Fit.GOOD
    private_because = "with factors=B, where noise enters B A linearly; weak with both factors"

    def __init__(
        self,
        *,
        factors: Annotated[str, "what clients train: AB, or B (for DP)"] = "AB",
        oversampling: Annotated[int, "columns of the sketch beyond the adapter's rank"] = 10,
        **keywords: Any,
    ) -> None:
        super().__init__(**keywords)
        self.factors = check.one_of(("AB", "B"), **{"strategy.factors": factors})
        check.at_most(1000, **{"strategy.oversampling": oversampling})
        self.oversampling = check.not_negative(**{"strategy.oversampling": oversampling})

    def trained(self, round: int) -> str:
        """As `factors` says, in every round."""
        return self.factors

    def gather(self, state: ServerState, updates: list[Update], round: int, ask: Ask) -> list[Update]:
        """Of every client that answers both messages, Qᵀ B_k A_k as A and the one Q as B.

        Of one that answers the first alone its share of Q stays, so that a full sketch of the others may be none.
        """
        ends, names = self._shapes(state), list(state.adapters)
        columns = {sketch.COLUMNS: np.array([self._columns(state)])}
        sketches = ask("sketch", {update.client: columns for update in updates}, ends[0])
        updates = [update for update in updates if update.client in sketches]
        if not updates:
            return []
        p = shares(updates)
        Y = {name: lowrank.average([sketches[u.client][f"{name}.sketch"] for u in updates], p) for name in names}
        Q = {name: sketch.basis(Y[name]) for name in names}
        sent = {f"{name}.basis": Q[name] for name in names}
        answers = ask("project", {update.client: sent for update in updates}, ends[1])
        return [
            replace(u, adapters={name: Pair(answers[u.client][f"{name}.projected"], Q[name]) for name in names})
            for u in updates
            if u.client in answers
        ]

    def sent_further(self, state: ServerState) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Arrays like those of the two further messages: sketches and projections up, bases down."""
        sketched, projected = self._shapes(state)
        bases = {name.replace(".sketch", ".basis"): shape for name, shape in sketched.items()}
        up, down = ({name: np.zeros(shape, np.float32) for name, shape in s.items()} for s in (sketched | projected, bases))
        return up, down | {sketch.COLUMNS: np.array([self._columns(state)])}

    def _columns(self, state: ServerState) -> int:
        return max(pair.rank for pair in state.adapters.values()) + self.oversampling

    def _shapes(self, state: ServerState) -> tuple[Shapes, Shapes]:
        sizes = {name: (len(pair.B), pair.A.shape[1]) for name, pair in state.adapters.items()}
        width = {name: min(self._columns(state), *size) for name, size in sizes.items()}
        sketched: Shapes = {f"{name}.sketch": (m, width[name]) for name, (m, _) in sizes.items()}
        return sketched, {f"{name}.projected": (width[name], n) for name, (_, n) in sizes.items()}

    def merge(self, state: ServerState, updates: list[Update], round: int) -> ServerState:
        """(√S_r V_rᵀ, U_r √S_r) of every layer's Σ p_k Q Qᵀ B_k A_k; (A, 0) where that is zero."""
        p, merged = shares(updates), {}
        for name, pairs in layers(updates).items():
            found, old = lowrank.stack(pairs, p), state.adapters[name]
            merged[name] = lowrank.split(found, old.rank) if lowrank.norm(found) else Pair(old.A, np.zeros_like(old.B))
        return replace(state, adapters=merged)
