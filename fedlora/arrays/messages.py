"""Flower records ⇄ adapters, and exact byte counts.

On the wire an array has the name it has in PEFT's own file format, so `ArrayRecord(get_peft_model_state_dict(model))` is
a valid broadcast and a record's arrays are a valid `adapter_model.safetensors`:

    <layer>.lora_A.weight   (r, n)        <layer>.lora_B.weight   (m, r)        anything else: a dense array (the head)

Three names are ours, and no file's:

    <layer>.lora_R.weight   (r, r)        between the factors: the adapter is B · R A
    <layer>.base_A.weight   (q, n)        <layer>.base_B.weight   (m, q)        base correction: W0 + scale · base_B · base_A
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedlora import untrusted
from fedlora.arrays.lowrank import Adapters, Pair

ARRAYS, METRICS, CONFIG = "arrays", "metrics", "config"  # the records of a message
SUM = "sum"  # the record of a reply whose arrays were added to those of others; see fedlora.arrays.sums
EXAMPLES, CLIENT = "num-examples", "client"  # keys of the metrics
ROUND, TRAINS, EXPERIMENT = "server-round", "trains", "experiment"  # keys of the config
# Keys of the config that say what travels: the factors that a client sends, with its head; those that stay, with its head;
# whether it remembers all that it trained, and whether it sends nothing of it; how it encodes what it changed.
SENDS, PERSONAL, KEEPS, SILENT = "sends", "personal", "keeps", "silent"
ENCODES, SHARE, CHANGES = "encodes", "share", "changes"
ADDS = "adds"  # whether replies may be added up on their way
INIT, DRAWN, RANK = "init", "drawn", "rank"  # and how A began, in which round it was drawn, this client's rank
LINEAGE = "lineage"  # for devices: what a run and all that went on from it have in common, and no other
NOISE = "noise-multipliers"  # key of the config, with record-level privacy: σ of every client, by its number
BASE = "base"  # key of the config, for real devices: digest of the frozen weights that the adapters are made for

Record = TypeVar("Record", ArrayRecord, MetricRecord)
Named = dict[tuple[str, str], np.ndarray]  # (layer, "A" or "B"), or (name, "") for a dense array
Factors = dict[str, dict[str, np.ndarray]]  # layer name → {"A": …, "B": …}, either of which may be absent


@dataclass
class Update:
    """What one client sent, with the factor it did not send filled in from the broadcast."""

    client: int
    examples: float  # a whole number, unless a ServerApp weighs its clients by something else
    adapters: Adapters
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class ServerState:
    """All that a strategy carries from round to round.

    `scale` is alpha / rank; `base_correction` is what a strategy has moved out of the adapters into the base, as thin
    pairs (empty where W0 stays what it was); `extra` is a strategy's own memory.
    """

    adapters: Adapters
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    base_correction: Adapters = field(default_factory=dict)
    scale: float = 1.0
    extra: dict[str, np.ndarray] = field(default_factory=dict)


class Arrays(NamedTuple):
    """What a record holds."""

    factors: Factors
    dense: dict[str, np.ndarray]  # the head, and every R by its name on the wire
    correction: Adapters


def named(
    adapters: Adapters, dense: Mapping[str, np.ndarray], factors: str = "AB", correction: Mapping[str, Pair] | None = None
) -> dict[str, np.ndarray]:
    """The named factors ("AB", "A", "B" or none) of every layer, the dense arrays and the correction, by name, sorted."""
    arrays = {f"{layer}.lora_{f}.weight": getattr(pair, f) for layer, pair in adapters.items() for f in factors} | dict(dense)
    if correction:
        arrays |= {f"{layer}.base_{f}.weight": a for layer, pair in correction.items() for f, a in pair._asdict().items()}
    return {name: arrays[name] for name in sorted(arrays)}


def record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """The arrays as Flower sends them, in their order."""
    made = ArrayRecord()
    for name, array in arrays.items():  # one by one, since the record would make a copy of every Array of a dictionary
        made[name] = _to_wire(array)
    return made


def pack(
    adapters: Adapters, dense: Mapping[str, np.ndarray], factors: str = "AB", correction: Mapping[str, Pair] | None = None
) -> ArrayRecord:
    """The same arrays as `named` has them, as one record."""
    return record(named(adapters, dense, factors, correction))


def arrays_of(record: ArrayRecord, most_bytes: int = 2**63) -> dict[str, np.ndarray]:
    """The arrays of a record by name, copied out of its bytes; raises `untrusted.Malformed` for bytes that hold none."""
    return untrusted.arrays(record, most_bytes)


def unpack(record: ArrayRecord) -> Arrays:
    """The arrays of a record by what they are, copied out of its bytes."""
    return sort(arrays_of(record))


def sort(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays by what they are, which their names say. Raises ValueError for half a correction, a factor of two names."""
    factors, base = Factors(), Factors()
    dense: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        layer, _, last = name.removesuffix(".weight").rpartition(".")
        if layer and last in ("lora_A", "lora_B", "base_A", "base_B"):
            own = (factors if last.startswith("lora") else base).setdefault(layer, {})
            if last[-1] in own:
                raise ValueError(f"{layer}.{last} was sent twice")
            own[last[-1]] = array
        else:
            dense[name] = array
    if half := [layer for layer, both in base.items() if len(both) < 2]:
        raise ValueError(f"the base correction of {half[0]} lacks a factor")
    return Arrays(factors, dense, {layer: Pair(**both) for layer, both in base.items()})


def rotation(layer: str) -> str:
    """The name on the wire of what stands between the factors of a layer, R (r, r)."""
    return f"{layer}.lora_R.weight"


def fold(adapters: Adapters, dense: Mapping[str, np.ndarray]) -> tuple[Adapters, dict[str, np.ndarray]]:
    """(R·A, B) for every layer that has an R among the dense arrays, and the dense arrays without it."""
    folded = {
        layer: Pair((dense[name].astype(np.float64) @ pair.A).astype(pair.A.dtype), pair.B) if name in dense else pair
        for layer, pair in adapters.items()
        for name in (rotation(layer),)
    }
    return folded, {name: array for name, array in dense.items() if not name.endswith(".lora_R.weight")}


def trained_arrays(adapters: Adapters, dense: Mapping[str, np.ndarray], trains: str) -> Named:
    """What a client sends, float64: the trained factors of every layer and the dense arrays."""
    named = {(layer, f): getattr(pair, f) for layer, pair in adapters.items() for f in trains}
    return {key: array.astype(np.float64) for key, array in (named | {(n, ""): a for n, a in dense.items()}).items()}


def norm(arrays: Mapping[Any, np.ndarray]) -> float:
    """The Euclidean norm of all of them together; infinite where a square overflows."""
    with np.errstate(over="ignore"):
        return float(np.sqrt(sum(np.sum(array**2) for array in arrays.values())))


def update_of(state: ServerState, arrays: Named, examples: float) -> Update:
    """The arrays as one update of no client's own, in the dtypes of the state; a factor that is absent is the broadcast one."""
    adapters = {
        layer: Pair(*(arrays[layer, f].astype(own.dtype) if (layer, f) in arrays else own for f, own in pair._asdict().items()))
        for layer, pair in state.adapters.items()
    }
    return Update(-1, examples, adapters, {name: arrays[name, ""].astype(own.dtype) for name, own in state.dense.items()})


def complete(factors: Factors, known: Adapters) -> Adapters:
    """Adapters from what was sent, with the factors that were not sent taken from `known`.

    They get the dtype of `known`. Raises ValueError for a layer that `known` lacks, a layer that is missing, or a shape that
    differs: the sentence names it.
    """
    if unknown := sorted(factors.keys() ^ known.keys()):
        raise ValueError(f"layer {unknown[0]} is {'unknown' if unknown[0] in factors else 'missing'}")
    return {
        layer: Pair(*(_like(getattr(known[layer], f), sent.get(f), f"{layer}.lora_{f}") for f in Pair._fields))
        for layer, sent in sorted(factors.items())
    }


def complete_dense(sent: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The dense arrays that were sent, which must be those of `known`, all of them; raises ValueError as `complete` does."""
    if unknown := sorted(sent.keys() ^ known.keys()):
        raise ValueError(f"{unknown[0]} is {'unknown' if unknown[0] in sent else 'missing'}")
    return {name: _like(own, sent[name], name) for name, own in known.items()}


def state_of(record: ArrayRecord, scale: float) -> ServerState:
    """The server state that a full broadcast (both factors of every layer) stands for."""
    factors, dense, correction = unpack(record)
    if not factors:
        raise ValueError("initial arrays hold no <layer>.lora_A.weight; PEFT's get_peft_model_state_dict(model) names them so")
    for layer, sent in factors.items():
        if sent.keys() != {"A", "B"}:
            raise ValueError(f"initial arrays lack lora_{'B' if 'A' in sent else 'A'} of {layer}")
    adapters = {layer: Pair(sent["A"], sent["B"]) for layer, sent in sorted(factors.items())}
    return ServerState(adapters, dense, correction, scale)


def digest(arrays: Mapping[str, np.ndarray], text: str = "") -> str:
    """SHA-256 of a text and of the arrays' names, types, shapes and numbers, in the order of their names."""
    found = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        found.update(f"/{name}/{array.dtype.str}/{array.shape}/".encode() + array.tobytes())
    return found.hexdigest()


def to_bytes(content: RecordDict) -> bytes:
    """The content as Flower serialises it, for a file."""
    return bytes(recorddict_to_proto(content).SerializeToString())


def from_bytes(content: bytes) -> RecordDict:
    """The inverse of `to_bytes`."""
    return recorddict_from_proto(ProtoRecordDict.FromString(content))


def first(content: RecordDict, kind: type[Record]) -> Record | None:
    """The first record of a kind, whatever its name; `content.array_records` would make a dictionary of all of them."""
    return next((record for record in content.values() if isinstance(record, kind)), None)


def array_bytes(content: RecordDict) -> int:
    """Bytes of all arrays of a message as they are sent: numpy's serialisation with its 128-byte header an array."""
    return sum(record_bytes(record) for record in content.values() if isinstance(record, ArrayRecord))


def record_bytes(record: ArrayRecord) -> int:
    """Bytes of the arrays of a record, as `array_bytes` counts them."""
    return sum(len(array.data) for array in record.values())


def _to_wire(array: np.ndarray) -> Array:
    """The array as Flower would serialise it: the bytes of np.save, whose header takes longer to make than all the rest."""
    name, header = _npy_header(array.dtype, array.shape)
    return Array(dtype=name, shape=array.shape, stype="numpy.ndarray", data=header + array.tobytes())


@lru_cache(maxsize=4096)
def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return str(dtype), buffer.getvalue()


def _like(own: np.ndarray, sent: np.ndarray | None, name: str) -> np.ndarray:
    """`sent`, or else `own`, in the dtype of `own`: the first client must not choose the precision of all later rounds."""
    if sent is None:
        return own
    if sent.shape != own.shape:
        raise ValueError(f"{name} has shape {sent.shape} instead of {own.shape}")
    with np.errstate(over="ignore"):  # it is infinite then, which whoever reads it looks for
        return sent.astype(own.dtype, copy=False)
