"""Dropout on the adapters' inputs: its masks, by place in a pass or by record.

A mask that belongs to a place falls on another record as soon as one record of the batch is missing. One record then
changes the gradients of many, and clipping each of them bounds nothing. So where records are protected, each has masks of
its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.check import RunError


class Masks(Protocol):
    """Where the masks of some rows of a pass come from."""

    def fill(self, mask: Tensor, share: float, call: int) -> None:
        """Writes into `mask` (rows, …) 0 with probability `share`, else 1, for the adapters' `call`-th call in this pass."""


@dataclass(frozen=True)
class ByPlace:
    """Masks drawn one after the other, row by row."""

    generator: torch.Generator
    positions: int | None  # of the longest row's own example, so that padding draws nothing; None: all

    def fill(self, mask: Tensor, share: float, call: int) -> None:
        """See `Masks`; what is padded becomes what it was."""
        mask[:, : self.positions].bernoulli_(1 - share, generator=self.generator)


@dataclass(frozen=True)
class ByRecord:
    """Masks of one step of a private training, whose rows are these records.

    Guarantee: a record's mask depends on the key, the step, the record and the call, and on nothing else in the batch: not
    on other records, micro-batches or padding (a longer mask begins with the shorter one). Masks of two records, steps or
    calls are independent, and whoever lacks the key does not know them.
    """

    key: bytes  # 32, of the training's dropout
    step: int
    records: np.ndarray  # (rows,) their indices

    def fill(self, mask: Tensor, share: float, call: int) -> None:
        """See `Masks`. Raises RunError where the layer's rows are not the records."""
        if len(mask) != len(self.records):
            raise RunError(
                f"adapter.dropout={share:g} is drawn record by record, and a layer sees {len(mask)} rows for "
                f"{len(self.records)} records; set adapter.dropout=0, or adapt other layers by adapter.target_modules"
            )
        width = mask[0].numel()
        streams = [seeds.Stream(seeds.derive(self.key, self.step, int(record), call)) for record in self.records]
        kept = np.stack([stream.words(width, "<u4") for stream in streams]) >= round(share * 2**32)
        mask.copy_(torch.from_numpy(kept).view(mask.shape))


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    """The modules by which PEFT drops the adapters' inputs."""
    named = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    return [module for module in named if isinstance(module, nn.Dropout)]


@contextmanager
def dropped(modules: Sequence[nn.Dropout], masks: Masks) -> Iterator[None]:
    """While this lasts, those of the modules that act take these masks for a pass, in the order of their calls."""
    acting: list[Any] = [module for module in modules if module.training and module.p]
    calls = itertools.count(1)

    def forward(share: float) -> Any:
        def drop(x: Tensor) -> Tensor:
            mask = torch.empty_like(x)
            masks.fill(mask, share, next(calls))
            return x * mask.div_(1 - share)

        return drop

    for module in acting:
        module.forward = forward(module.p)
    try:
        yield
    finally:
        for module in acting:
            del module.forward
