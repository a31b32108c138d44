"""What a client starts from in a round: what it was sent, completed by what it knows itself.

A:  sent, or else drawn from the seed as the server drew it; where R came and is not trained, R · A
B:  sent, or else the client's own (a personal strategy), or else as it began: zero, or orthonormal where R is trained
head:  sent, or else the client's own, or else as the model was loaded
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora import messages
from fedlora.lowrank import Adapters, Pair

if TYPE_CHECKING:
    from fedlora.messages import Arrays
    from fedlora.workbench import Workbench

PERSONAL, TRAINED = "personal", "trained"  # records of a client's own state


@dataclass(frozen=True)
class Start:
    """A client's whole model, apart from the frozen base."""

    adapters: Adapters
    dense: dict[str, np.ndarray]
    correction: Adapters
    scale: float  # alpha / rank, of this client's rank


def begin(bench: Workbench, job: ConfigRecord, sent: Arrays, state: RecordDict) -> Start:
    """The start of a client whose own state is `state`, from what the job and the arrays sent say. Nothing is written to."""
    trains = str(job[messages.TRAINS])
    init, drawn = str(job.get(messages.INIT, "kaiming")), int(job.get(messages.DRAWN, 0))  # type: ignore[arg-type]
    own = messages.unpack(state.array_records[PERSONAL]) if PERSONAL in state.array_records else None
    rank = int(job.get(messages.RANK, bench.model.rank))  # type: ignore[arg-type]
    adapters: Adapters = {}
    for layer in bench.model.layers:
        given = (own.factors.get(layer, {}) if own else {}) | sent.factors.get(layer, {})
        if len(given) < 2:
            known = bench.model.initial(init, bench.config.seed, drawn, "R" in trains)[layer]
            given = {"A": known.A[:rank], "B": known.B[:, :rank]} | given
        adapters[layer] = Pair(**given)
    dense = bench.model.initial_head | (own.dense if own else {}) | sent.dense
    if "R" not in trains:
        adapters, dense = messages.fold(adapters, dense)
    return Start(adapters, dense, sent.correction, bench.config.adapter.alpha / rank)


def keep(state: RecordDict, job: ConfigRecord, adapters: Adapters, dense: dict[str, np.ndarray]) -> None:
    """What stays with the client of what it has trained goes into its own state."""
    if factors := str(job.get(messages.PERSONAL, "")):
        state[PERSONAL] = messages.pack(adapters, dense, factors)
    if job.get(messages.KEEPS):
        state[TRAINED] = messages.pack(adapters, dense)


def sends(job: ConfigRecord, adapters: Adapters, dense: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that go to the server, by name: none where the client keeps them until it is asked."""
    if job.get(messages.KEEPS):
        return {}
    factors = str(job.get(messages.SENDS, job[messages.TRAINS]))
    return messages.named(adapters, {} if job.get(messages.PERSONAL) else dense, factors)


def trained(state: RecordDict) -> ArrayRecord:
    """What the client has kept of its training; raises RuntimeError where there is nothing."""
    if TRAINED not in state.array_records:
        raise RuntimeError("this client keeps nothing that it has trained; it is asked before it was sent a round")
    record: ArrayRecord = state.array_records[TRAINED]
    return record
