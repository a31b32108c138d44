"""`engine=inline`: clients one after another in this process. The quickest to start and the easiest to debug."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.config import Config
from fedlora.engines import cohort
from fedlora.engines.base import OnReply
from fedlora.engines.local import LocalGrid


class InlineGrid(LocalGrid):
    """Calls the ClientApp for one cohort after another."""

    def __init__(self, clients: int, app: str, cohort: int | None = 1, on_reply: OnReply = lambda count: None) -> None:
        super().__init__(clients, app, cohort, on_reply)

    def execute(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        """One cohort at a time; no new one is begun after `timeout` seconds."""
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        for together in self.cohorts(messages):
            if time.monotonic() > deadline:
                return
            yield from self.play(together)


class InlineEngine:
    """The grid, with nothing to start and nothing to stop."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def run(self, drive: Callable[[Grid], object]) -> None:
        """Call `drive` here and now."""
        drive(self.grid)

    def close(self) -> None:
        """Nothing is held."""


def make(config: Config, app: str, on_reply: OnReply) -> InlineEngine:
    """An engine for `config.clients` clients in this process."""
    return InlineEngine(InlineGrid(config.clients, app, cohort(config), on_reply))
