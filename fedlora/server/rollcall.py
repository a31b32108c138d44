"""Which node is which client. Node ids are random on some grids, so each new node is asked once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora import untrusted
from fedlora.arrays import messages
from fedlora.check import RunError
from fedlora.server.replies import authored, client_of, examples_of
from fedlora.untrusted import Malformed

MOST = 10**7  # examples that a client may claim, since the server keeps a list of them
CURE = "give each device a number of its own (--client)"


@dataclass
class RollCall:
    """Client by node id, of every node that was ever online.

    A number belongs to the first node that says it, for the whole run, online or not; another node that says it takes no
    part. Of several that say it in one roll call it is the one of the smallest id. As long as no node answers (a ClientApp
    without a query function) new ones are numbered in the order of their ids; where only some do, the silent ones stay out and
    are asked again in the next round. Unless it `asks`, none is asked: a ClientApp without a query function would raise.
    """

    patience: float  # seconds to wait for nodes and for their answers
    clients: int | None = None  # how many there are; None: as many as come
    say: Callable[[str], object] = logging.getLogger("flwr").warning  # is given a sentence for a node that takes no part
    client: dict[int, int] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)  # by client, of those that say how many they have
    refused: dict[int, str] = field(default_factory=dict)  # nodes that take no part, and why
    named: bool = False  # whether any node has said which client it is
    asks: bool = True  # whether clients are known to have a query function that says who they are

    def nodes(self, grid: Grid, needed: int) -> dict[int, int]:
        """Client → node id of those that are online. Raises RunError where fewer than `needed` come online."""
        deadline = time.monotonic() + self.patience
        while len(nodes := sorted(set(grid.get_node_ids()) - self.refused.keys())) < needed or self.meet(grid, nodes):
            if time.monotonic() > deadline and len(nodes) < needed:
                raise RunError(f"{len(nodes)} of {needed} nodes came online in {self.patience:g} s")
            time.sleep(0.1)
        return {self.client[node]: node for node in nodes if node in self.client}

    def meet(self, grid: Grid, nodes: list[int], timeout: float | None = None) -> bool:
        """Ask those of the nodes who they are that have no number; whether any of them takes no part."""
        new = [node for node in sorted(nodes) if node not in self.client]
        asked = [Message(RecordDict(), node, MessageType.QUERY) for node in new] if self.asks else []
        replies = grid.send_and_receive(asked, timeout=timeout or self.patience) if asked else ()
        said = dict(self._answers(replies, asked))
        self.named |= bool(said)
        if not self.named:
            unnamed = (node for node in new if node not in self.refused)
            self.client |= {node: number for number, node in enumerate(unnamed, len(self.client))}
        holders = {client: node for node, client in self.client.items()}
        for node, (client, examples) in sorted(said.items()):
            says = f"it says that it is client {client}"
            if self.clients is not None and client >= self.clients:
                self._refuse(node, f"{says}, and there are clients={self.clients}, counted from 0; {CURE}")
            elif client in holders:
                self._refuse(node, f"{says}, which is node {holders[client]}; {CURE}")
            else:
                self.refused.pop(node, None)
                self.client[node], holders[client] = client, node
                if examples is not None:
                    self.examples[client] = examples
        return any(node in self.refused for node in new)

    def _answers(self, replies: Iterable[Message], asked: list[Message]) -> Iterator[tuple[int, tuple[int, int | None]]]:
        """(node, (client, number of its examples if it tells it)) of the answers that name a client."""
        for node, reply in authored(replies, asked):
            try:
                client = client_of(reply.content) if reply.has_content() else None
                if client is not None:
                    says = messages.first(reply.content, MetricRecord) or MetricRecord()
                    counted = messages.EXAMPLES in says
                    yield node, (client, examples_of(says, messages.EXAMPLES, MOST) if counted else None)
            except Malformed as error:
                self._refuse(node, untrusted.text(str(error)))

    def _refuse(self, node: int, why: str) -> None:
        if self.refused.get(node) != why:
            self.refused[node] = why
            self.say(f"node {node} takes no part: {why}")
