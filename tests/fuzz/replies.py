"""Replies of clients to a strategy, damaged: who sent them is dropped by name, and the state stays a model."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import strategies
from fedlora.arrays import compression, messages
from fedlora.check import RunError
from fedlora.server import optimizers, robust, secure
from fedlora.server.rollcall import RollCall
from strategies import LoRAStrategy
from tests.fuzz import mutate
from tests.test_rounds import Client, StubGrid, honest, initial, make
from tests.test_secure_runs import silent

ROUNDS, MANY = 4, 40
KINDS = ("query", "train", "evaluate")
CHECKED: dict[str, Any] = {"min_success": 0.3, "fraction_evaluate": 1.0}


class Hostile(StubGrid):
    """Damages what the first clients, fewer than half, send in each message of a kind; all goes through Flower's bytes."""

    def __init__(self, rng: np.random.Generator, client: Client, clients: int = MANY, kinds: tuple[str, ...] = KINDS) -> None:
        super().__init__(client, clients)
        self.rng, self.kinds, self.hostile, self.damaged = rng, kinds, range((clients - 1) // 2), 0

    def _call(self, message: Message) -> Message | None:
        reply = super()._call(message)
        hostile = self.nodes[message.metadata.dst_node_id] in self.hostile
        if reply is None or not hostile or not message.metadata.message_type.startswith(self.kinds):
            return reply
        self.damaged += 1
        if reply.has_error() or self.rng.integers(20) == 0:
            return mutate.error(message, self.rng)
        content = mutate.reply(reply.content, self.rng)
        with contextlib.suppress(Exception):  # of what no serialisation can have, such as half a character
            sent = messages.to_bytes(content)
            content = messages.from_bytes(sent)
            if self.rng.integers(4) == 0:
                content = messages.from_bytes(mutate.data(sent, self.rng))
        return Message(content, reply_to=message)

    def numbers(self, roll: RollCall) -> set[int]:
        """The clients that the hostile nodes are taken for, and those that nobody is, whose number one of them may have had."""
        own = {roll.client[node] for node, client in self.nodes.items() if client in self.hostile and node in roll.client}
        return own | (set(range(len(self.nodes))) - set(roll.client.values()))


def encoding(client: Client, method: str) -> Client:
    """The clients, which encode what they train."""

    def encoded(number: int, message: Message) -> RecordDict | None:
        content = client(number, message)
        if content is not None and message.metadata.message_type == "train":
            arrays = messages.arrays_of(content.array_records["arrays"])
            content["arrays"] = messages.record(compression.encode(arrays, method, 0.5))
        return content

    return encoded


def play(strategy: LoRAStrategy, grid: Hostile, rounds: int = ROUNDS, bound: float = 1e6) -> Counter[str]:
    """What came of the damaged replies, by kind. Raises AssertionError for anything but named drops of hostile clients."""
    came: Counter[str] = Counter()
    said: list[str] = []
    strategy.roll.say = said.append

    def after(round: int, arrays: ArrayRecord) -> None:
        if not round:
            return
        row = row_of(strategy)
        untested = row.get("untested", {})
        came.update({"named drops": len(row["drops"]), "tests left out": len(untested)})
        named = {int(client) for client in (*row["drops"], *untested)}
        assert named <= grid.numbers(strategy.roll), named
        for name, array in messages.arrays_of(arrays).items():
            most = bound**2 if ".base_" in name else bound  # a correction is made of products
            assert np.isfinite(array).all() and np.abs(array).max(initial=0) < most, name
        assert all(0 <= accuracy <= 1 for accuracy in row["client_accuracy"].values())

    job = ConfigRecord({messages.EXPERIMENT: '{"seed": 0}'})
    strategy.start(grid, initial(strategy.name), rounds, train_config=job, evaluate_fn=after)
    assert all(line.isprintable() and len(line) < 400 for line in said)
    came["refused at the roll call"] = len(strategy.roll.refused)
    came["taken, or left out already"] = max(0, grid.damaged - came.total())
    return came


def row_of(strategy: Any) -> dict[str, Any]:
    """The newest line of rounds.jsonl, with all texts in it printable and short."""
    row = strategy.report.as_row(0.0)
    for said in (*row["drops"].values(), *row.get("untested", {}).values(), *row.get("refused", {}).values()):
        assert said and said.isprintable() and len(said) <= 201, said
    json.dumps(row)
    return dict(row)


def plain(rng: np.random.Generator) -> Counter[str]:
    """A run of any strategy under any encoding, mean and optimizer that it has."""
    name = str(rng.choice(strategies.names()))
    keeps, steady = strategies.strategy_class(name).two_phase, strategies.strategy_class(name).keeps_basis
    method = "none" if keeps else str(rng.choice(compression.METHODS))
    kinds = KINDS if rng.integers(3) == 0 else KINDS[1:]
    strategy = make(name, min_available_nodes=MANY // 2, encodes=("none", method, 0.5), clients=MANY, **CHECKED)
    mean = "weighted" if keeps else str(rng.choice(("weighted", "weighted", "median", "trimmed", "norm_filter")))
    if mean != "weighted":
        strategy.robust = robust.make(mean, 0.2, 3.0)
    if steady and rng.integers(4) == 0:
        strategy.optimizer = optimizers.make(str(rng.choice(("momentum", "adam"))), 0.1, 0.9, 0.99, 1e-3)
    return play(strategy, Hostile(rng, encoding(honest(), method), kinds=kinds))


def summed(rng: np.random.Generator) -> Counter[str]:
    """Secure sums of a few clients, who may end a run by a sentence: nobody sees what is behind a mask."""
    linear = [name for name in strategies.names() if strategies.strategy_class(name).linear]
    strategy = make(str(rng.choice(linear)), min_available_nodes=6, **CHECKED)
    strategy.sum_of = secure.SecureMean(64.0)
    kinds = (str(rng.choice(("train", "train.advertise", "train.share", "train.mask", "train.unmask"))),)
    grid = Hostile(rng, silent(), 6, kinds)
    try:
        return play(strategy, grid, 10)
    except RunError as error:
        assert str(error).isprintable() and len(str(error)) < 1000, error
        return Counter({"sums that ended by a sentence": max(1, grid.damaged)})


def case(seed: int) -> Counter[str]:
    """One run."""
    rng = np.random.default_rng(seed)
    return summed(rng) if rng.integers(3) == 0 else plain(rng)


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Callable[[int], Counter[str]]]:
    """The function from a seed to what came of its mutations."""
    with patch("fedlora.server.rollcall.time.sleep", lambda seconds: None):
        yield case
