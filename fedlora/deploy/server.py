"""The ServerApp: `experiment.run`, as the simulator runs it, on the grid of a SuperLink.

The server has the base model, and a test set if `dataset.test` names one here; it has no training data. How many examples
each device has, which σ and the weights depend on, the devices say in a roll call.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedlora import messages, terminal
from fedlora.check import RunError
from fedlora.config import Config, EngineConfig
from fedlora.deploy.courier import Sender
from fedlora.engines.inline import InlineEngine
from fedlora.records import ADAPTER, CURVES, MERGED, PRIVACY, SUMMARY
from strategies.rollcall import RollCall

POLL = 0.3  # seconds from one look for replies to the next
HOME = (PRIVACY, ADAPTER, MERGED, CURVES, SUMMARY)  # what goes back besides the rounds; the mark of the end comes last

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's configuration holds as JSON, checked again here; its records go out as log lines."""
    from fedlora import experiment

    logging.getLogger("flwr").setLevel(logging.WARNING)  # what it says of rounds is in the records
    started = time.perf_counter()
    asked = Config.from_json(str(context.run_config[messages.EXPERIMENT]))
    grid.send_and_receive = partial(send_and_receive, grid)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(prefix="fedlora-") as folder:
        config = replace(asked, results=folder, name="run", engine=EngineConfig(name="inline"))
        with sending(Path(folder) / "run"):
            strategy = experiment.make_strategy(config)
            strategy.roll.say = terminal.say
            config = replace(config, partition=replace(config.partition, sizes=sizes(grid, config, strategy.roll)))
            if config.plan:
                experiment.foretell(replace(config, results=asked.results, name=asked.name), strategy)
            else:
                experiment.run(config, started, engine=InlineEngine(grid), strategy=strategy)


def sizes(grid: Grid, config: Config, roll: RollCall) -> list[int]:
    """The number of examples of each client, as the devices say.

    σ depends on it, so a run begins when every client has been there once; later they may come and go. Raises RunError
    where one has not within `config.patience`.
    """
    deadline = time.monotonic() + config.patience
    while True:  # who was refused is asked again: it may be another client now
        roll.meet(grid, list(grid.get_node_ids()), max(1.0, deadline - time.monotonic()))
        absent = [client for client in range(config.clients) if client not in roll.examples]
        if not absent:
            return [roll.examples[client] for client in range(config.clients)]
        if time.monotonic() > deadline:
            raise RunError(
                f"client {absent[0]} of clients={config.clients} was not online within patience={config.patience:g} s; "
                "start its device, or lower clients"
            )
        time.sleep(POLL)


def send_and_receive(grid: Grid, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
    """Flower's own, but that it looks for replies every `POLL` seconds instead of every 3, and gives them as they come."""
    waiting = set(grid.push_messages(list(messages)))
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        if waiting:
            time.sleep(POLL)


@contextmanager
def sending(folder: Path) -> Iterator[None]:
    """While this lasts, what is printed and new rounds in the folder are said at once; at its end, the files."""
    sender, done = Sender(folder, sys.stdout.write), threading.Event()

    def follow() -> None:
        while not done.wait(POLL):
            sender.rounds()

    thread = threading.Thread(target=follow, name="courier")
    thread.start()
    try:
        with redirect_stdout(sender):
            yield
    finally:
        done.set()
        thread.join()
        sender.rounds()
        for name in HOME:
            sender.files(name)
