"""What a client answers when it is asked, after its training, for something made of what it keeps.

    sketch, project                     products of its factors with public matrices (FedASK; `fedlora.arrays.sketch`)
    advertise, share, mask, unmask      its part in a sum that hides its own term (`fedlora.secure`)

Each is a function of the client's own state (changed), the job that the round began with, and the arrays that ask.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from clients.start import BEGUN, TRAINED
from fedlora.arrays import messages, sketch
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.arrays.messages import EXAMPLES
from fedlora.secure import ACTIONS, LEAST, Participant
from fedlora.secure.forms import form

Arrays = dict[str, np.ndarray]
SECURE = "secure"  # record of a client's own state: its part in the secure sum


def answer(action: str, client: int, state: RecordDict, job: ConfigRecord, content: Arrays) -> Arrays:
    """The answer to one of `ACTIONS_KNOWN`. Raises RuntimeError where the client keeps nothing, ValueError by the protocol."""
    if TRAINED not in state.array_records:
        raise RuntimeError("this client keeps nothing that it has trained; it is asked before it was sent a round")
    if action in ACTIONS:
        return _secure(action, client, state, job, content)
    return PRODUCTS[action](state, job, content)


def _sketch(state: RecordDict, job: ConfigRecord, content: Arrays) -> Arrays:
    seed = json.loads(str(job[messages.EXPERIMENT]))["seed"]
    columns = int(form(content, sketch.COLUMNS, np.int64, (1,))[0])
    if columns < 1:
        raise ValueError("a sketch was asked for without columns")
    return sketch.sketch(_adapters(state), columns, seed, int(job[messages.ROUND]))  # type: ignore[arg-type]


def _project(state: RecordDict, job: ConfigRecord, content: Arrays) -> Arrays:
    adapters = _adapters(state)
    bases = {f"{layer}.basis": pair.B for layer, pair in adapters.items()}
    projected = sketch.project(adapters, {name: form(content, name, B.dtype.type, (len(B), None)) for name, B in bases.items()})
    del state[TRAINED]
    return projected


PRODUCTS: dict[str, Callable[[RecordDict, ConfigRecord, Arrays], Arrays]] = {"sketch": _sketch, "project": _project}
ACTIONS_KNOWN = (*PRODUCTS, *ACTIONS)


def _secure(action: str, client: int, state: RecordDict, job: ConfigRecord, content: Arrays) -> Arrays:
    if action == ACTIONS[0]:
        privacy = json.loads(str(job[messages.EXPERIMENT])).get("privacy", {}).get("name", "none")
        participant = Participant.join(client, least=LEAST[privacy])
    elif SECURE in state.array_records:
        participant = Participant(messages.arrays_of(state.array_records[SECURE]))
    else:
        raise RuntimeError(f"a secure sum was asked to {action} out of turn")
    if action == "mask":
        changes = messages.arrays_of(state.array_records[TRAINED])
        examples = int(changes.pop(EXAMPLES)[0])
        changes.pop(BEGUN, None)
        vector = np.concatenate([changes[name].ravel() for name in sorted(changes)])  # the order of `messages.named`
        answered = participant.mask(content, vector, examples)
    else:
        answered = getattr(participant, action)(content)
    state[SECURE] = messages.record(participant.state)
    if action == ACTIONS[-1]:
        del state[SECURE], state[TRAINED]
    return answered


def _adapters(state: RecordDict) -> Adapters:
    factors, _, _ = messages.unpack(state.array_records[TRAINED])
    return {layer: Pair(**both) for layer, both in factors.items()}
