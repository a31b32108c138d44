"""What an experiment will come to, before it is run: derived values with their reason, bytes, memory, steps."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from flwr.app import RecordDict

from clients import cost
from clients.task import local_steps, sampling_rate
from fedlora import engines, messages
from fedlora.evaluate import evaluate
from fedlora.messages import ServerState
from fedlora.participation import schedule
from fedlora.terminal import duration, size
from fedlora.workbench import Workbench
from strategies import LoRAStrategy

if TYPE_CHECKING:
    from fedlora.config import Config
    from fedlora.privacy.dp_fedavg import UserGuard
    from fedlora.privacy.record_level import Guard

Derived = list[tuple[str, str, str]]  # name, value, reason


def guard(
    bench: Workbench, save: Callable[[Any], None] = lambda ledger: None, before: Path | None = None
) -> Guard | UserGuard | None:
    """What keeps a private run's budget, its noise derived; None with privacy=none. `save` is given its ledger.

    `before` is the file of a ledger that stays counted, whatever of it is taken again; it may be missing.
    """
    config = bench.config
    if config.privacy.name == "none":
        return None
    if config.privacy.name == "user":
        from fedlora.privacy.dp_fedavg import UserGuard, UserLedger

        return UserGuard(config, save, UserLedger.load(before) if before and before.exists() else None)
    from fedlora.privacy.ledger import Ledger
    from fedlora.privacy.record_level import Client, Guard

    drawn = schedule(config.seed, config.rounds, config.clients, config.cohort_size)
    counts = [len(bench.examples_of(client)[0]) for client in range(config.clients)]
    clients = [
        Client(sampling_rate(config.train.batch_size, n), local_steps(config.train, n), drawn[number])
        for number, n in enumerate(counts)
    ]
    spent = Ledger.load(before) if before and before.exists() else None
    return Guard(config.privacy, clients, config.rounds, config.cohort_size / config.clients, save, spent)


def derive(bench: Workbench, strategy: LoRAStrategy, state: ServerState, guard: Guard | UserGuard | None) -> Derived:
    """Every value that follows from the settings and the data, with its reason."""
    config, model = bench.config, bench.model
    counts = np.array([len(bench.examples_of(client)[0]) for client in range(config.clients)])
    parameters = trained(state, strategy)
    head = "trained" if model.trains_head else "frozen"
    why = "adapter.train_head" if config.adapter.train_head is not None else (
        "the checkpoint has none for these classes" if model.head_is_new else "the checkpoint has one"
    )  # fmt: skip
    rows = [
        ("scale", f"{model.scale:g}", f"alpha {config.adapter.alpha:g} / rank {config.adapter.rank}"),
        ("layers", f"{len(state.adapters)}", f"target modules {', '.join(model.target_modules)}"),
        ("head", head, why),
        ("trained by a client", f"{parameters:,} parameters", f"factor {' and '.join(strategy.trains)} of each layer"
            + (" and the head" if model.trains_head else "")),
        *ranked(strategy),
        ("cohort", f"{config.cohort_size} of {config.clients} clients", "clients_per_round" if config.clients_per_round
            else f"fraction {config.fraction:g}, two at least" if config.fraction is not None else "all"),
        ("examples a client", f"{counts.min()} / {np.median(counts):g} / {counts.max()}",
            f"smallest / median / largest of {counts.sum()}, partition {config.partition.name}"),
        ("central test", f"{len(bench.dataset.test)} examples", "dataset.test" if config.dataset.test else
            f"test_fraction {config.dataset.test_fraction:g}"),
        ("device", str(model.device), f"device={config.device}"),
    ]  # fmt: skip
    if guard is not None:
        rows += [guard.derivation(), *sensitivity(bench, strategy), *cautions(config, counts)]
    if config.engine.name != "inline":
        workers, gpus = engines.resources(config)
        reason = "engine.workers" if config.engine.workers else "one a GPU" if gpus else "one a core"
        rows.append(("workers", f"{workers}", reason))
    return rows


def sensitivity(bench: Workbench, strategy: LoRAStrategy) -> Derived:
    """What a record adds to a private step, at most. Raises ConfigError where clipping would not bound it."""
    privacy = bench.config.privacy
    if privacy.name != "record":
        return []
    from clients.bounded import ensure  # Opacus takes a second to load

    for trains in sorted({strategy.trained(round) for round in (1, 2)}):
        ensure(bench, trains)
    why = "each trained layer sees records as rows, and gradients by record are right; tried on this model"
    if bench.config.deploy:
        why = "each device tries its own model before it trains"
    return [("a record adds", f"at most C = {privacy.clip:g}", why)]


def cautions(config: Config, counts: np.ndarray) -> Derived:
    """What a private run may do and seldom means to; `counts` are the training examples of each client."""
    rows, user = [], config.privacy.name == "user"
    protected, delta = config.clients if user else int(counts.sum()), config.privacy.delta
    if delta * protected >= 1:
        what = "clients" if user else "training examples"
        reason = f"not below 1/n of n = {protected} {what}: one of them may be laid open; set it well below {1 / protected:.2g}"
        rows.append(("warning", f"privacy.delta={delta:g}", reason))
    small = counts[counts < config.train.batch_size]
    if not user and len(small):
        reason = (
            f"larger than the data of {len(small)} of {len(counts)} clients (the smallest has {small.min()}): they take all "
            "their records in every step, q = 1, so that sampling amplifies nothing; lower it, or raise partition.min_examples"
        )
        rows.append(("warning", f"train.batch_size={config.train.batch_size}", reason))
    return rows


@dataclass(frozen=True)
class Estimate:
    """What a run comes to in all. Seconds are measured here, on one step and one batch, and leave out the start-up; with
    deploy they are NaN, since the steps are other machines'."""

    trainings: int  # client rounds
    steps: int  # of all of them
    up: int  # bytes
    down: int
    step: float  # seconds of one optimiser step
    training: float  # seconds of all that clients do, on one worker
    evaluation: float  # seconds of the central tests
    lanes: float  # clients at work at a time, on average over a round

    @property
    def seconds(self) -> float:
        """From the first round to the last, with the clients on the workers."""
        return self.training / self.lanes + self.evaluation

    @property
    def seconds_alone(self) -> float:
        """The same with all clients in one process."""
        return self.training + self.evaluation


def estimate(bench: Workbench, strategy: LoRAStrategy, state: ServerState) -> Estimate:
    """What the run comes to: exact but for its seconds."""
    config = bench.config
    rounds = participations(config)
    trainings = round(sum(rounds.values()))
    counts = [len(bench.examples_of(client)[0]) for client in range(config.clients)]
    steps = round(sum(local_steps(config.train, counts[client]) * times for client, times in rounds.items()))
    every = config.evaluate.every
    tested = (1 + config.rounds // every + (config.rounds % every > 0)) * len(bench.dataset.test)
    held_out = (config.rounds // every) * sum(len(bench.examples_of(client)[1]) for client in range(config.clients))
    step, example = (math.nan, math.nan) if config.deploy else _seconds(bench, strategy, state)
    workers = 1 if config.engine.name == "inline" else engines.resources(config)[0]
    return Estimate(
        trainings=trainings,
        steps=steps,
        up=round(sum(times * bytes_up(state, strategy, client) for client, times in rounds.items())),
        down=round(sum(times * bytes_down(state, strategy, client) for client, times in rounds.items())),
        step=step,
        training=steps * step + held_out * example,
        evaluation=tested * example,
        lanes=config.cohort_size / math.ceil(config.cohort_size / workers),
    )


def participations(config: Config) -> Mapping[int, float]:
    """Client → the rounds in which it is drawn; those to be expected where cohorts are a secret (privacy=user)."""
    if config.privacy.name == "user":
        return dict.fromkeys(range(config.clients), config.rounds * config.cohort_size / config.clients)
    return schedule(config.seed, config.rounds, config.clients, config.cohort_size)


_measured: dict[str, tuple[float, float]] = {}


def _seconds(bench: Workbench, strategy: LoRAStrategy, state: ServerState) -> tuple[float, float]:
    """Seconds of a client's local step, in the cohorts that the run would have, and of one example of the central test.

    Measured once for runs that are alike in this.
    """
    config = bench.config
    size, clients = 1, config.cohort_size
    if config.engine.name != "flower":
        size = min(clients, cost.cohort_size(bench, strategy.trains, clients, engines.cohort(config)))
    groups = [asdict(group) for group in (config.model, config.dataset, config.adapter, config.train, config.evaluate)]
    private = config.privacy.name == "record"
    key = json.dumps([groups, config.device, config.threads, strategy.trains, private, size])
    if key not in _measured:
        batch = np.arange(min(len(bench.test), config.evaluate.batch_size))
        test = cost.quickest(partial(evaluate, bench.model, bench.test, batch, config.evaluate.batch_size))
        _measured[key] = cost.seconds(bench, strategy.trains, size), test / len(batch)
        bench.model.write(state.adapters, state.dense)
    return _measured[key]


def expense(bench: Workbench, strategy: LoRAStrategy, state: ServerState, whole: Estimate) -> Derived:
    """Bytes, steps, time and memory of the whole run; the memory of a step is measured by one forward pass, not guessed.

    With deploy without what examples are needed for, which the devices have: time, and the memory of a step.
    """
    config = bench.config
    up, down = bytes_up(state, strategy), bytes_down(state, strategy)
    counts = [len(bench.examples_of(client)[0]) for client in range(config.clients)]
    weights = sum(p.numel() * p.element_size() for p in bench.model.peft.parameters())
    held = 4 * trained(state, strategy)
    moments = {"sgd": int(config.train.momentum > 0), "adamw": 2}[config.train.optimizer]
    trainings = f"{whole.trainings} client rounds"
    time, activations = [], []
    if not config.deploy:
        saved = saved_bytes(bench, strategy, int(np.argmax(counts)))
        activations = [("activations of a step", size(saved), "saved for the backward pass; measured on the largest client")]
        why = f"an estimate without start-up: {1000 * whole.step:.3g} ms a step, clients {whole.lanes:.3g} at a time, and "
        time = [("time", f"about {duration(whole.seconds)}", f"{why}{duration(whole.evaluation)} of tests; measured here")]
    return [
        ("bytes a client and round", f"up {size(up)}, down {size(down)}", "arrays as sent, 128 bytes of header each"),
        ("bytes of the run", f"up {size(whole.up)}, down {size(whole.down)}", trainings),
        ("steps", f"{whole.steps:,}", f"optimiser steps of the {trainings}"),
        *time,
        ("base model", size(weights), "once in each process"),
        ("adapters, gradients, optimiser", size(held * (2 + moments)), f"{2 + moments} × what is trained, float32"),
        *activations,
        (
            "this process now",
            size(psutil.Process().memory_info().rss),
            "resident, with model and data; a worker is alike",
        ),
    ]  # fmt: skip


def bytes_up(state: ServerState, strategy: LoRAStrategy, client: int = 0) -> float:
    """Bytes of a client's reply in a round; the mean of two neighbouring rounds, which may differ in what is trained."""
    rank = None if strategy.ranks is None else strategy.ranks[client]
    further = bytes_of(strategy.sent_further(state)[0])
    return further + sum(bytes_of(strategy.sent_up(state, round, rank)) for round in (1, 2)) / 2


def bytes_down(state: ServerState, strategy: LoRAStrategy, client: int = 0) -> int:
    """Bytes of what a client is sent in a round, before anything has moved into the base."""
    begin = strategy.sent_down(state, None if strategy.ranks is None else strategy.ranks[client])
    return bytes_of(begin) + bytes_of(strategy.sent_further(state)[1])


def bytes_of(arrays: dict[str, np.ndarray]) -> int:
    """Bytes of one message with these arrays."""
    return messages.array_bytes(RecordDict({messages.ARRAYS: messages.record(arrays)}))


def trained(state: ServerState, strategy: LoRAStrategy) -> int:
    """Parameters that a client of full rank trains: factors, or what stands between them, and the head if it is trained."""

    def size(factors: str) -> int:
        return sum(getattr(pair, f).size for pair in state.adapters.values() for f in "AB" if f in factors)

    return max(size(strategy.trained(round)) for round in (1, 2)) + sum(array.size for array in state.dense.values())


def ranked(strategy: LoRAStrategy) -> Derived:
    """How many clients have which rank, where they differ."""
    if strategy.ranks is None:
        return []
    counts = Counter(strategy.ranks)
    text = ", ".join(f"{counts[rank]} of rank {rank}" for rank in sorted(counts))
    how = "native to the strategy" if strategy.unequal == "native" else "by truncation down and zero padding up"
    return [("ranks", text, how)]


def saved_bytes(bench: Workbench, strategy: LoRAStrategy, client: int) -> int:
    """Bytes that autograd keeps for one batch of a client, each storage once, the model's own weights not counted."""
    indices = bench.examples_of(client)[0][: bench.config.train.batch_size]
    bench.model.trainable(strategy.trains)
    weights = {p.untyped_storage().data_ptr() for p in bench.model.peft.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    bench.model.train_mode()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bench.model.forward(bench.train.batch(indices, bench.model.device))
    return sum(kept.values())
