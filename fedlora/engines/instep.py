"""Several experiments in one process, in step: the training messages of a round of each are played together.

For cells of a sweep that differ in what acts on the adapters only (strategy, σ, learning rate): their clients go through
the same frozen base, so they may sit in one cohort. Each experiment is a greenlet, which gives way where it waits for its
clients; there is one thread, so nothing has to be locked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flwr.app import Message
from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]

from fedlora.config import Config
from fedlora.engines import cohort
from fedlora.engines.base import OnReply
from fedlora.engines.inline import InlineEngine, InlineGrid
from fedlora.engines.local import play


class InStepGrid(InlineGrid):
    """Lets whoever runs the experiments in step play its messages."""

    @property
    def settles(self) -> bool:
        """No: clients of several runs share a pass."""
        return False

    def execute(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        """The replies, when those of the other experiments are there too; there is no deadline for what is shared."""
        runner = getcurrent().parent
        assert runner is not None
        yield from runner.switch(self, messages)


def make(config: Config, app: str, on_reply: OnReply) -> InlineEngine:
    """An engine for an experiment that `run` runs."""
    return InlineEngine(InStepGrid(config.clients, app, cohort(config), on_reply))


def run(experiments: Sequence[Callable[[], Any]], stopped: Callable[[], bool]) -> list[Any]:
    """What the experiments return, each on an engine of this module, with equal numbers of clients and one base model.

    As soon as `stopped` says so, every one of them gets a KeyboardInterrupt where it waits.
    """
    running = [greenlet(experiment) for experiment in experiments]
    results: list[Any] = [None] * len(running)
    waiting: dict[int, tuple[InStepGrid, list[Message]]] = {}  # what each one waits for

    def take(number: int, said: Any) -> None:
        if running[number].dead:
            results[number] = said
        else:
            waiting[number] = said

    for number, one in enumerate(running):
        take(number, one.switch())
    while waiting:
        asked, waiting = waiting, {}
        try:
            replies = {} if stopped() else _play(asked)
        except KeyboardInterrupt:
            replies = {}
        for number in asked:
            interrupt = number not in replies or stopped()
            take(number, running[number].throw(KeyboardInterrupt) if interrupt else running[number].switch(replies[number]))
    return results


def _play(asked: dict[int, tuple[InStepGrid, list[Message]]]) -> dict[int, list[Message]]:
    """The replies to everybody's messages, by whose they are; what can share a pass does."""
    grid = next(iter(asked.values()))[0]
    owners = {id(message): number for number, (_, messages) in asked.items() for message in messages}
    replies: dict[int, list[Message]] = {number: [] for number in asked}
    everything = [message for _, messages in asked.values() for message in messages]
    for kind in dict.fromkeys(message.metadata.message_type for message in everything):
        for together in grid.cohorts([message for message in everything if message.metadata.message_type == kind]):
            grids = [asked[owners[id(message)]][0] for message in together]
            states = [own.states_of([message])[0] for own, message in zip(grids, together, strict=True)]
            played, kept = play(grid.app, together, states, grid.clients)
            for own, message, reply, state in zip(grids, together, played, kept, strict=True):
                replies[owners[id(message)]] += own.remember([reply], [state])
    return replies
