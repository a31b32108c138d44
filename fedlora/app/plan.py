"""What an experiment will come to, before it is run: derived values with their reason, bytes, memory, steps."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from clients import cost
from clients.task import local_steps
from fedlora import engines
from fedlora.app.guard import Derived, cautions, sensitivity
from fedlora.app.terminal import duration, size
from fedlora.app.traffic import Traffic, of_run, participations
from fedlora.arrays.messages import ServerState
from fedlora.compute.evaluate import evaluate
from fedlora.compute.workbench import Workbench
from fedlora.config import Config
from fedlora.data import labels
from fedlora.engines import pool
from fedlora.server.wire import Unequal
from strategies import LoRAStrategy

if TYPE_CHECKING:
    from fedlora.app.guard import Keeper


def _cohort(config: Config) -> str:
    """Why a cohort has the size that it has."""
    if config.clients_per_round:
        return "clients_per_round"
    if config.fraction is None:
        return "all"
    raised = config.cohort_size > round(config.clients * config.fraction)
    return f"fraction {config.fraction:g}" + (", raised to two" if raised else "")


def _spread(counts: np.ndarray) -> str:
    """Numbers of examples in words."""
    least, most = counts.min(), counts.max()
    return f"{most} each" if least == most else f"{least} to {most}, {np.median(counts):g} at the median"


def derive(bench: Workbench, strategy: LoRAStrategy, state: ServerState, guard: Keeper | None) -> Derived:
    """Every value that follows from the settings and the data, with its reason."""
    config, model = bench.config, bench.model
    counts = bench.counts
    parameters = trained(state, strategy)
    head = "trained" if model.trains_head else "frozen"
    why = model.base.head + ("" if config.adapter.train_head is None else f"; adapter.train_head={config.adapter.train_head}")
    rows = [
        ("scale", f"{model.scale:g}", f"alpha {config.adapter.alpha:g} / rank {config.adapter.rank}"),
        ("layers", f"{len(state.adapters)}", f"target modules {', '.join(model.target_modules)}"),
        ("head", head, why),
        ("trained by a client", f"{parameters:,} parameters", f"factor {' and '.join(strategy.trains)} of each layer"
            + (" and the head" if model.trains_head else "")),
        *ranked(strategy),
        *labels.derived(bench.dataset),
        ("cohort", f"{config.cohort_size} of {config.clients} clients", _cohort(config)),
        ("examples a client", _spread(counts), f"{counts.sum()} in all, partition {config.partition.name}"),
        ("central test", f"{len(bench.dataset.test)} examples", "dataset.test" if config.dataset.test else
            f"test_fraction {config.dataset.test_fraction:g}"),
        ("device", str(model.device), f"device={config.device}"),
    ]  # fmt: skip
    if guard is not None:
        rows += [guard.derivation(), *sensitivity(bench, strategy), *cautions(config, counts)]
    if config.engine.name != "inline":
        workers, gpus = pool.resources(config)
        reason = "engine.workers" if config.engine.workers else "one a GPU" if gpus else "one a core"
        rows.append(("workers", f"{workers}", reason))
    return rows


@dataclass(frozen=True)
class Estimate:
    """What a run comes to in all. Seconds are measured here, on one step and one batch, and leave out the start-up; with
    deploy they are NaN, since the steps are other machines'."""

    traffic: Traffic  # bytes, and client rounds
    steps: int  # of all of them
    step: float  # seconds of one optimiser step
    training: float  # seconds of all that clients do, on one worker
    evaluation: float  # seconds of the central tests
    lanes: float  # clients at work at a time, on average over a round

    @property
    def up(self) -> int:
        """Bytes that all clients send."""
        return self.traffic.up

    @property
    def down(self) -> int:
        """Bytes that all clients are sent."""
        return self.traffic.down

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
    steps = round(sum(local_steps(config.train, int(bench.counts[k])) * times for k, times in participations(config).items()))
    times = -(-config.rounds // config.evaluate.every)  # the last round is tested too
    held_out = times * (sum(map(len, bench.shards)) - int(bench.counts.sum())) if config.evaluate.holdout else 0
    tested = 0 if strategy.personal else (1 + times) * len(bench.dataset.test)
    step, example = (math.nan, math.nan) if config.deploy else _seconds(bench, strategy, state)
    workers = 1 if config.engine.name == "inline" else pool.resources(config)[0]
    return Estimate(
        traffic=of_run(config, strategy, state),
        steps=steps,
        step=step,
        training=steps * step + held_out * example,
        evaluation=tested * example,
        lanes=config.cohort_size / math.ceil(config.cohort_size / workers),
    )


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
        examples = bench.test if len(bench.test) else bench.train
        batch = np.arange(min(len(examples), config.evaluate.batch_size))
        test = cost.quickest(partial(evaluate, bench.model, examples, batch, config.evaluate.batch_size))
        _measured[key] = cost.seconds(bench, strategy.trains, size), test / len(batch)
        bench.model.write(state.adapters, state.dense)
    return _measured[key]


def expense(bench: Workbench, strategy: LoRAStrategy, state: ServerState, whole: Estimate) -> Derived:
    """Bytes, steps, time and memory of the whole run; the memory of a step is measured by one forward pass, not guessed.

    With deploy without what examples are needed for, which the devices have: time, and the memory of a step.
    """
    config, sent = bench.config, whole.traffic
    weights = sum(p.numel() * p.element_size() for p in bench.model.peft.parameters())
    held = 4 * trained(state, strategy)
    moments = {"sgd": int(config.train.momentum > 0), "adamw": 2}[config.train.optimizer]
    trainings = f"{sent.trainings} client rounds"
    down, why_sent = size(sent.down_each), "arrays as sent, 128 bytes of header each"
    if sent.last > sent.first:
        down += f" (first round {size(sent.first)}, last {size(sent.last)})"
        why_sent = "on average; what has moved into the base is sent down too, and grows until it has full rank"
    of_tests = f", and {size(sent.tests)} down to clients that test" if sent.tests else ""
    time, activations = [], []
    if not config.deploy:
        saved = saved_bytes(bench, strategy, int(np.argmax(bench.counts)))
        activations = [("activations of a step", size(saved), "saved for the backward pass; measured on the largest client")]
        why = f"an estimate without start-up: {1000 * whole.step:.3g} ms a step, clients {whole.lanes:.3g} at a time, and "
        time = [("time", f"about {duration(whole.seconds)}", f"{why}{duration(whole.evaluation)} of tests; measured here")]
    return [
        ("bytes a client and round", f"up {size(sent.up_each)}, down {down}", why_sent),
        ("bytes of the run", f"up {size(sent.up)}, down {size(sent.down)}", trainings + of_tests),
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
    how = "native to the strategy" if strategy.unequal is Unequal.NATIVE else "by truncation down and zero padding up"
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
