"""What a round measures of its updates and its merge, from factors only. docs/metrics.md has the formulas."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlora import lowrank, messages
from fedlora.messages import ServerState, Update
from strategies.updates import MANY, layers, shares


def client_metrics(updates: list[Update]) -> dict[str, float]:
    """Averages, weighted by examples, of what every client measured of its own training, as `client_<name>`."""
    if not updates:
        return {}
    p, first = shares(updates), updates[0].metrics
    names = [name for name in first if name != messages.CLIENT and all(name in u.metrics for u in updates)]
    return {f"client_{name}": float(p @ np.array([u.metrics[name] for u in updates])) for name in names}


def signal_to_noise(before: ServerState, updates: list[Update], measured: list[Update]) -> dict[str, float]:
    """‖Σ p_k X_k − X‖ over the norm that noise alone is expected to give it, X all that clients send; plain SGD under DP only.

    Every client says in what it `measured` its noise's standard deviation s_k in each coordinate; that of the average is
    √Σ p_k² s_k².
    """
    if not measured or any(not update.metrics.get("noise_std") for update in measured):
        return {}
    std = float(np.linalg.norm(shares(measured) * np.array([update.metrics["noise_std"] for update in measured])))
    p, moved, dimensions = shares(updates), 0.0, 0
    for sent, start in _sent(before, updates):
        average = lowrank.average(sent, p)
        moved += float(np.sum((average - start.astype(np.float64)) ** 2))
        dimensions += start.size
    return {"signal_to_noise": float(np.sqrt(moved / dimensions)) / std} if dimensions else {}


def _sent(before: ServerState, updates: list[Update]) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """What the clients changed, array by array, beside what they started from; a factor that nobody changed is left out."""
    for layer, pair in before.adapters.items():
        for factor, start in pair._asdict().items():
            sent = [getattr(update.adapters[layer], factor) for update in updates]
            if any(not np.array_equal(array, start) for array in sent):
                yield sent, start
    for name, start in before.dense.items():
        yield [update.dense[name] for update in updates], start


def geometry(before: ServerState, after: ServerState, updates: list[Update]) -> dict[str, float]:
    """How far a merge is from the ideal and from the round before, norms over all layers together.

    `aggregation_bias` = ‖ΔW − B̄Ā‖ / ‖ΔW‖ of plain averaging; `merge_error` = the same for what the strategy made of it;
    `update_norm` = ‖scale · (B'A' − BA)‖ of the round, `update_effective_rank` its mean effective rank over layers. The first
    two grow with the square of the clients where both factors differ, and are left out of cohorts of `MANY`.
    """
    p, few = shares(updates), len(updates) < MANY
    ideal, missed, error, moved, ranks = [], [], [], [], []
    for name, pairs in layers(updates).items():
        merged = after.adapters[name]
        if few:
            exact = lowrank.stack(pairs, p)
            ideal.append(lowrank.norm(exact))
            missed.append(lowrank.norm(lowrank.bias(pairs, p)))
            error.append(lowrank.norm(lowrank.subtract(exact, merged)))
        values = after.scale * lowrank.spectrum(lowrank.subtract(merged, before.adapters[name]))
        moved.append(float(np.linalg.norm(values)))
        ranks.append(lowrank.effective_rank(values))
    measured = {"update_norm": float(np.linalg.norm(moved)), "update_effective_rank": float(np.mean(ranks))}
    if not few:
        return measured
    whole = float(np.linalg.norm(ideal))
    return measured | {
        "aggregation_bias": float(np.linalg.norm(missed)) / whole if whole else 0.0,
        "merge_error": float(np.linalg.norm(error)) / whole if whole else 0.0,
    }
