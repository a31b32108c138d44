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

from clients.train import mean
from fedlora import seeds
from fedlora.check import RunError
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded


@dataclass(frozen=True)
class Mechanism:
    """What one client's steps are made private with."""

    noise_multiplier: float  # σ; 0 clips only
    clip: float  # C, the bound on the norm of one record's gradient


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
    variance: float = 0.0  # of the noise in each coordinate so far, where it is known: plain SGD; a diagnostic
    noise: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # the noise itself, summed over the steps

    def __call__(self, batch: np.ndarray) -> Tensor:
        """Descend once; returns the losses of the records, shape (len(batch),), for diagnosis."""
        losses = []
        parts = [batch[start : start + self.physical] for start in range(0, len(batch), self.physical)]
        for number, part in enumerate(parts):
            output = self.model.forward(self.examples.batch(part, self.model.device))
            output.loss.backward()  # the mean over the part, which the hooks take apart again
            losses.append(output.loss.detach().expand(len(part)))
            self._require_one_row_a_record(len(part))
            self.norms.append(self._bounded())
            self._step(last=number == len(parts) - 1)
        if not parts:
            for parameter in self.optimizer.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            self._step(last=True)
        return torch.cat(losses) if losses else torch.zeros(0)

    def _require_one_row_a_record(self, records: int) -> None:
        """Raises RunError where a layer's rows are not records (windowed attention): clipping them would bound no record."""
        for parameter in self.optimizer.params:
            rows = len(parameter.grad_sample)
            if rows != records:
                raise RunError(
                    f"a trained layer sees {rows} rows for {records} records, so clipping would bound no record; adapt other "
                    "layers by adapter.target_modules (python -m fedlora.privacy.selftest names them)"
                )

    def _bounded(self) -> Tensor:
        """The norms of the records' gradients, those that are not finite taken out of the step.

        Opacus would clip an infinite gradient to 0 · ∞ = NaN, and an update of NaN tells that the record is there.
        """
        norms = record_norms(self.optimizer.params)
        for parameter in self.optimizer.params:
            parameter.grad_sample[~torch.isfinite(norms)] = 0
        return norms[torch.isfinite(norms)].cpu()

    def diagnose(self) -> dict[str, float]:
        """What no ε covers and a simulation may look at: docs/metrics.md has the formulas.

        Mean norm of single records' gradients, the share that was clipped, and, under plain SGD, the standard deviation of
        the noise in each coordinate, and how large that noise is in B·A: as it was drawn, and as the formula foretells it.
        """
        norms = torch.cat([*self.norms, torch.zeros(0)])
        shared = {"gradient_norm": mean([norms]), "clipped": mean([(norms > self.optimizer.max_grad_norm).float()])}
        if not self.noise:
            return shared
        drawn, foretold = self.model.noise_in_products(self.noise, self.variance)
        return shared | {"noise_std": self.variance**0.5, "noise_product": drawn, "noise_product_expected": foretold}

    def _step(self, last: bool) -> None:
        self.optimizer.signal_skip_step(do_skip=not last)
        self.optimizer.step()
        if last and plain(self.optimizer.original_optimizer):
            self._record_noise()
        self.optimizer.zero_grad(set_to_none=True)

    def _record_noise(self) -> None:
        """Adds this step's noise: Opacus leaves p.grad = (clipped sum + noise) / (q·n) and the sum in p.summed_grad."""
        lr, expected = self.optimizer.param_groups[0]["lr"], self.optimizer.expected_batch_size
        self.variance += (lr * self.optimizer.noise_multiplier * self.optimizer.max_grad_norm / expected) ** 2
        for parameter in self.optimizer.params:
            moved = -lr * (parameter.grad - parameter.summed_grad / expected)
            self.noise[parameter] = self.noise.get(parameter, 0) + moved


def plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether noise passes through the optimiser as it is, scaled by lr: SGD without momentum and weight decay."""
    group = optimizer.param_groups[0]
    return isinstance(optimizer, torch.optim.SGD) and not group["momentum"] and not group["weight_decay"]


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
    expected: float,
    physical: int,
    streams: tuple[int, int, int],
) -> Iterator[PrivateStep]:
    """A `PrivateStep` that divides by `expected` = q·n, whole or not; the model's hooks are there only as long as it lasts."""
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
                    expected_batch_size=expected,
                    loss_reduction="mean",
                    generator=generator,
                ),
                physical,
            )
        finally:
            hooks.cleanup()
