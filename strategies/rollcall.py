"""Which node is which client. Node ids are random on some grids, so each new node is asked once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora import messages
from fedlora.check import RunError


@dataclass
class RollCall:
    """Client by node id, of every node that was ever online.

    A number belongs to the first node that says it, for the whole run, online or not; another node that says it takes no
    part. As long as no node answers (a ClientApp without a query function) new ones are numbered in the order of their ids;
    where only some do, the silent ones stay out and are asked again in the next round.
    """

    patience: float  # seconds to wait for nodes and for their answers
    clients: int | None = None  # how many there are; None: as many as come
    say: Callable[[str], object] = logging.getLogger("flwr").warning  # is given a sentence for a node that takes no part
    client: dict[int, int] = field(default_factory=dict)
    examples: dict[int, int] = field(default_factory=dict)  # by client, of those that say how many they have
    refused: dict[int, str] = field(default_factory=dict)  # nodes that take no part, and why
    named: bool = False  # whether any node has said which client it is

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
        asked = [Message(RecordDict(), node, MessageType.QUERY) for node in new]
        replies = grid.send_and_receive(asked, timeout=timeout or self.patience) if asked else ()
        said = {reply.metadata.src_node_id: answer for reply in replies if (answer := answer_of(reply))}
        self.named |= bool(said)
        if not self.named:
            self.client |= {node: number for number, node in enumerate(new, len(self.client))}
        holders = {client: node for node, client in self.client.items()}
        for node in (node for node in new if node in said):
            client: int = int(said[node][messages.CLIENT])  # type: ignore[arg-type]
            if self.clients is not None and not 0 <= client < self.clients:
                self._refuse(node, client, f"and there are clients={self.clients}, counted from 0")
            elif client in holders:
                self._refuse(node, client, f"which is node {holders[client]}")
            else:
                self.refused.pop(node, None)
                self.client[node], holders[client] = client, node
                if messages.EXAMPLES in said[node]:
                    self.examples[client] = int(said[node][messages.EXAMPLES])  # type: ignore[arg-type]
        return any(node in self.refused for node in new)

    def _refuse(self, node: int, client: int, why: str) -> None:
        why = f"it says that it is client {client}, {why}; give each device a number of its own (--client)"
        if self.refused.get(node) != why:
            self.refused[node] = why
            self.say(f"node {node} takes no part: {why}")


def answer_of(reply: Message) -> MetricRecord | None:
    """What a reply says of the client that it is from, if it names one."""
    metrics = messages.first(reply.content, MetricRecord) if reply.has_content() else None
    return metrics if metrics is not None and messages.CLIENT in metrics else None
