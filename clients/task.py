"""What one client has to do in one round: its batches, its learning rates, its optimiser, each from its own streams."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedlora import seeds
from fedlora.config import TrainConfig

if TYPE_CHECKING:
    from clients.private import Mechanism


@dataclass(frozen=True)
class Task:
    """A client's local training, apart from the arrays that it starts from."""

    indices: np.ndarray  # of its training examples
    settings: TrainConfig
    trains: str  # "AB", "B" or "A"
    progress: tuple[int, int]  # (round from 1, rounds), for the learning rate's schedule
    streams: tuple[int, int, int]  # (run seed, client, round)
    mechanism: Mechanism | None = None  # what makes every step private
    # A device's own seed, hidden from the server, and the number of the round in its own count, which never comes twice:
    # they take the places of the run's seed and round in the streams that privacy rests on.
    secret: tuple[int, int] | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps of this round."""
        return local_steps(self.settings, len(self.indices))

    @property
    def rate(self) -> float:
        """q, the probability with which a Poisson batch takes each example."""
        return sampling_rate(self.settings.batch_size, len(self.indices))

    @property
    def by_chance(self) -> bool:
        """Whether batches are Poisson samples; a private step's always are."""
        return self.mechanism is not None or self.settings.sampling == "poisson"

    @property
    def expected(self) -> float | None:
        """q·n, what the sum over a Poisson batch is divided by; None: by the examples that there are."""
        return self.rate * len(self.indices) if self.by_chance else None

    def batches(self) -> Iterator[np.ndarray]:
        """The indices of every step's examples, from the stream (seed, batches, client, round)."""
        rng = seeds.stream(*self._stream("batches"))
        if self.by_chance:
            return poisson(self.indices, self.rate, self.steps, rng)
        return batches(self.indices, self.settings.batch_size, self.steps, rng)

    def seed(self, purpose: str) -> int:
        """The seed of this client's and round's stream of torch for `purpose` (noise, dropout)."""
        return seeds.torch_seed(*self._stream(purpose))

    def _stream(self, purpose: str) -> tuple[int, str, int, int]:
        seed, client, round = self.streams
        if self.secret is not None and purpose in ("batches", "noise"):
            seed, round = self.secret
        return seed, purpose, client, round

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.settings.lr * rate(self.settings, self.progress, step / self.steps)

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser: a client keeps no momentum from one round to the next.

        With `proximal` = μ every step descends on loss + μ/2 ‖x − x0‖² too, x0 the numbers that the parameters have now
        (FedProx; Li et al., MLSys 2020). That term is added to what comes out of clipping and noise, so it costs no privacy.
        """
        settings = self.settings
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
            )
        if settings.proximal:
            start = [parameter.detach().clone() for parameter in parameters]

            def pull(*_: object) -> None:
                for parameter, begun in zip(parameters, start, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - begun, alpha=settings.proximal)

            optimizer.register_step_pre_hook(pull)
        return optimizer


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
