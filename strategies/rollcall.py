"""Which node is which client. Node ids are random on some grids, so each new node is asked once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora import messages
from fedlora.check import RunError


@dataclass
class RollCall:
    """Client by node id, of every node that was ever online.

    As long as no node answers (a ClientApp without a query function) new ones are numbered in the order of their ids; where
    only some do, the silent ones stay out and are asked again in the next round.
    """

    patience: float  # seconds to wait for nodes and for their answers
    client: dict[int, int] = field(default_factory=dict)
    named: bool = False  # whether any node has said which client it is

    def nodes(self, grid: Grid, needed: int, query: Callable[[list[int]], list[Message]]) -> dict[int, int]:
        """Client → node id of those that are online; `query` makes the questions to some nodes.

        Raises RunError where fewer than `needed` come online.
        """
        deadline = time.monotonic() + self.patience
        while len(nodes := sorted(grid.get_node_ids())) < needed:
            if time.monotonic() > deadline:
                raise RunError(f"{len(nodes)} of {needed} nodes came online in {self.patience:g} s")
            time.sleep(0.1)
        if new := [node for node in nodes if node not in self.client]:
            replies = list(grid.send_and_receive(query(new), timeout=self.patience))
            named = {r.metadata.src_node_id: client for r in replies if (client := answered(r)) is not None}
            self.named |= bool(named)
            self.client |= named if self.named else {node: i for i, node in enumerate(new, len(self.client))}
        return {self.client[node]: node for node in nodes if node in self.client}


def answered(reply: Message) -> int | None:
    """The client that a reply to the roll call names, if it names one."""
    records = reply.content.metric_records.values() if reply.has_content() else ()
    return next((int(m[messages.CLIENT]) for m in records if messages.CLIENT in m), None)  # type: ignore[arg-type]
