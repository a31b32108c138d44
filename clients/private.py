"""DP-SGD on a client, by Opacus: per-example gradients, clipping, noise; and the Poisson sampling they are accounted with.

One step takes each of the client's n examples with probability q = min(1, batch_size / n), clips each one's gradient over
all trained parameters together to norm C, adds N(0, (σC)²) to every coordinate of their sum, and divides by q·n.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn

from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.arrays.messages import rotation
from fedlora.check import RunError
from fedlora.compute.dropout import ByRecord, dropouts, dropped
from fedlora.compute.layout import Layout
from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded, moved
from fedlora.seeds import Stream

UNBOUNDED = 1e30  # stands for an infinite clip, which Opacus would multiply by σ = 0
GRID = 2**20  # steps, or up to twice as many, that the noise's standard deviation is divided into


@dataclass(frozen=True)
class Mechanism:
    """What one client's steps are made private with."""

    noise_multiplier: float  # σ; 0 clips only
    clip: float  # C, the bound on the norm of one record's gradient

    def descent(self, optimizer: torch.optim.Optimizer, expected: float, noise: Stream) -> PrivateDescent:
        """Private steps of an optimiser over one flat parameter, divided by `expected` = q·n, whole or not.

        `noise` is the stream of this one training.
        """
        (flat,) = optimizer.param_groups[0]["params"]
        return PrivateDescent(flat, NoisyOptimizer(optimizer, self, expected, noise))


class NoisyOptimizer(DPOptimizer):
    """Opacus' optimiser, which clips, adds up and divides; the noise is drawn from a `Stream` and added here.

    Guarantee: what comes of a clipped sum is the sum plus N(0, (σC)²) in every coordinate, rounded to a public grid of
    2⁻²⁰ to 2⁻²¹ σC. Sum and noise meet in float64, whose own grid is 2³⁰ times as fine. So the low bits of what is
    released tell nothing of how noise or sum were rounded, by which floating-point noise can be taken off (Mironov, CCS
    2012). σ = 0 adds nothing and rounds nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mechanism: Mechanism, expected: float, noise: Stream) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=min(mechanism.clip, UNBOUNDED),
            expected_batch_size=expected,
            loss_reduction="mean",
        )
        self.noise = noise

    def add_noise(self) -> None:
        """What Opacus' own does: the noisy sum is in `grad`, and the sum is marked as used."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = parameter.summed_grad
            _check_processed_flag(total)
            parameter.grad = self._noisy(total, std) if std else total.clone()
            _mark_as_processed(total)

    def _noisy(self, total: Tensor, std: float) -> Tensor:
        noise = moved(torch.from_numpy(self.noise.standard_normal(tuple(total.shape))), total.device)
        grid = 2.0 ** math.floor(math.log2(std)) / GRID
        return noise.mul_(std).add_(total).div_(grid).round_().mul_(grid).to(total.dtype)


@dataclass
class PrivateDescent:
    """From the gradients of single records to a noisy step: one flat parameter, so that Opacus has one array to go through.

    Guarantee: with σ = 0, adding or removing one record moves q·n times the step by at most C (times lr, for SGD); noise is
    drawn once in every step, of no record too.
    """

    flat: nn.Parameter  # (P,)
    optimizer: DPOptimizer
    norms: list[Tensor] = field(default_factory=list)  # of single records' gradients, before clipping; a diagnostic
    variance: float = 0.0  # of the noise in each coordinate so far, where it is known: plain SGD; a diagnostic
    noise: Tensor | None = None  # (P,) the noise itself, summed over the steps

    def take(self, gradients: Tensor, lr: float, last: bool = True) -> None:
        """Clips the records' gradients (records, P) and adds them up; with the last of a step, descends.

        A record whose gradient is not finite takes no part: Opacus would clip it to 0 · ∞ = NaN, and an update of NaN tells
        that the record is there.
        """
        norms = gradients.norm(dim=1)
        finite = torch.isfinite(norms)
        if finite.is_cuda or not finite.all():  # to ask would be to wait for the GPU
            gradients = torch.where(finite[:, None], gradients, 0)
        self.norms.append(norms)
        self.flat.grad_sample = gradients  # type: ignore[attr-defined]
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.signal_skip_step(do_skip=not last)
        self.optimizer.step()
        if last and plain(self.optimizer.original_optimizer):
            self._record_noise(lr)
        self.optimizer.zero_grad(set_to_none=True)

    def diagnose(self, layout: Layout, sent: Adapters, scale: float) -> dict[str, float]:
        """What no ε covers and a simulation may look at: docs/metrics.md has the formulas.

        Mean norm of single records' gradients, the share that was clipped, and, under plain SGD, the standard deviation of
        the noise in each coordinate, and how large that noise is in scale · B·A: as it was drawn, and as it is foretold.
        `sent` are the factors that the client began with, of which those that it trains have changed since.
        """
        norms = torch.cat(self.norms)
        norms = norms[torch.isfinite(norms)]
        clipped = norms > self.optimizer.max_grad_norm
        shared = {"gradient_norm": _mean(norms), "clipped": _mean(clipped.float())}
        if self.noise is None:
            return shared
        trained, noise = (layout.split(vector.detach().cpu().numpy()) for vector in (self.flat, self.noise))
        products = []
        for layer, pair in sent.items():
            if (between := rotation(layer)) in trained[1]:
                products.append(lowrank.noise_between(pair, noise[1][between], self.variance))
            else:
                zero = {f: np.zeros_like(array) for f, array in pair._asdict().items()}
                noisy, drawn_ = pair._asdict() | trained[0].get(layer, {}), zero | noise[0].get(layer, {})
                products.append(lowrank.noise(Pair(**noisy), Pair(**drawn_), self.variance))
        drawn, expected = (scale * math.sqrt(math.fsum(column)) for column in zip(*products, strict=True))
        return shared | {"noise_std": self.variance**0.5, "noise_product": drawn, "noise_product_expected": expected}

    def _record_noise(self, lr: float) -> None:
        """Adds this step's noise: Opacus leaves p.grad = (clipped sum + noise) / (q·n) and the sum in p.summed_grad."""
        expected = self.optimizer.expected_batch_size
        self.variance += (lr * self.optimizer.noise_multiplier * self.optimizer.max_grad_norm / expected) ** 2
        moved = torch.sub(self.flat.summed_grad / expected, self.flat.grad).mul_(lr)  # type: ignore[attr-defined, arg-type]
        self.noise = moved if self.noise is None else self.noise.add_(moved)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether noise passes through the optimiser as it is, scaled by lr: SGD without momentum, decay and proximal term."""
    group = optimizer.param_groups[0]
    shrinks = group.get("momentum") or group["weight_decay"] or optimizer._optimizer_step_pre_hooks
    return isinstance(optimizer, torch.optim.SGD) and not shrinks


@dataclass
class PrivateStep:
    """One step of DP-SGD on a batch, in forward passes of at most `physical` examples, the gradients by Opacus' hooks."""

    model: AdaptedModel
    examples: Encoded
    parameters: list[nn.Parameter]
    descent: PrivateDescent
    physical: int
    dropout: bytes  # 32, the key of this training's masks
    dropouts: list[nn.Dropout]
    step: int = 0

    def __call__(self, batch: np.ndarray, lr: float) -> Tensor:
        """Descend once; returns the losses of the records, shape (len(batch),), for diagnosis."""
        losses = []
        parts = [batch[start : start + self.physical] for start in range(0, len(batch), self.physical)]
        for number, part in enumerate(parts):
            inputs = self.examples.batch(part, self.model.device)
            with dropped(self.dropouts, ByRecord(self.dropout, self.step, part)):
                output = self.model.forward(inputs)
            output.loss.backward()  # the mean over the part, which the hooks take apart again
            losses.append(output.loss.detach().expand(len(part)))
            self.descent.take(self._gradients(len(part)), lr, last=number == len(parts) - 1)
        if not parts:
            self.descent.take(self.descent.flat.new_zeros((0, len(self.descent.flat))), lr)
        self.step += 1
        return torch.cat(losses) if losses else torch.zeros(0)

    def _gradients(self, records: int) -> Tensor:
        """The gradients of single records, (records, P); what the hooks hold is let go.

        Raises RunError where a layer's rows are not records (windowed attention): clipping them would bound no record.
        """
        rows = [parameter.grad_sample for parameter in self.parameters]  # type: ignore[attr-defined]
        if wrong := [len(each) for each in rows if len(each) != records]:
            raise rows_are_not_records(wrong[0], records)
        gradients = torch.cat([each.flatten(1) for each in rows], dim=1)
        for parameter in self.parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        return gradients


def rows_are_not_records(rows: int, records: int) -> RunError:
    """What to say where a trained layer sees other rows than records."""
    return RunError(
        f"a trained layer sees {rows} rows for {records} records, so clipping would bound no record; adapt other "
        "layers by adapter.target_modules (python -m fedlora.tools.selftest names them)"
    )


@contextmanager
def hooks(model: AdaptedModel) -> Iterator[None]:
    """While this lasts, a backward pass leaves the gradients of single records in `grad_sample` of what is trained."""
    with warnings.catch_warnings():
        # Opacus listens to the gradients of the outputs only, and torch says at every step that there are others.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        installed = GradSampleHooks(model.peft, loss_reduction="mean")
        try:
            yield
        finally:
            installed.cleanup()


@contextmanager
def hooked(
    model: AdaptedModel,
    examples: Encoded,
    parameters: list[nn.Parameter],
    descent: PrivateDescent,
    physical: int,
    dropout: bytes,
) -> Iterator[PrivateStep]:
    """A `PrivateStep`; Opacus' hooks sit in the model only as long as it lasts."""
    with hooks(model):
        yield PrivateStep(model, examples, parameters, descent, physical, dropout, dropouts(model.peft))


def flatten(parameters: list[nn.Parameter]) -> nn.Parameter:
    """One parameter (P,) that holds the numbers of all of these, which become views of it."""
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    for parameter, part in zip(parameters, flat.detach().split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    return flat
