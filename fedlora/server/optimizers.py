"""Optimisers of the server: a merge is a step to take, and its change a gradient turned round (Reddi et al., ICLR 2021).

    Δ = X_merged − X            of every array that clients send
    momentum   v ← β v − Δ,                                        X ← X − lr · v                       (Flower's FedAvgM)
    adam       m ← β1 m + (1 − β1) Δ,   v ← β2 v + (1 − β2) Δ²,    X ← X + lr_t · m / (√v + τ)           (Flower's FedAdam)
               lr_t = lr · √(1 − β2^(t+1)) / (1 − β1^(t+1)),       t the merges that the array has seen

Flower's own keep their moments in the strategy; here they are in `ServerState.extra`, where a checkpoint finds them. The
tests hold both to Flower's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from fedlora.arrays.messages import ServerState, trained_arrays, update_of

Step = Callable[[np.ndarray, dict[str, np.ndarray]], np.ndarray]  # Δ, the array's memory (changed) → what X moves by


def make(
    name: str, lr: float, momentum: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Callable[[ServerState, ServerState, str], ServerState]:
    """The function of (state before, merged state, factors sent) → state; moments start at zero."""
    step: Step = partial(_momentum, lr=lr, beta=momentum)
    if name == "adam":
        step = partial(_adam, lr=lr, betas=(momentum, beta2), tau=tau)
    return lambda before, merged, sends: _moved(before, merged, sends, step)


def _momentum(delta: np.ndarray, memory: dict[str, np.ndarray], lr: float, beta: float) -> np.ndarray:
    memory["v"] = beta * memory.get("v", 0.0) - delta
    return -lr * memory["v"]


def _adam(delta: np.ndarray, memory: dict[str, np.ndarray], lr: float, betas: tuple[float, float], tau: float) -> np.ndarray:
    memory["t"] = memory.get("t", np.zeros(())) + 1
    memory["m"], memory["v"] = (
        beta * memory.get(key, 0.0) + (1 - beta) * power
        for key, beta, power in zip("mv", betas, (delta, delta**2), strict=True)
    )
    kept = [1 - beta ** (float(memory["t"]) + 1) for beta in betas]
    return lr * np.sqrt(kept[1]) / kept[0] * memory["m"] / (np.sqrt(memory["v"]) + tau)


def _moved(before: ServerState, merged: ServerState, sends: str, step: Step) -> ServerState:
    start = trained_arrays(before.adapters, before.dense, sends)
    end, extra = trained_arrays(merged.adapters, merged.dense, sends), dict(merged.extra)
    for (name, factor), array in start.items():
        prefix = f"optimizer/{name}/{factor}/"
        memory = {key.removeprefix(prefix): value for key, value in extra.items() if key.startswith(prefix)}
        end[name, factor] = array + step(end[name, factor] - array, memory)
        extra |= {prefix + key: value for key, value in memory.items()}
    moved = update_of(merged, end, examples=1)
    return replace(merged, adapters=moved.adapters, dense=moved.dense, extra=extra)
