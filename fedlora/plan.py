"""What an experiment will come to, before it is run: derived values with their reason, bytes, memory, steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from flwr.app import RecordDict

from clients.task import local_steps, sampling_rate
from fedlora import engines, messages
from fedlora.messages import ServerState
from fedlora.participation import schedule
from fedlora.terminal import size
from fedlora.workbench import Workbench
from strategies import LoRAStrategy

if TYPE_CHECKING:
    from fedlora.config import Config
    from fedlora.privacy.dp_fedavg import UserGuard
    from fedlora.privacy.record_level import Guard

Derived = list[tuple[str, str, str]]  # name, value, reason


def guard(bench: Workbench, save: Callable[[Any], None] = lambda ledger: None) -> Guard | UserGuard | None:
    """What keeps a private run's budget, its noise derived; None with privacy=none. `save` is given its ledger."""
    config = bench.config
    if config.privacy.name == "none":
        return None
    if config.privacy.name == "user":
        from fedlora.privacy.dp_fedavg import UserGuard

        return UserGuard(config.privacy, config.clients, config.cohort_size, config.rounds, config.seed, save)
    from fedlora.privacy.record_level import Client, Guard

    drawn = schedule(config.seed, config.rounds, config.clients, config.cohort_size)
    counts = [len(bench.examples_of(client)[0]) for client in range(config.clients)]
    clients = [
        Client(sampling_rate(config.train.batch_size, n), local_steps(config.train, n), drawn[number])
        for number, n in enumerate(counts)
    ]
    return Guard(config.privacy, clients, config.rounds, config.cohort_size / config.clients, save)


def derive(bench: Workbench, strategy: LoRAStrategy, state: ServerState, guard: Guard | UserGuard | None) -> Derived:
    """Every value that follows from the settings and the data, with its reason."""
    config, model = bench.config, bench.model
    counts = np.array([len(bench.examples_of(client)[0]) for client in range(config.clients)])
    parameters = sum(array.size for array in sent(state, strategy.trains))
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
        ("cohort", f"{config.cohort_size} of {config.clients} clients", "clients_per_round" if config.clients_per_round
            else f"fraction {config.fraction:g}" if config.fraction is not None else "all"),
        ("examples a client", f"{counts.min()} / {np.median(counts):g} / {counts.max()}",
            f"smallest / median / largest of {counts.sum()}, partition {config.partition.name}"),
        ("central test", f"{len(bench.dataset.test)} examples", "dataset.test" if config.dataset.test else
            f"test_fraction {config.dataset.test_fraction:g}"),
        ("device", str(model.device), f"device={config.device}"),
    ]  # fmt: skip
    if guard is not None:
        rows += [guard.derivation(), *cautions(config, counts)]
    if config.engine.name != "inline":
        workers, gpus = engines.resources(config)
        reason = "engine.workers" if config.engine.workers else "one a GPU" if gpus else "one a core"
        rows.append(("workers", f"{workers}", reason))
    return rows


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


def cost(bench: Workbench, strategy: LoRAStrategy, state: ServerState) -> Derived:
    """Bytes, steps and memory of the whole run; the memory of a step is measured by one forward pass, not guessed."""
    config = bench.config
    up, down = bytes_sent(state, strategy.trains), bytes_sent(state, "AB")
    rounds = schedule(config.seed, config.rounds, config.clients, config.cohort_size, config.poisson)
    trainings = rounds.total()
    counts = [len(bench.examples_of(client)[0]) for client in range(config.clients)]
    steps = sum(local_steps(config.train, counts[client]) * times for client, times in rounds.items())
    weights = sum(p.numel() * p.element_size() for p in bench.model.peft.parameters())
    trained = sum(array.size for array in sent(state, strategy.trains)) * 4
    moments = {"sgd": int(config.train.momentum > 0), "adamw": 2}[config.train.optimizer]
    activations = saved_bytes(bench, strategy, int(np.argmax(counts)))
    return [
        ("bytes a client and round", f"up {size(up)}, down {size(down)}", "arrays as sent, 128 bytes of header each"),
        ("bytes of the run", f"up {size(trainings * up)}, down {size(trainings * down)}", f"{trainings} client rounds"),
        ("steps", f"{steps:,}", f"optimiser steps of the {trainings} client rounds that the seed draws"),
        ("base model", size(weights), "once in each process"),
        ("adapters, gradients, optimiser", size(trained * (2 + moments)), f"{2 + moments} × what is trained, float32"),
        ("activations of a step", size(activations), "saved for the backward pass; measured on the largest client"),
        (
            "this process now",
            size(psutil.Process().memory_info().rss),
            "resident, with model and data; a worker is alike",
        ),
    ]


def bytes_sent(state: ServerState, factors: str) -> int:
    """Bytes of one message with these factors of every layer and the head, if it is trained."""
    return messages.array_bytes(RecordDict({messages.ARRAYS: messages.pack(state.adapters, state.dense, factors)}))


def sent(state: ServerState, trains: str) -> list[Any]:
    """The arrays that a client sends: the trained factors of every layer, and the head if it is trained."""
    return [getattr(pair, f) for pair in state.adapters.values() for f in trains] + list(state.dense.values())


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

    bench.model.peft.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        bench.model.forward(bench.train.batch(indices, bench.model.device))
    return sum(kept.values())
