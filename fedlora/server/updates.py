"""What clients sent: read and checked one by one, weighted, averaged where it is not an adapter."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedlora.arrays import compression, lowrank, messages
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.arrays.sums import Sum
from fedlora.server.replies import MOST_EXAMPLES, metrics_of, weight_of
from fedlora.untrusted import Malformed

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
    client: int,
    content: RecordDict,
    state: ServerState,
    weight_key: str,
    sends: str | None,
    changes: bool = False,
    trains: str = "AB",
) -> Update:
    """One client's reply as an Update, in the dtype of what it was given: `state`, which completes what it did not send.

    `sends` names the factors that it must send, with all dense arrays; None: it keeps its arrays. With `changes` the arrays
    are what it changed, to be added to those of `state`. It may send a factor that it does not train (`trains`) as it was.
    Raises ValueError for whatever else came: another shape, a missing or unknown array, NaN or infinity, bytes that hold no
    array, examples that cannot be counted, a factor that it was not to train and has changed.
    """
    record, metrics = messages.first(content, ArrayRecord), messages.first(content, MetricRecord)
    if record is None or metrics is None or weight_key not in metrics:
        raise Malformed(f"the reply lacks its arrays or its {weight_key}")
    examples = weight_of(metrics, weight_key, MOST_EXAMPLES)
    others = {name: value for name, value in metrics_of(metrics).items() if name != weight_key}
    if sends is None:
        return Update(client, examples, state.adapters, state.dense, others)
    shapes = {name: array.shape for name, array in messages.named(state.adapters, state.dense).items()}
    arrays = messages.arrays_of(record, most_bytes(shapes))
    adapters, dense = state.adapters, state.dense
    factors, sent, _ = messages.sort(compression.decode(arrays, shapes))
    dense = messages.complete_dense(sent, state.dense)
    if sends or factors:
        adapters = messages.complete(factors, state.adapters)
    if changes:
        dense = {name: state.dense[name] + array for name, array in dense.items()}
        adapters = {layer: _added(state.adapters[layer], pair, factors.get(layer, ())) for layer, pair in adapters.items()}
    for layer, own in sorted(factors.items()):
        if lacking := set(sends) - set(own):
            raise Malformed(f"{layer}.lora_{min(lacking)} is missing")
    for name, array in messages.named(adapters, dense).items():
        if not np.isfinite(array).all():
            raise Malformed(f"{name.removesuffix('.weight')} has NaN or infinite entries")
    return Update(client, examples, _frozen(adapters, state.adapters, trains), dense, others)


def _frozen(adapters: Adapters, given: Adapters, trains: str) -> Adapters:
    """The adapters, a factor that is not trained being the very one given; raises Malformed where a client has changed it.

    A client may hold its model in half precision: what float16 or bfloat16 rounds away is no change.
    """
    for f in sorted({"A", "B"} - set(trains)):
        for layer, pair in adapters.items():
            own, sent = getattr(given[layer], f), getattr(pair, f)
            if sent is not own and not np.allclose(sent, own, rtol=2**-8, atol=2**-24):
                raise Malformed(f"it changed {layer}.lora_{f}, which this round does not train; freeze lora_{f} at the client")
        adapters = {layer: pair._replace(**{f: getattr(given[layer], f)}) for layer, pair in adapters.items()}
    return adapters


def most_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that a reply with arrays of these shapes may have: eight an entry and a header each, and something to spare."""
    return 2**20 + sum(8 * math.prod(shape) + 1024 for shape in shapes.values())


def _added(start: Pair, pair: Pair, changed: Container[str]) -> Pair:
    with np.errstate(over="ignore", invalid="ignore"):  # whoever reads it looks for what is not finite
        return Pair(*(own + new if f in changed else own for f, own, new in zip(Pair._fields, start, pair, strict=True)))


def mean_of(total: Sum, state: ServerState) -> Update:
    """The average of what was added up, as one update of no client's own, in the dtypes of the state."""
    factors, dense, _ = messages.sort(total.mean())
    adapters = messages.complete(factors, state.adapters) if factors else state.adapters
    return Update(-1, total.examples, adapters, messages.complete_dense(dense, state.dense))


def distance(update: Update, start: ServerState) -> float:
    """‖X − X_0‖ over everything that a client has now and that it was given; infinite where a square overflows float64."""
    pairs = [(new, old) for name, pair in update.adapters.items() for new, old in zip(pair, start.adapters[name], strict=True)]
    pairs += [(array, start.dense[name]) for name, array in update.dense.items()]
    moved = (np.subtract(new, old, dtype=np.float64).ravel() for new, old in pairs if new is not old)
    with np.errstate(over="ignore"):
        return math.sqrt(sum(float(change @ change) for change in moved))


def size_of(state: ServerState) -> float:
    """The norm of all that a state holds, without its base correction; 1 where that is zero."""
    return messages.norm(messages.trained_arrays(state.adapters, state.dense, "AB")) or 1.0


def too_long(lengths: Mapping[int, float], size: float, most: float) -> dict[int, str]:
    """Client → why, of those whose update is longer than `most` times the cohort's median and than the state, of norm `size`.

    The median is the lower one: of two clients, the shorter. A client alone has none beside it, and is held against `size`.
    As long as fewer than half of the cohort mean harm, some honest client's length is the bound over `most`, or a longer one
    is: nobody is left out for what another sent.
    """
    if not lengths:
        return {}
    middle = sorted(lengths.values())[(len(lengths) - 1) // 2] if len(lengths) > 1 else size
    than = f"{most:g} times the median of {middle:.3g}" if len(lengths) > 1 else f"{most:g} times the model's {middle:.3g}"
    return {
        client: f"its update has norm {length:.3g}, more than server.max_update={than}"
        for client, length in lengths.items()
        if length > max(most * middle, size)
    }


def capped(updates: list[Update], most: float) -> list[Update]:
    """The updates with examples counted so far that none has more than the share `most` of all, or 1/K where that is more."""
    if most >= 1 or len(updates) < 2:
        return updates
    examples = np.array([update.examples for update in updates])
    unit = 1 if examples.dtype.kind == "i" else float(examples.min()) / 2**20  # other weights need not be whole numbers
    low, high = int(examples.min() / unit), int(examples.max() / unit)
    while low < high:  # the share of one that counts c examples rises with c
        middle = (low + high + 1) // 2
        fits = middle * unit <= most * float(np.minimum(examples, middle * unit).sum())
        low, high = (middle, high) if fits else (low, middle - 1)
    return [replace(update, examples=min(update.examples, low * unit)) for update in updates]


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
