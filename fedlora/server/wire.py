"""What travels between the server and its clients in a round, and what of it has to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, ClassVar, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedlora.arrays import compression, lowrank, messages
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.arrays.messages import ServerState
from fedlora.server.report import RoundReport
from fedlora.server.rollcall import RollCall
from fedlora.server.updates import MANY, at_rank

Contents = dict[int, dict[str, np.ndarray]]  # client → arrays by name
Shapes = dict[str, tuple[int, ...]]  # of arrays by name


class Ask(Protocol):
    """Sends clients of the round a further message and gives their answers."""

    def __call__(self, action: str, contents: Contents, shapes: Shapes | None = None) -> Contents:
        """Of a message of type train.`action`; where `shapes` are given, other arrays or such that are not finite are none.

        Who gives no answer is named as a drop.
        """


class Unequal(Enum):
    """What a strategy does with clients whose adapters have different ranks."""

    NATIVE = "native"  # the paper's own way
    PADDED = "padded"  # factors are cut to a client's rank on the way down and filled up with zeros on the way up
    NO = "no"  # refuses


class Fit(Enum):
    """How well a strategy suits DP-SGD: how little of the noise reaches the model."""

    STRONG = "strong"
    GOOD = "good"
    POSSIBLE = "possible"
    WEAK = "weak"
    UNKNOWN = "unknown"


class Wire(FlowerFedAvg):
    """The messages of a strategy, made for each client; `fedlora.server.inbox` reads what comes back.

    A subclass says by these what travels. The formulas are in its file.
    """

    trains: ClassVar[str] = "AB"  # what a client updates: "AB", "B", "A", or "R" (r, r) between factors that stay
    personal: ClassVar[str] = ""  # factors, of those, that stay with the client, and its head with them
    downlink: ClassVar[str] = "AB"  # factors sent to clients; with R the client rebuilds A = R A_0
    resamples_A: ClassVar[bool] = False  # every round begins with an A drawn from the seed, and with B zero
    two_phase: ClassVar[bool] = False  # clients keep the factors they trained, until `gather` asks for what merge needs of them
    corrects: ClassVar[bool] = False  # whether merge moves something into the base, which clients are sent as a base correction
    paper: ClassVar[str] = ""  # name and arXiv number, where there is one
    exact: ClassVar[bool] = False  # whether the merged product is Σ p_k B_k A_k
    linear: ClassVar[bool] = False  # whether merge needs no more of the updates than their weighted mean
    keeps_basis: ClassVar[bool] = True  # whether a merge stays in the coordinates that clients were given
    unequal: ClassVar[Unequal] = Unequal.NO  # what is done with clients of unequal rank
    one_rank: ClassVar[str] = "its server step is not made for unequal ones"  # why clients must have one rank, where they must
    private: ClassVar[Fit] = Fit.UNKNOWN  # how well it suits DP-SGD
    private_because: ClassVar[str] = ""  # and why

    scale: float
    init: str
    ranks: Sequence[int] | None
    derive: bool
    beyond_peft: bool
    encodes: tuple[
        str, str, float
    ]  # how arrays are encoded down and up (see fedlora.arrays.compression), and the share of top_k
    round_timeout: float  # seconds to wait for answers to further messages
    state: ServerState | None
    initial: Adapters  # the factors that the run began with
    report: RoundReport | None  # of the newest round
    silent: bool  # whether replies to training hold no arrays at all
    streams: bool  # whether replies may be added up as they come
    roll: RollCall  # who is who
    _sent: list[Message]
    _job: ConfigRecord  # of the newest round
    _order: tuple[str, ...]  # names of the arrays that the run was started with, as they came
    _bytes_alone: int  # that a client of it sends, where replies may be added up
    _grid: Grid | None

    @property
    def name(self) -> str:
        """The name of its file."""
        return type(self).__module__.rpartition(".")[2]

    def trained(self, round: int) -> str:
        """What clients update in this round."""
        return self.trains

    def sends(self, round: int) -> str:
        """The factors that clients send in this round; R goes by its own name, among the dense arrays."""
        if self.two_phase:
            return ""
        return "".join(factor for factor in self.trained(round) if factor in "AB" and factor not in self.personal)

    def sent_down(self, state: ServerState, rank: int | None = None) -> dict[str, np.ndarray]:
        """The arrays that a client is sent, by name: of the state at its rank, all of it or what it cannot derive, encoded."""
        state = state if rank is None else at_rank(state, rank)
        if not self.derive:
            return messages.named(*whole(state))
        arrays = messages.named(state.adapters, state.dense, self.downlink.replace("R", ""), state.base_correction)
        arrays = compression.encode(arrays, self.encodes[0], 1.0)
        if "R" in self.downlink and "R" not in self.trains:  # small, and a rotation only as long as it is exact
            arrays |= self._rotations(state)
        return arrays

    def sent_up(self, state: ServerState, round: int, rank: int | None = None) -> dict[str, np.ndarray]:
        """Arrays of the names and shapes that a client sends in a round, whatever numbers they will hold."""
        state = state if rank is None else at_rank(state, rank)
        arrays = messages.named(state.adapters, {} if self.personal else state.dense, self.sends(round))
        return compression.encode(arrays, self.encodes[1], self.encodes[2])

    def sent_further(self, state: ServerState) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Arrays of the names and shapes that further messages of a round bring, up and down; none as a rule."""
        return {}, {}

    def moves(self, ranks: Sequence[int]) -> int | None:
        """The rank that merging updates of these ranks adds to the base correction, until it is full; None: there is none."""
        return None

    def _derivable(self, before: ServerState, state: ServerState) -> ServerState:
        """The state in the very numbers that clients derive: A from its rotation, to the last bit."""
        if not self.derive or "R" not in self.downlink or "R" in self.trains:
            return state
        turned = self._rotations(before)
        for layer, pair in state.adapters.items():
            if not np.array_equal(pair.A, before.adapters[layer].A):
                turned[messages.rotation(layer)] = lowrank.coordinates(pair.A, self.initial[layer].A)
        pairs = {layer: Pair(self.initial[layer].A, pair.B) for layer, pair in state.adapters.items()}
        return replace(state, adapters=messages.fold(pairs, turned)[0], extra=state.extra | turned)

    def _rotations(self, state: ServerState) -> dict[str, np.ndarray]:
        """R of every layer by its name on the wire, with A = R · the A that the run began with.

        They are remembered, since those found again from A, which is rounded, would give another A in its last bits.
        """
        names = {layer: messages.rotation(layer) for layer in state.adapters}
        return {
            name: state.extra.get(name, np.eye(state.adapters[layer].rank, dtype=np.float32)) for layer, name in names.items()
        }

    def job(self, round: int, evaluating: bool = False) -> dict[str, Any]:
        """What a round's messages say of what to train, keep and send, by the keys of `messages`.

        It follows from the experiment alone, so that a device derives the same and refuses a message that says another thing.
        A text that would be empty is left out: Flower's mods cannot count its bytes.
        """
        encodes, share = self.encodes[1:]
        said = {
            messages.ROUND: round,
            messages.TRAINS: self.trained(round),
            messages.SENDS: self.sends(round),
            messages.PERSONAL: self.personal,
            messages.INIT: self.init,
            messages.DRAWN: (round if evaluating else round - 1) if self.resamples_A else 0,
            messages.ENCODES: encodes,
            messages.SHARE: share,
            messages.CHANGES: self._changes,
            messages.KEEPS: self.two_phase or self.silent,
            messages.SILENT: self.silent,
        }
        return {name: value for name, value in said.items() if value != ""}

    def _messages(
        self, arrays: ArrayRecord, config: ConfigRecord, server_round: int, nodes: list[int], kind: str
    ) -> list[Message]:
        """A message for each node. Nodes of one rank share their content."""
        assert self.state is not None
        evaluating = kind == MessageType.EVALUATE
        config.update(self.job(server_round, evaluating))
        config[messages.ADDS] = adds = not evaluating and len(nodes) >= MANY and self._adds
        self._job = config
        self._bytes_alone = messages.record_bytes(messages.record(self.sent_up(self.state, server_round))) if adds else 0
        made: list[Message] = []
        for rank in sorted({self._rank(node) for node in nodes}):
            job = ConfigRecord(dict(config) | {messages.RANK: rank})
            plain = not self.derive and self.ranks is None and not self.personal
            sent = arrays if plain else self._record(self.sent_down(self.state, rank))
            content = RecordDict({self.arrayrecord_key: sent, self.configrecord_key: job})
            made += self._construct_messages(content, [node for node in nodes if self._rank(node) == rank], kind)
        order = {node: place for place, node in enumerate(nodes)}
        return sorted(made, key=lambda message: order[message.metadata.dst_node_id])

    def _record(self, arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
        """The arrays in the order of those that the run was started with; others, such as a base correction, come last."""
        place = {name: number for number, name in enumerate(self._order)}
        names = sorted(arrays, key=lambda name: place.get(name, len(place)))
        return messages.record({name: arrays[name] for name in names})

    def _adopt(self, arrays: ArrayRecord) -> ServerState:
        """The arrays that Flower's loop carries as the state; a wrapper may have changed what the last merge left."""
        sent = messages.state_of(arrays, self.scale)
        dense = {} if self.personal else sent.dense
        return replace(self.state or sent, adapters=sent.adapters, dense=dense, base_correction=sent.base_correction)

    @property
    def _adds(self) -> bool:
        """Whether updates may be added up on their way: our clients' own, where all send the same arrays as they are."""
        alike = self.ranks is None and not self._changes and self.weighted_by_key == messages.EXAMPLES
        return self.derive and self.streams and alike

    @property
    def _changes(self) -> bool:
        """Whether clients send what they changed: where anything is encoded, so that nothing of the state itself is lost."""
        return self.encodes[:2] != ("none", "none")

    def _rank(self, node: int) -> int:
        assert self.state is not None
        own = next(iter(self.state.adapters.values())).rank
        return own if self.ranks is None else self.ranks[self.roll.client[node]]


def whole(state: ServerState) -> tuple[Adapters, dict[str, np.ndarray], str, Adapters]:
    """What `messages.pack` takes to send all of a state."""
    return state.adapters, state.dense, "AB", state.base_correction
