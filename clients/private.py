"""DP-SGD on a client, by Opacus: per-example gradients, clipping, noise; and the Poisson sampling they are accounted with.

One step takes each of the client's n examples with probability q = min(1, batch_size / n), clips each one's gradient over
all trained parameters together to norm C, adds N(0, (σC)²) to every coordinate of their sum, and divides by q·n.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from clients.train import mean, sampling_rate
from fedlora import seeds
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded


@dataclass(frozen=True)
class Mechanism:
    """What one client's steps are made private with."""

    noise_multiplier: float  # σ; 0 clips only
    clip: float  # C, the bound on the norm of one record's gradient
    batch_size: int  # expected size of a batch

    def rate(self, examples: int) -> float:
        """q, the probability with which a step takes each of a client's `examples`."""
        return sampling_rate(self.batch_size, examples)


def poisson(indices: np.ndarray, rate: float, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`steps` batches that take each index with probability `rate`, independently; a batch may be empty.

    Guarantee: the sampling that the accountants of `fedlora.privacy` assume, with q exactly `rate`.
    """
    for _ in range(steps):
        yield indices[rng.random(len(indices)) < rate]


@dataclass
class PrivateStep:
    """One step of DP-SGD on a batch, in forward passes of at most `physical` examples.

    Guarantee: with σ = 0, adding or removing one record moves q·n times the step by at most C (times lr, for SGD); noise is
    drawn in every step, on an empty batch too, from the stream (seed, noise, client, round).
    """

    model: AdaptedModel
    examples: Encoded
    optimizer: DPOptimizer
    physical: int
    norms: list[Tensor] = field(default_factory=list)  # of single records' gradients, before clipping; a diagnostic

    def __call__(self, batch: np.ndarray) -> Tensor:
        """Descend once; returns the losses of the records, shape (len(batch),), for diagnosis."""
        losses = []
        parts = [batch[start : start + self.physical] for start in range(0, len(batch), self.physical)]
        for number, part in enumerate(parts):
            output = self.model.forward(self.examples.batch(part, self.model.device))
            output.loss.backward()  # the mean over the part, which the hooks take apart again
            losses.append(output.loss.detach().expand(len(part)))
            self.norms.append(record_norms(self.optimizer.params))
            self._step(last=number == len(parts) - 1)
        if not parts:
            for parameter in self.optimizer.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            self._step(last=True)
        return torch.cat(losses) if losses else torch.zeros(0)

    def diagnose(self) -> dict[str, float]:
        """Mean norm of single records' gradients and the share that was clipped; not private, for simulations only."""
        norms = torch.cat([*self.norms, torch.zeros(0)])
        return {"gradient_norm": mean([norms]), "clipped": mean([(norms > self.optimizer.max_grad_norm).float()])}

    def _step(self, last: bool) -> None:
        self.optimizer.signal_skip_step(do_skip=not last)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def record_norms(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of each record's gradient over all parameters together, from Opacus' grad_sample: shape (batch,)."""
    each = [parameter.grad_sample.flatten(1).norm(dim=1) for parameter in parameters]  # type: ignore[attr-defined]
    return torch.stack(each).norm(dim=0)


@contextmanager
def private_step(
    model: AdaptedModel,
    examples: Encoded,
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
    count: int,
    physical: int,
    streams: tuple[int, int, int],
) -> Iterator[PrivateStep]:
    """A `PrivateStep` for a client with `count` examples; the model's hooks are there only as long as this lasts."""
    seed, client, round = streams
    generator = torch.Generator(device=model.device)
    generator.manual_seed(seeds.torch_seed(seed, "noise", client, round))
    with warnings.catch_warnings():
        # Opacus listens to the gradients of the outputs only, and torch says at every step that there are others.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        hooks = GradSampleHooks(model.peft, loss_reduction="mean")
        try:
            yield PrivateStep(
                model,
                examples,
                DPOptimizer(
                    optimizer,
                    noise_multiplier=mechanism.noise_multiplier,
                    max_grad_norm=mechanism.clip,
                    expected_batch_size=mechanism.rate(count) * count,
                    loss_reduction="mean",
                    generator=generator,
                ),
                physical,
            )
        finally:
            hooks.cleanup()
