"""Means that bear with a few clients gone wrong: what is merged instead of everybody's own update.

    median       of every coordinate                                  (Yin et al., ICML 2018)
    trimmed      mean of every coordinate without the `trim` share of the clients at each end     (the same)
    norm_filter  everybody's own but those that moved further than `factor` times the median move

All count every client once, since the examples that a client claims are its own word. The first two give one update, which
any strategy can merge; what a strategy makes of several clients' factors (LoRA-FAIR's correction) then has nothing to work
on. The third composes with everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean

from fedlora.arrays.messages import ServerState, Update, norm, trained_arrays, update_of

Robust = Callable[[ServerState, list[Update], str], list[Update]]


def make(mean: str, trim: float = 0.1, factor: float = 3.0) -> Robust:
    """The function of (state, updates, factors sent) for a mean of that name."""
    if mean == "norm_filter":
        return lambda state, updates, sends: norm_filter(state, updates, sends, factor)
    if mean == "median":
        return lambda state, updates, sends: _one(state, updates, sends, lambda stacked: np.median(stacked, axis=0))
    return lambda state, updates, sends: _one(state, updates, sends, lambda stacked: trim_mean(stacked, trim))


def norm_filter(state: ServerState, updates: list[Update], sends: str, factor: float) -> list[Update]:
    """The updates whose distance from the state is at most `factor` times the median distance, each counted once."""
    start = trained_arrays(state.adapters, state.dense, sends)
    sent = [trained_arrays(update.adapters, update.dense, sends) for update in updates]
    distances = np.array([norm({key: arrays[key] - array for key, array in start.items()}) for arrays in sent])
    kept = distances <= factor * np.median(distances)
    return [replace(update, examples=1) for update, near in zip(updates, kept, strict=True) if near]


def _one(state: ServerState, updates: list[Update], sends: str, centre: Callable[[np.ndarray], np.ndarray]) -> list[Update]:
    sent = [trained_arrays(update.adapters, update.dense, sends) for update in updates]
    middle = {key: centre(np.stack([arrays[key] for arrays in sent])) for key in sent[0]}
    return [update_of(state, middle, examples=sum(update.examples for update in updates))]
