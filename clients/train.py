"""Local training: from the broadcast, a client's own examples and its own random streams to its update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.config import TrainConfig
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded

if TYPE_CHECKING:
    from clients.private import Mechanism, PrivateStep


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
    `mechanism` makes every step private. Returns the mean loss of the local steps and their number; with a mechanism also
    the mean norm of single records' gradients and the share that was clipped. These are diagnostics of a simulation: they
    are computed from private records and no ε covers them.
    """
    seed, client, round = streams
    parameters = model.trainable(trains)
    optimizer = make_optimizer(parameters, settings)
    steps, physical = local_steps(settings, len(indices)), settings.physical_batch_size or len(indices)
    rng = seeds.stream(seed, "batches", client, round)
    losses: list[Tensor] = []
    model.train_mode()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())  # dropout draws from torch's global generator
        torch.manual_seed(seeds.torch_seed(seed, "dropout", client, round))
        q = sampling_rate(settings.batch_size, len(indices))
        expected = q * len(indices)
        by_chance = mechanism is not None or settings.sampling == "poisson"
        draws = poisson(indices, q, steps, rng) if by_chance else batches(indices, settings.batch_size, steps, rng)
        descend: PlainStep | PrivateStep
        if mechanism is None:
            descend = PlainStep(
                model, examples, parameters, optimizer, settings.max_grad_norm, physical, expected if by_chance else None
            )
        else:
            from clients.private import private_step

            private = private_step(model, examples, optimizer, mechanism, expected, physical, streams)
            descend = stack.enter_context(private)
        for step, batch in enumerate(draws):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate(settings, progress, step / steps)
            losses.append(descend(batch))
        return {"loss": mean(losses), "steps": float(steps)} | descend.diagnose()


@dataclass
class PlainStep:
    """One optimiser step on a batch, in forward passes of at most `physical` examples."""

    model: AdaptedModel
    examples: Encoded
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None
    physical: int
    expected: float | None = None  # what the sum over a Poisson batch is divided by; none: the examples there are

    def __call__(self, batch: np.ndarray) -> Tensor:
        """Descend once; returns the batch's loss over what it is divided by, shape (1,)."""
        total = torch.zeros(1)
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(batch), self.physical):
            part = batch[start : start + self.physical]
            loss = self.model.forward(self.examples.batch(part, self.model.device)).loss * (
                len(part) / (self.expected or len(batch))
            )
            loss.backward()
            total += loss.detach().cpu()
        for parameter in self.parameters if not len(batch) else ():
            parameter.grad = torch.zeros_like(parameter)  # an empty draw is a step too: weight decay and moments act
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        return total

    def diagnose(self) -> dict[str, float]:
        """Nothing beyond the loss."""
        return {}


def mean(parts: list[Tensor]) -> float:
    """The mean of all entries; 0 where there are none (every Poisson batch of a round may be empty)."""
    values = torch.cat([part.cpu() for part in parts])
    return float(values.mean()) if len(values) else 0.0


def local_steps(settings: TrainConfig, examples: int) -> int:
    """Optimiser steps of a client with so many examples in one round."""
    if settings.epochs is not None:
        return settings.epochs * math.ceil(examples / settings.batch_size)
    assert settings.steps is not None  # the configuration was checked
    return settings.steps


def sampling_rate(batch_size: int, examples: int) -> float:
    """q = min(1, batch_size / examples), the Poisson rate of a private step."""
    return min(1.0, batch_size / examples)


def poisson(indices: np.ndarray, rate: float, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`steps` batches that take each index with probability `rate`, independently; a batch may be empty.

    Guarantee: the sampling that the accountants of `fedlora.privacy` assume, with q exactly `rate`.
    """
    for _ in range(steps):
        yield indices[rng.random(len(indices)) < rate]


def batches(indices: np.ndarray, size: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`steps` batches from passes over the shuffled examples; the last batch of a pass may be smaller."""
    done = 0
    while done < steps:
        order = rng.permutation(indices)
        for start in range(0, len(order), size):
            if done == steps:
                return
            yield order[start : start + size]
            done += 1


def rate(settings: TrainConfig, progress: tuple[int, int], within: float) -> float:
    """The factor on lr at the share `within` of a round: warm-up from 0, then constant, linear or cosine decay to 0."""
    round, rounds = progress
    done = (round - 1 + within) / rounds  # share of the whole run, in [0, 1)
    if done < settings.warmup:
        return done / settings.warmup
    left = (1 - done) / (1 - settings.warmup)
    return {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}[settings.schedule]


def make_optimizer(parameters: list[nn.Parameter], settings: TrainConfig) -> torch.optim.Optimizer:
    """A fresh optimiser: a client keeps no momentum from one round to the next."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
