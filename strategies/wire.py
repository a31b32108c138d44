"""What travels between the server and its clients in a round, and what of it has to."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from fedlora import compression, lowrank, messages
from fedlora.lowrank import Adapters, Pair
from fedlora.messages import ServerState, Update
from fedlora.sums import Sum
from strategies.report import RoundReport
from strategies.rollcall import RollCall, answer_of
from strategies.updates import MANY, at_rank, in_scale, mean_of, read_update

Contents = dict[int, dict[str, np.ndarray]]  # client → arrays by name
Shapes = dict[str, tuple[int, ...]]  # of arrays by name


class Ask(Protocol):
    """Sends clients of the round a further message and gives their answers."""

    def __call__(self, action: str, contents: Contents, shapes: Shapes | None = None) -> Contents:
        """Of a message of type train.`action`; where `shapes` are given, other arrays or such that are not finite are none.

        Who gives no answer is named as a drop.
        """


class Wire(FlowerFedAvg):
    """The messages of a strategy: made for each client, read, checked, and counted.

    A subclass says by these what travels. The formulas are in its file.
    """

    trains: ClassVar[str] = "AB"  # what a client updates: "AB", "B", "A", or "R" (r, r) between factors that stay
    personal: ClassVar[str] = ""  # factors, of those, that stay with the client, and its head with them
    down: ClassVar[str] = "AB"  # what has to be sent down to clients that can derive the rest; "R": A by its rotation
    redraws: ClassVar[bool] = False  # every round begins with an A drawn from the seed, and with B zero
    withholds: ClassVar[bool] = False  # clients keep the factors they trained, until `gather` asks for what merge needs of them
    paper: ClassVar[str]  # name and arXiv number
    exact: ClassVar[bool]  # whether the merged product is Σ p_k B_k A_k
    linear: ClassVar[bool] = False  # whether merge needs no more of the updates than their weighted mean
    steady: ClassVar[bool] = True  # whether a merge stays in the coordinates that clients were given
    unequal: ClassVar[str] = "its server step is not made for them"  # unequal ranks: "native", "padded", or why not
    private: ClassVar[str] = "unknown"  # how it suits DP-SGD: strong, good, possible or weak, and after a colon why

    scale: float
    init: str
    ranks: Sequence[int] | None
    derive: bool
    encodes: tuple[str, str, float]  # how arrays are encoded down and up (see fedlora.compression), and the share of top_k
    round_timeout: float  # seconds to wait for answers to further messages
    state: ServerState | None
    initial: Adapters  # the factors that the run began with
    report: RoundReport | None  # of the newest round
    silent: bool  # whether replies to training hold no arrays at all
    streams: bool  # whether replies may be added up as they come
    roll: RollCall  # who is who
    _sent: list[Message]
    _job: ConfigRecord  # of the newest round
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
        if self.withholds:
            return ""
        return "".join(factor for factor in self.trained(round) if factor in "AB" and factor not in self.personal)

    def sent_down(self, state: ServerState, rank: int | None = None) -> dict[str, np.ndarray]:
        """The arrays that a client is sent, by name: of the state at its rank, all of it or what it cannot derive, encoded."""
        state = state if rank is None else at_rank(state, rank)
        if not self.derive:
            return messages.named(*whole(state))
        arrays = messages.named(state.adapters, state.dense, self.down.replace("R", ""), state.base_correction)
        arrays = compression.encode(arrays, self.encodes[0], 1.0)
        if "R" in self.down and "R" not in self.trains:  # small, and a rotation only as long as it is exact
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

    def _derivable(self, before: ServerState, state: ServerState) -> ServerState:
        """The state in the very numbers that clients derive: A from its rotation, to the last bit."""
        if not self.derive or "R" not in self.down or "R" in self.trains:
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
        """
        encodes, share = self.encodes[1:]
        return {
            messages.ROUND: round,
            messages.TRAINS: self.trained(round),
            messages.SENDS: self.sends(round),
            messages.PERSONAL: self.personal,
            messages.INIT: self.init,
            messages.DRAWN: (round if evaluating else round - 1) if self.redraws else 0,
            messages.ENCODES: encodes,
            messages.SHARE: share,
            messages.CHANGES: self._changes,
            messages.KEEPS: self.withholds or self.silent,
            messages.SILENT: self.silent,
        }

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
            sent = arrays if plain else messages.record(self.sent_down(self.state, rank))
            content = RecordDict({self.arrayrecord_key: sent, self.configrecord_key: job})
            made += self._construct_messages(content, [node for node in nodes if self._rank(node) == rank], kind)
        order = {node: place for place, node in enumerate(nodes)}
        return sorted(made, key=lambda message: order[message.metadata.dst_node_id])

    def _ask(self, action: str, contents: Contents, shapes: Shapes | None = None) -> Contents:
        """See `Ask`."""
        assert self.report is not None and self._grid is not None
        nodes = {client: node for node, client in self.roll.client.items()}
        # What is asked of several clients alike is one content, as a broadcast is.
        asks = {
            id(arrays): RecordDict({self.arrayrecord_key: messages.record(arrays), self.configrecord_key: self._job})
            for arrays in contents.values()
        }
        asked = [
            message
            for client, arrays in contents.items()
            for message in self._construct_messages(asks[id(arrays)], [nodes[client]], f"{MessageType.TRAIN}.{action}")
        ]
        self.report.bytes_down += sum(messages.array_bytes(message.content) for message in asked)
        answers: Contents = {}
        replies = self._grid.send_and_receive(asked, timeout=self.round_timeout)
        for client, content in self._contents(replies, asked, answers):
            record = messages.first(content, ArrayRecord)
            if record is not None:
                arrays = messages.arrays_of(record)
                if wrong := [name for name, shape in (shapes or {}).items() if not fits(arrays.get(name), shape)]:
                    what = f"{wrong[0]} in its answer to {action}"
                    self.report.drops[client] = f"{what} is missing, not finite or of another shape"
                else:
                    answers[client] = arrays
        for client in contents:
            if client not in answers:
                self.report.drops.setdefault(client, f"no answer to {action} in time")
        return dict(sorted(answers.items()))

    def _contents(
        self, replies: Iterable[Message], sent: list[Message], taken: Container[int]
    ) -> Iterator[tuple[int, RecordDict]]:
        """Client and content of the replies to what was `sent`, as they come, their bytes counted; errors are named as drops.

        A client that is `taken` by then has given its reply. Where a node was killed the SuperLink answers for it, so the
        source of a reply says whose it is only on grids that give messages no ids.
        """
        assert self.report is not None
        author = {message.metadata.dst_node_id: self.roll.client[message.metadata.dst_node_id] for message in sent}
        asked, by_message = set(author.values()), None
        for reply in replies:
            if by_message is None:  # a grid gives messages their ids when they leave, which may be as late as now
                ids = ((message.metadata.message_id, message.metadata.dst_node_id) for message in sent)
                by_message = {number: author[node] for number, node in ids if number}
            source = reply.metadata
            client = by_message.get(source.reply_to_message_id) if by_message else self.roll.client.get(source.src_node_id)
            if client is None or client not in asked or client in taken:
                continue  # not a reply to these
            if reply.has_error():
                self.report.drops[client] = error_of(reply)
                continue
            if self.roll.named and (says := answer_of(reply)) and says[messages.CLIENT] != client:
                self.report.drops[client] = f"it says that it is client {says[messages.CLIENT]} now; start the run again"
                continue
            if messages.SUM in reply.content:  # its arrays have as many bytes as those of anybody in this round
                self.report.bytes_up += self._bytes_alone
            else:
                self.report.bytes_up += messages.array_bytes(reply.content)
            yield client, reply.content

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

    def _receive(self, replies: Iterable[Message], server_round: int) -> tuple[list[Update], list[Update]]:
        """The usable updates in order of client, and what there is to merge; other replies are named in the report.

        What there is to merge are the same updates; or, of a large cohort where nothing but the mean is needed, that mean
        as one update, and of each client only what it measured.
        """
        assert self.state is not None and self.report is not None
        ranks = {self.roll.client[m.metadata.dst_node_id]: self._rank(m.metadata.dst_node_id) for m in self._sent}
        at = {rank: at_rank(self.state, rank) for rank in set(ranks.values())}
        sends = self.sends(server_round)
        total = Sum() if self.streams and len(ranks) >= MANY else None
        updates: dict[int, Update] = {}
        for client, content in self._contents(replies, self._sent, updates):
            given, added = at[ranks[client]], messages.SUM in content
            try:
                expected = None if self.silent or added else sends
                update = read_update(client, content, given, self.weighted_by_key, expected, self._changes)
            except ValueError as reason:
                self.report.drops[client] = str(reason)
                continue
            update = in_scale(update, given.scale, self.state, self.unequal == "padded")
            if total is not None:
                if added:
                    total.join(content.array_records[messages.SUM], update.examples)
                else:
                    total.add(messages.named(update.adapters, update.dense, sends), update.examples)
                update = replace(update, adapters={}, dense={})
            updates[client] = update
        for client in self.report.cohort:
            if client not in updates:
                self.report.drops.setdefault(client, "no reply in time")
        self.report.drops = dict(sorted(self.report.drops.items()))  # replies come in any order
        self._sent = []
        in_order = [updates[client] for client in sorted(updates)]
        return in_order, in_order if total is None else [mean_of(total, self.state)] if in_order else []


def whole(state: ServerState) -> tuple[Adapters, dict[str, np.ndarray], str, Adapters]:
    """What `messages.pack` takes to send all of a state."""
    return state.adapters, state.dense, "AB", state.base_correction


def fits(array: np.ndarray | None, shape: tuple[int, ...]) -> bool:
    """Whether there is an array, of that shape, with nothing but numbers in it."""
    return array is not None and array.shape == shape and bool(np.isfinite(array).all())


def error_of(reply: Message) -> str:
    """The last line of what a failed client says."""
    return ((reply.error.reason or "").strip() or "error").splitlines()[-1]
