"""What a client starts from in a round: what it was sent, completed by what it knows itself.

A:  sent, or else drawn from the seed as the server drew it; where R came and is not trained, R · A
B:  the client's own (a personal strategy), or else sent, or else as it began: zero, or orthonormal where R is trained
head:  the client's own, or else sent, or else as the model was loaded
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.arrays import compression, messages
from fedlora.arrays.lowrank import Adapters, Pair

if TYPE_CHECKING:
    from fedlora.arrays.messages import Arrays
    from fedlora.compute.workbench import Workbench

PERSONAL, TRAINED, LEFT, LEFT_AT = "personal", "trained", "left", "left-at"  # records of a client's own state
BEGUN = "begun"  # array of what a client has trained for a secure sum: the digest of what it started from
LASTING = (PERSONAL, LEFT, LEFT_AT)  # those that a later round begins with


@dataclass(frozen=True)
class Start:
    """A client's whole model, apart from the frozen base."""

    adapters: Adapters
    dense: dict[str, np.ndarray]
    correction: Adapters
    scale: float  # alpha / rank, of this client's rank


@dataclass(frozen=True)
class Trained:
    """What a client has come to."""

    adapters: Adapters
    dense: dict[str, np.ndarray]
    metrics: dict[str, float]


def read(record: ArrayRecord) -> Arrays:
    """The arrays of a broadcast, decoded."""
    return messages.sort(compression.decode(messages.arrays_of(record)))


def begin(bench: Workbench, job: ConfigRecord, sent: Arrays, state: RecordDict) -> Start:
    """The start of a client whose own state is `state`, from what the job and the arrays sent say. Nothing is written to."""
    trains = str(job[messages.TRAINS])
    init, drawn = str(job.get(messages.INIT, "kaiming")), int(job.get(messages.DRAWN, 0))  # type: ignore[arg-type]
    keeps = bool(job.get(messages.PERSONAL)) and PERSONAL in state.array_records
    own = messages.unpack(state.array_records[PERSONAL]) if keeps else None
    rank = int(job.get(messages.RANK, bench.model.rank))  # type: ignore[arg-type]
    adapters: Adapters = {}
    for layer in bench.model.layers:
        given = sent.factors.get(layer, {}) | (own.factors.get(layer, {}) if own else {})
        if len(given) < 2:
            known = bench.model.initial(init, bench.config.seed, drawn, "R" in trains)[layer]
            given = {"A": known.A[:rank], "B": known.B[:, :rank]} | given
        adapters[layer] = Pair(**given)
    dense = bench.model.initial_head | sent.dense | (own.dense if own else {})
    if "R" not in trains:
        adapters, dense = messages.fold(adapters, dense)
    return Start(adapters, dense, sent.correction, bench.config.adapter.alpha / rank)


def keep(state: RecordDict, job: ConfigRecord, begun: Start, own: Trained, examples: int) -> None:
    """What stays with the client of what it has trained goes into its own state.

    That is all of it; or, where only sums are to be learnt, what it would have sent, as changes, with the number of examples
    and a digest of the start.
    """
    if factors := str(job.get(messages.PERSONAL, "")):
        state[PERSONAL] = messages.pack(own.adapters, own.dense, factors)
    if job.get(messages.SILENT):
        digest = messages.digest(messages.named(begun.adapters, begun.dense, "AB", begun.correction))
        about = {messages.EXAMPLES: np.array([examples]), BEGUN: np.frombuffer(bytes.fromhex(digest), np.uint8)}
        state[TRAINED] = messages.record(_changed(job, begun, own) | about)
    elif job.get(messages.KEEPS):
        state[TRAINED] = messages.pack(own.adapters, own.dense)


def sends(state: RecordDict, job: ConfigRecord, begun: Start, own: Trained) -> dict[str, np.ndarray]:
    """The arrays that go to the server, by name and encoded: none where the server is to learn sums only.

    What encoding loses of the changes stays in the client's own state, and is sent with the next ones (error feedback).
    """
    if job.get(messages.SILENT):
        return {}
    if not job.get(messages.CHANGES):
        return _sent(job, own)
    changed = _changed(job, begun, own)
    method, share = str(job[messages.ENCODES]), float(job[messages.SHARE])  # type: ignore[arg-type]
    if method == "none":  # it is the broadcast that is encoded
        return changed
    # Beside an A drawn anew it would mean nothing.
    left = {} if job[messages.DRAWN] else _left(state, begun, str(job.get(messages.SENDS, "")))
    encoded, left = compression.encode_with_feedback(changed, left, method, share)
    if left:
        state[LEFT], state[LEFT_AT] = messages.record(left), messages.pack(begun.adapters, {}, "A")
    return encoded


def _left(state: RecordDict, begun: Start, factors: str) -> dict[str, np.ndarray]:
    """What the last rounds' encoding has lost; B's beside the A of this round, unless A moves by itself."""
    if LEFT not in state.array_records:
        return {}
    left, at = (messages.arrays_of(state.array_records[key]) for key in (LEFT, LEFT_AT))
    if factors != "AB":
        for layer, pair in begun.adapters.items():
            if (name := f"{layer}.lora_B.weight") in left:
                left[name] = compression.carried(left[name], at[f"{layer}.lora_A.weight"], pair.A)
    return left


def _sent(job: ConfigRecord, own: Trained) -> dict[str, np.ndarray]:
    """What goes to the server, by name."""
    factors = str(job.get(messages.SENDS, ""))
    return messages.named(own.adapters, {} if job.get(messages.PERSONAL) else own.dense, factors)


def _changed(job: ConfigRecord, begun: Start, own: Trained) -> dict[str, np.ndarray]:
    """How far the client has moved it."""
    before = messages.named(begun.adapters, begun.dense)
    return {name: array - before[name] for name, array in _sent(job, own).items()}
