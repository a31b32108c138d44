"""What clients send back in a round: read, checked and counted. Whose cannot be taken is named, and the round goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict

from fedlora import untrusted
from fedlora.arrays import messages
from fedlora.arrays.messages import ServerState, Update
from fedlora.arrays.sums import Sum
from fedlora.check import RunError
from fedlora.server import foreign
from fedlora.server.replies import authored, client_of, error_of, read_answer
from fedlora.server.updates import MANY, at_rank, distance, in_scale, mean_of, most_bytes, read_update, size_of, too_long
from fedlora.server.wire import Contents, Shapes, Unequal, Wire, whole
from fedlora.untrusted import Malformed


class Inbox(Wire):
    """The receiving half of a strategy."""

    max_update: float  # the longest update, in median ones
    train_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord]
    _taken: dict[int, RecordDict]  # what clients of the round sent, where somebody asks for what they measured
    release: Callable[[ServerState, list[Update], int, str], list[Update]] | None

    def _ask(self, action: str, contents: Contents, shapes: Shapes | None = None) -> Contents:
        """See `Ask`."""
        assert self.state is not None and self.report is not None and self._grid is not None
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
        room = most_bytes({name: array.shape for name, array in messages.named(*whole(self.state)).items()} | (shapes or {}))
        dtype = next(iter(self.state.adapters.values())).B.dtype
        for client, content in self._contents(replies, asked, self.report.drops):
            try:
                answers[client] = read_answer(content, action, shapes or {}, room, dtype)
            except Malformed as reason:
                self._drop(client, reason)
        if shapes:  # numbers, that is, and not secrets
            lengths = {client: messages.norm(arrays) for client, arrays in answers.items()}
            for client, why in self._too_long(lengths).items():
                self._drop(client, why)
                del answers[client]
        for client in contents:
            if client not in answers:
                self.report.drops.setdefault(client, f"no answer to {action} in time")
        return dict(sorted(answers.items()))

    def _contents(
        self, replies: Iterable[Message], sent: list[Message], drops: dict[int, str]
    ) -> Iterator[tuple[int, RecordDict]]:
        """Client and content of the replies to what was `sent`, as they come, their bytes counted; `drops` names errors."""
        assert self.report is not None
        for node, reply in authored(replies, sent):
            client = self.roll.client[node]
            try:
                if reply.has_error() or not reply.has_content():
                    raise Malformed(error_of(reply) if reply.has_error() else "its reply is empty")
                says = client_of(reply.content) if self.roll.named else None
                if says not in (None, client):
                    raise Malformed(f"it says that it is client {says} now; start the run again")
            except Malformed as reason:
                drops[client] = untrusted.text(str(reason))
                continue
            if self._is_sum(reply.content):  # its arrays have as many bytes as those of anybody in this round
                self.report.bytes_up += self._bytes_alone
            else:
                self.report.bytes_up += messages.array_bytes(reply.content)
            yield client, reply.content

    def _drop(self, client: int, why: object) -> None:
        """Leave a client out of the round; what it sent may be in the sentence."""
        assert self.report is not None
        self.report.drops[client] = untrusted.text(str(why))

    def _is_sum(self, content: RecordDict) -> bool:
        """Whether a reply was added to others on its way, as our own workers do; from a device it would be anybody's word."""
        return self._own_clients and isinstance(content.get(messages.SUM), ArrayRecord)

    @property
    def _own_clients(self) -> bool:
        """Whether clients run in this program's own processes, so that what they send is what our code makes."""
        return bool(getattr(self._grid, "own_clients", False))

    def _too_long(self, lengths: dict[int, float]) -> dict[int, str]:
        """Who is to be left out for the length of what it sent, and why; nobody where every length is clipped anyway."""
        assert self.state is not None
        if self.release is not None:  # whom it left out would depend on the others, which no clip then bounds
            return {}
        return too_long(lengths, size_of(self.state), self.max_update)

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
        # Which updates are too long is known when all are there. Of a large cohort of our own clients, whose code bounds them,
        # none is held so long; others' are kept until then, and added up after.
        at_once = total is not None and self._own_clients
        updates, lengths, self._taken = dict[int, Update](), dict[int, float](), {}
        keeps = self.train_metrics_aggr_fn is not foreign.no_metrics

        def add(update: Update) -> Update:
            if total is None:
                return update
            total.add(messages.named(update.adapters, update.dense, sends), update.examples)
            return replace(update, adapters={}, dense={})

        for client, content in self._contents(replies, self._sent, self.report.drops):
            given, added = at[ranks[client]], self._is_sum(content)
            try:
                expected = None if self.silent or added else sends
                trains = self.trained(server_round)
                update = read_update(client, content, given, self.weighted_by_key, expected, self._changes, trains)
                self._check_claim(update)
            except ValueError as reason:
                self._drop(client, reason)
                continue
            if added and total is not None:
                self._join(total, content, update.examples, sends)
                update = replace(update, adapters={}, dense={})
            else:
                lengths[client] = 0.0 if at_once else distance(update, given)
                update = in_scale(update, given.scale, self.state, self.unequal is Unequal.PADDED)
            updates[client] = add(update) if at_once and not added else update
            if keeps:
                self._taken[client] = content
        for client, why in self._too_long(lengths).items():
            self._drop(client, why)
            del updates[client]
        if not at_once:
            updates = {client: add(updates[client]) for client in sorted(updates)}
        for client in self.report.cohort:
            if client not in updates:
                self.report.drops.setdefault(client, "no reply in time")
        self.report.drops = dict(sorted(self.report.drops.items()))  # replies come in any order
        self._sent = []
        in_order = [updates[client] for client in sorted(updates)]
        return in_order, in_order if total is None else [mean_of(total, self.state)] if in_order else []

    def _check_claim(self, update: Update) -> None:
        """Raises Malformed where a client claims more examples than it told in the roll call, which σ and plans rest on."""
        told = self.roll.examples.get(update.client)
        if told is not None and self.weighted_by_key == messages.EXAMPLES and update.examples > told:
            raise Malformed(f"it claims {update.examples} examples and told {told} in the roll call; start the run again")

    def _join(self, total: Sum, content: RecordDict, examples: float, sends: str) -> None:
        """Add a sum of our own workers. Raises RunError where it is none: the clients in it cannot be told apart any more."""
        assert self.state is not None
        shapes = {name: array.shape for name, array in messages.named(self.state.adapters, self.state.dense, sends).items()}
        try:
            total.join(content.array_records[messages.SUM], examples, shapes)
        except Malformed as error:
            raise RunError(f"a worker's sum is damaged: {error}") from error
