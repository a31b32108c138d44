"""What a round measures of its updates and its merge, from factors only. docs/metrics.md has the formulas."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlora.arrays import lowrank, messages
from fedlora.arrays.lowrank import Adapters
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import MANY, shares

STEPS = "steps"  # what clients count
COMPARED = 12  # clients whose row spaces are compared, pair by pair


def client_metrics(updates: list[Update]) -> dict[str, float]:
    """Averages, weighted by examples, of what every client measured of its own training, as `client_<name>`.

    Where all measured the same that is the average, with no rounding of the weights in it; a whole number of steps is one.
    """
    if not updates:
        return {}
    p, first = shares(updates), updates[0].metrics
    names = [name for name in first if name != messages.CLIENT and all(name in u.metrics for u in updates)]
    found: dict[str, float] = {}
    for name in names:
        values = [update.metrics[name] for update in updates]
        average = values[0] if all(value == values[0] for value in values) else float(p @ np.array(values))
        found[f"client_{name}"] = int(average) if name == STEPS and average == int(average) else average
    return found


def signal_to_noise(before: ServerState, updates: list[Update], measured: list[Update]) -> dict[str, float]:
    """‖Σ p_k X_k − X‖ over the norm that noise alone is expected to give it, X all that clients send; plain SGD under DP only.

    Every client says in what it `measured` its noise's standard deviation s_k in each coordinate; that of the average is
    √Σ p_k² s_k². Left out where the arrays are of other shapes than the state's (clients of other ranks, FedASK's projections).
    """
    if not measured or any(not update.metrics.get("noise_std") for update in measured):
        return {}
    std = float(np.linalg.norm(shares(measured) * np.array([update.metrics["noise_std"] for update in measured])))
    p, moved, dimensions = shares(updates), 0.0, 0
    for sent, start in _sent(before, updates):
        if any(array.shape != start.shape for array in sent):
            return {}
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


def geometry(
    before: ServerState, after: ServerState, updates: list[Update], initial: Adapters | None = None
) -> dict[str, float]:
    """How far a merge is from the ideal, from the round before and from the start; norms over all layers together.

    `aggregation_bias` = ‖ΔW − B̄Ā‖ / ‖ΔW‖ of plain averaging; `merge_error` = the same for what the strategy made of it, what
    it moved into the base included; of the round's change, ‖scale · (W' − W)‖ as `update_norm` and `update_nuclear_norm`, and
    its mean `update_effective_rank` over layers; `client_angle`, the mean principal angle between the row spaces of A_k of
    clients (the first `COMPARED`), and `drift_of_A`, that between A and the `initial` one, both in degrees and means over
    layers. What compares clients grows with the square of their number, and is left out of cohorts of `MANY`, and where one
    update stands for them all.
    """
    p, few = shares(updates), len(updates) < MANY and all(update.client >= 0 for update in updates)
    began, ended = _changes(before, before), _changes(before, after)
    sent = [messages.fold(update.adapters, update.dense)[0] for update in updates]
    ideal, missed, error, moved, nuclear, ranks, angles, drift = ([] for _ in range(8))
    for name in before.adapters:
        pairs = [adapters[name] for adapters in sent]
        if few:
            exact, rank = lowrank.stack(pairs, p), max(pair.rank for pair in pairs)
            ideal.append(lowrank.norm(exact))
            missed.append(lowrank.norm(lowrank.bias([lowrank.pad(pair, rank) for pair in pairs], p)))
            error.append(lowrank.norm(lowrank.subtract(exact, ended[name])))
            alike = all(pair.A is pairs[0].A for pair in pairs)
            lowest = min(pair.rank for pair in pairs)
            rows = [pair.A[:lowest] for pair in pairs[:COMPARED]]
            if rank <= before.adapters[name].rank:  # not of FedASK's projections, whose rows outnumber their directions
                angles.append(0.0 if alike else lowrank.principal_angle(rows))
        values = after.scale * lowrank.spectrum(lowrank.subtract(ended[name], began[name]))
        moved.append(float(np.linalg.norm(values)))
        nuclear.append(lowrank.nuclear_norm(values))
        ranks.append(lowrank.effective_rank(values))
        if initial:
            both = after.adapters[name].A, initial[name].A
            drift.append(0.0 if np.array_equal(*both) else lowrank.principal_angle(both))
    measured = {
        "update_norm": float(np.linalg.norm(moved)),
        "update_nuclear_norm": float(np.sum(nuclear)),
        "update_effective_rank": float(np.mean(ranks)),
    }
    if initial:
        measured["drift_of_A"] = float(np.degrees(np.mean(drift)))
    if not few:
        return measured
    if angles:
        measured["client_angle"] = float(np.degrees(np.mean(angles)))
    whole = float(np.linalg.norm(ideal))
    return measured | {
        "aggregation_bias": float(np.linalg.norm(missed)) / whole if whole else 0.0,
        "merge_error": float(np.linalg.norm(error)) / whole if whole else 0.0,
    }


def _changes(since: ServerState, state: ServerState) -> Adapters:
    """What the adapters of a state, R folded in, and what has moved into its base `since` then come to, layer by layer."""
    adapters, _ = messages.fold(state.adapters, state.dense)
    changes = {}
    for name, pair in adapters.items():
        now, then = state.base_correction.get(name), since.base_correction.get(name)
        parts = [(pair, 1.0)]
        if now is not then:
            parts += [(base, sign) for base, sign in ((now, 1.0), (then, -1.0)) if base is not None]
        pairs, signs = zip(*parts, strict=True)
        changes[name] = lowrank.stack(pairs, np.array(signs)) if len(parts) > 1 else pair
    return changes
