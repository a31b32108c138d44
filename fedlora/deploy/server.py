"""The ServerApp: `experiment.run`, as the simulator runs it, on the grid of a SuperLink.

The server has the base model, and a test set if `dataset.test` names one here; it has no training data. How many examples
each device has, which σ and the weights depend on, the devices say in a roll call.

    $FLWR_HOME/fedlora/<name>    its results folder, which stays: a run that is broken off goes on from the checkpoints in it.
                                 Nobody but the server's own user may read it
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.utils import get_flwr_home

from fedlora import disk, untrusted
from fedlora.app import terminal
from fedlora.app.folder import SUMMARY
from fedlora.app.naming import folder_name, run_name
from fedlora.app.records import Recorder
from fedlora.arrays import messages
from fedlora.check import ConfigError, RunError
from fedlora.config import Config, EngineConfig
from fedlora.deploy.courier import HOME, Sender
from fedlora.engines.inline import InlineEngine
from fedlora.server.rollcall import RollCall
from fedlora.validate import from_json
from strategies import LoRAStrategy

POLL = 0.3  # seconds from one look for replies to the next
STOPPING = 60.0  # seconds that a ServerApp whose run was stopped may take to notice: two heartbeats
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError)  # what content raises in Flower; networks raise others

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's configuration holds as JSON, checked again here; its records go out as log lines."""
    from fedlora.app import experiment

    logging.getLogger("flwr").setLevel(logging.WARNING)  # what it says of rounds is in the records
    started = time.perf_counter()
    asked = from_json(str(context.run_config[messages.EXPERIMENT]))
    grid.send_and_receive = partial(send_and_receive, grid)  # type: ignore[method-assign]
    name, results = folder_name(asked.name or run_name(asked)), get_flwr_home() / "fedlora"
    config = replace(asked, results=str(results), name=name, engine=EngineConfig(name="inline"))
    sender = Sender(results / name, sys.stdout.write)
    try:
        with redirect_stdout(sender):
            strategy = experiment.make_strategy(config)
            strategy.roll.say = terminal.say
            if config.plan:
                experiment.foretell(replace(met(grid, config, strategy), results=asked.results, name=asked.name), strategy)
                return
            recorder = Recorder(met(grid, config, strategy))  # refuses a folder of other settings, none of which is sent
            with private(results, recorder.folder), recorder.claim(STOPPING):
                try:
                    if recorder.finished:
                        terminal.finished(recorder.folder)
                    else:
                        (recorder.folder / SUMMARY).unlink(missing_ok=True)  # how it ended when it was broken off
                        experiment.play(recorder, started, engine=Devices(grid, sender), strategy=strategy)
                finally:
                    sender.rounds()
                    for file in HOME:
                        sender.files(file)
    except (ConfigError, RunError) as error:
        if SUMMARY not in sender.sent:
            sender.file(SUMMARY, json.dumps({"status": "failed", "reason": str(error)}).encode())
        raise


@contextmanager
def private(*folders: Path) -> Iterator[None]:
    """While this lasts, what is written is read by this user only, and so are these folders from now on.

    Raises ConfigError for a folder of somebody else's.
    """
    try:
        for folder in folders:
            disk.make_private(folder)
    except OSError as error:
        raise ConfigError(
            f"cannot keep {error.filename or folders[-1]} from other users ({error.strerror}); give it to the server's user, "
            "or set FLWR_HOME"
        ) from error
    with disk.private_files():
        yield


def met(grid: Grid, config: Config, strategy: LoRAStrategy) -> Config:
    """The experiment with the numbers of examples that the devices have; the strategy knows then who is who."""
    return replace(config, partition=replace(config.partition, sizes=sizes(grid, config, strategy.roll)))


class Devices(InlineEngine):
    """The devices of a SuperLink. The rounds are sent as they come, from when the records are cut to what is gone on from."""

    def __init__(self, grid: Grid, sender: Sender) -> None:
        super().__init__(grid)
        self.sender = sender

    def run(self, drive: Callable[[Grid], object]) -> None:
        """Call `drive`, and send each round as soon as it is on disk."""
        with following(self.sender):
            super().run(drive)


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
                f"client {absent[0]} of clients={config.clients} did not say who it is within patience={config.patience:g} s; "
                "start its device, or lower clients"
            )
        time.sleep(POLL)


def send_and_receive(grid: Grid, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
    """Flower's own, but that it looks for replies every `POLL` seconds instead of every 3, and gives them as they come.

    Each is pulled by itself: one that Flower cannot put together again raises in Flower, and would take with it those that
    were pulled beside it. It counts as none, so that its client is named and the others stay.
    """
    waiting = {number for number in grid.push_messages(list(messages)) if number}  # Flower gives None for what it cannot send
    deadline = time.monotonic() + timeout if timeout is not None else float("inf")
    while waiting and time.monotonic() < deadline:
        for number in sorted(waiting):
            try:
                replies = list(grid.pull_messages([number]))
            except UNREADABLE as error:
                terminal.say(f"a reply cannot be read: {untrusted.text(str(error))}")
                waiting.discard(number)
                continue
            waiting.difference_update([number] if replies else ())
            yield from replies
        if waiting:
            time.sleep(POLL)


@contextmanager
def following(sender: Sender) -> Iterator[None]:
    """While this lasts, each new round is sent at once."""
    done = threading.Event()

    def follow() -> None:
        while not done.wait(POLL):
            sender.rounds()

    thread = threading.Thread(target=follow, name="courier")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
