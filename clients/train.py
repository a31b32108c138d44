"""Local training: from the broadcast, a client's own examples and its own random streams to its update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from clients.task import Task, simulated_key
from fedlora.compute.layout import Layout
from fedlora.config import TrainConfig
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded

if TYPE_CHECKING:
    from clients.private import Mechanism


def train(
    model: AdaptedModel,
    examples: Encoded,
    indices: np.ndarray,
    settings: TrainConfig,
    trains: str,
    progress: tuple[int, int],
    streams: tuple[int, int, int],
    mechanism: Mechanism | None = None,
) -> dict[str, float]:
    """Train the named factors (and the head, if it is trained) on the client's examples, in place.

    `progress` is (round from 1, rounds), for the learning rate's schedule; `streams` is (run seed, client, round);
    `mechanism` makes every step private, with the key of a simulation. Returns the mean loss of the local steps and their
    number; with a mechanism also the mean norm of single records' gradients and the share that was clipped. These are
    diagnostics of a simulation: they are computed from private records and no ε covers them.
    """
    key = None if mechanism is None else simulated_key(streams, "", mechanism)
    return perform(Task(indices, settings, trains, progress, streams, mechanism, key), model, examples)


def perform(task: Task, model: AdaptedModel, examples: Encoded) -> dict[str, float]:
    """One client by itself, in place: the plain path, which `clients.cohort` must agree with. Returns what `train` does."""
    with torch.random.fork_rng():  # dropout draws from torch's global generator
        torch.manual_seed(task.dropout_seed())
        losses, diagnosis = (plain if task.mechanism is None else private)(task, model, examples)
    return {"loss": mean(losses), "steps": float(task.steps)} | diagnosis


def private(task: Task, model: AdaptedModel, examples: Encoded) -> tuple[list[Tensor], dict[str, float]]:
    """Steps of DP-SGD; returns the records' losses, step by step, and the diagnosis."""
    from clients.private import flatten, hooked  # Opacus takes a second to load

    assert task.mechanism is not None and task.expected is not None
    parameters, sent = model.trainable(task.trains), model.adapters()
    model.train_mode()
    descent = task.mechanism.descent(task.optimizer([flatten(parameters)]), task.expected, task.noise())
    physical = task.settings.physical_batch_size or len(task.indices)
    with hooked(model, examples, parameters, descent, physical, task.derived("dropout")) as descend:
        losses = [descend(batch, task.lr(step)) for step, batch in enumerate(task.batches())]
    return losses, descent.diagnose(Layout.of(sent, model.dense(), task.trains), sent, model.scale_written)


def plain(task: Task, model: AdaptedModel, examples: Encoded) -> tuple[list[Tensor], dict[str, float]]:
    """Steps without privacy, in forward passes of at most `physical_batch_size` examples; returns their losses, (1,) each."""
    parameters, settings, losses = model.trainable(task.trains), task.settings, []
    model.train_mode()
    optimizer, physical = task.optimizer(parameters), settings.physical_batch_size or len(task.indices)
    for step, batch in enumerate(task.batches()):
        total = torch.zeros(1)
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(batch), physical):
            part = batch[start : start + physical]
            share = len(part) / (task.expected or len(batch))
            loss = model.forward(examples.batch(part, model.device)).loss * share
            loss.backward()
            total += loss.detach().cpu()
        if not len(batch):  # an empty draw is a step too: weight decay and moments act
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        if settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.param_groups[0]["lr"] = task.lr(step)
        optimizer.step()
        losses.append(total)
    return losses, {}


def mean(parts: list[Tensor]) -> float:
    """The mean of all entries; 0 where there are none (every Poisson batch of a round may be empty)."""
    values = torch.cat([part.cpu() for part in parts])
    return float(values.mean()) if len(values) else 0.0
