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
    key: bytes | None = None  # 32 bytes of this training's own, that a private one's batches, noise and dropout come from

    def __post_init__(self) -> None:
        """Raises ValueError for a private task without a key, and for a key that nothing rests on."""
        if (self.mechanism is None) != (self.key is None):
            raise ValueError("a private task has a key of its own, and a plain one has none")

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
        """The indices of every step's examples.

        A private task draws them by its key, a plain one from the stream (seed, batches, client, round).
        """
        seed, client, round = self.streams
        rng = seeds.stream(seed, "batches", client, round) if self.key is None else seeds.Stream(self.derived("batches"))
        if self.by_chance:
            return poisson(self.indices, self.rate, self.steps, rng)
        assert isinstance(rng, np.random.Generator)
        return batches(self.indices, self.settings.batch_size, self.steps, rng)

    def noise(self) -> seeds.Stream:
        """The stream of a private task's noise, from its beginning."""
        return seeds.Stream(self.derived("noise"))

    def derived(self, purpose: str) -> bytes:
        """The key (32 bytes) of a private task's `purpose`: batches, noise or dropout."""
        assert self.key is not None
        return seeds.derive(self.key, purpose)

    def dropout_seed(self) -> int:
        """The seed of torch's generator for a plain task's dropout."""
        seed, client, round = self.streams
        return seeds.torch_seed(seed, "dropout", client, round)

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


def simulated_key(streams: tuple[int, int, int], identity: str, mechanism: Mechanism) -> bytes:
    """The key of one private training of a simulation: of (run seed, client, round), the run's identity, σ and C.

    Whoever knows these knows all that is drawn. Runs that differ in any setting have unrelated batches and noise.
    """
    return seeds.private_key("training", *streams, identity, float(mechanism.noise_multiplier), float(mechanism.clip))


def local_steps(settings: TrainConfig, examples: int) -> int:
    """Optimiser steps of a client with so many examples in one round."""
    if settings.epochs is not None:
        return settings.epochs * math.ceil(examples / settings.batch_size)
    assert settings.steps is not None  # the configuration was checked
    return settings.steps


def sampling_rate(batch_size: int, examples: int) -> float:
    """q = min(1, batch_size / examples), the Poisson rate of a private step."""
    return min(1.0, batch_size / examples)


def poisson(indices: np.ndarray, rate: float, steps: int, rng: np.random.Generator | seeds.Stream) -> Iterator[np.ndarray]:
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
