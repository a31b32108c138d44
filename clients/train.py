"""Local training: from the broadcast, a client's own examples and its own random streams to its update."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from fedlora import seeds
from fedlora.config import TrainConfig
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded


def train(
    model: AdaptedModel,
    examples: Encoded,
    indices: np.ndarray,
    settings: TrainConfig,
    trains: str,
    progress: tuple[int, int],
    streams: tuple[int, int, int],
) -> dict[str, float]:
    """Train the named factors (and the head, if it is trained) on the client's examples, in place.

    `progress` is (round from 1, rounds), for the learning rate's schedule; `streams` is (run seed, client, round).
    Returns the mean loss of the local steps and their number.
    """
    seed, client, round = streams
    parameters = model.trainable(trains)
    optimizer = make_optimizer(parameters, settings)
    steps = local_steps(settings, len(indices))
    rng = seeds.stream(seed, "batches", client, round)
    losses = []
    model.peft.train()
    with torch.random.fork_rng():  # dropout draws from torch's global generator
        torch.manual_seed(seeds.torch_seed(seed, "dropout", client, round))
        for step, batch in enumerate(batches(indices, settings.batch_size, steps, rng)):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate(settings, progress, step / steps)
            loss = model.forward(examples.batch(batch, model.device)).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
    return {"loss": float(torch.stack(losses).mean()), "steps": float(steps)}


def local_steps(settings: TrainConfig, examples: int) -> int:
    """Optimiser steps of a client with so many examples in one round."""
    if settings.epochs is not None:
        return settings.epochs * math.ceil(examples / settings.batch_size)
    assert settings.steps is not None  # the configuration was checked
    return settings.steps


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
