"""What clients sent: read and checked one by one, weighted, averaged where it is not an adapter."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedlora import compression, lowrank, messages
from fedlora.lowrank import Pair
from fedlora.messages import ServerState, Update
from fedlora.sums import Sum

MANY = 256  # clients in a cohort from which what grows with their number is left out, and a mean is summed as they come


def at_rank(state: ServerState, rank: int) -> ServerState:
    """What a client of a lower rank is given: the first rows of A and columns of B, and the scale alpha / rank of its own.

    B is divided by what that scale is larger by, so that the product with the scale is that of the same rows and columns.
    At the state's own rank it is the state itself.
    """
    own = next(iter(state.adapters.values())).rank
    if rank == own:
        return state
    cut = {name: Pair(pair.A[:rank], pair.B[:, :rank] * pair.B.dtype.type(rank / own)) for name, pair in state.adapters.items()}
    return replace(state, adapters=cut, scale=state.scale * own / rank)


def in_scale(update: Update, scale: float, state: ServerState, padded: bool) -> Update:
    """The update of a client whose own scale is `scale`, in that of the state: what it is larger by goes into B.

    With `padded`, at the rank of the state too: by columns of zeros beside B, and below A by the rows that the client was not
    given, since a direction that is zero in both factors would never move again.
    """
    if scale == state.scale:
        return update
    factor = scale / state.scale
    pairs = {name: Pair(pair.A, pair.B * pair.B.dtype.type(factor)) for name, pair in update.adapters.items()}
    if padded:
        pairs = {
            name: lowrank.pad(pair, own.rank, own.A)
            for (name, pair), own in zip(pairs.items(), state.adapters.values(), strict=True)
        }
    return replace(update, adapters=pairs)


def read_update(
    client: int, content: RecordDict, state: ServerState, weight_key: str, sends: str | None, changes: bool = False
) -> Update:
    """One client's reply as an Update, in the dtype of what it was given: `state`, which completes what it did not send.

    `sends` names the factors that it must send, with all dense arrays; None: it keeps its arrays. With `changes` the arrays
    are what it changed, to be added to those of `state`.
    Raises ValueError for another shape, a missing or unknown array, NaN or infinity, or examples that cannot be counted.
    """
    arrays, metrics = messages.first(content, ArrayRecord), messages.first(content, MetricRecord)
    if arrays is None or metrics is None or weight_key not in metrics:
        raise ValueError(f"the reply lacks its arrays or its {weight_key}")
    adapters, dense = state.adapters, state.dense
    if sends is not None:
        factors, dense, _ = messages.sort(compression.decode(messages.arrays_of(arrays)))
        dense = messages.complete_dense(dense, state.dense)
        if sends or factors:
            adapters = messages.complete(factors, state.adapters)
        if changes:
            dense = {name: state.dense[name] + array for name, array in dense.items()}
            adapters = {layer: _added(state.adapters[layer], pair, factors.get(layer, ())) for layer, pair in adapters.items()}
        for layer, sent in sorted(factors.items()):
            if lacking := set(sends) - set(sent):
                raise ValueError(f"{layer}.lora_{min(lacking)} is missing")
        for name, array in messages.named(adapters, dense).items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name.removesuffix('.weight')} has NaN or infinite entries")
    examples = metrics[weight_key]
    if isinstance(examples, list) or not (examples >= 1 and float(examples).is_integer()):
        raise ValueError(f"{weight_key} is {examples}")
    others = {k: float(v) for k, v in metrics.items() if k != weight_key and isinstance(v, int | float)}
    return Update(client, int(examples), adapters, dense, others)


def _added(start: Pair, pair: Pair, changed: Container[str]) -> Pair:
    return Pair(*(own + new if f in changed else own for f, own, new in zip(Pair._fields, start, pair, strict=True)))


def mean_of(total: Sum, state: ServerState) -> Update:
    """The average of what was added up, as one update of no client's own, in the dtypes of the state."""
    factors, dense, _ = messages.sort(total.mean())
    adapters = messages.complete(factors, state.adapters) if factors else state.adapters
    return Update(-1, total.examples, adapters, messages.complete_dense(dense, state.dense))


def average_dense(updates: list[Update]) -> dict[str, np.ndarray]:
    """Σ p_k of every dense array (the head), by name."""
    p = shares(updates)
    return {name: lowrank.average([update.dense[name] for update in updates], p) for name in updates[0].dense}


def shares(updates: list[Update]) -> np.ndarray:
    """p_k = n_k / Σ n_k, shape (K,)."""
    examples = np.array([update.examples for update in updates], dtype=np.float64)
    return examples / examples.sum()


def layers(updates: list[Update]) -> Mapping[str, list[Pair]]:
    """Layer name → that layer's pairs, one a client, in the order of `updates`."""
    return {name: [update.adapters[name] for update in updates] for name in updates[0].adapters}
