"""The frozen prefix: where adapters sit in upper blocks only, what the blocks below make of an example never changes.

    embeddings → block 0 → … → block f−1 │ block f → … → head        f: the first block with an adapter
                 computed once an example│ every step, from what was kept

Exact, up to the rounding of other batches. What is kept depends on the examples and the limit alone, not on the order in
which they are asked for: examples are computed in fixed neighbourhoods, and those beyond the limit anew in every batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import PREFIX, Encoded

NEIGHBOURS = 64  # examples that are computed together
TOLERANCE = 1e-3  # of the logits, beyond which a model does not take a prefix as it should; at least ten roundings


class _Reached(Exception):
    """The pass has come to the first block with an adapter."""


class Prefix:
    """The blocks below the adapters of a model; `refusal` says why there is nothing to keep ("" if there is)."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model = model
        self.blocks, self.first = blocks(model)
        self.refusal = ""
        if model.base_dropout:
            self.refusal = "model.dropout=true makes something else of an example every time"
        elif not self.first:
            self.refusal = "an adapter sits in the first block; adapter.layers chooses others"

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """What the blocks below the adapters make of these inputs: (N, T, H)."""
        found: list[Tensor] = []

        def reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        hook = self.blocks[self.first].register_forward_pre_hook(reach, with_kwargs=True)
        try:
            self.model.peft(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]

    @contextmanager
    def replaced_by(self, hidden: Tensor) -> Iterator[None]:
        """While this lasts, the blocks below do nothing and the first one above them is given `hidden` (N, T, H)."""

        def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        hook = self.blocks[self.first].register_forward_pre_hook(give, with_kwargs=True)
        below = [self.blocks[i] for i in range(self.first)]
        for block in below:
            block.forward = _pass
        try:
            yield
        finally:
            hook.remove()
            for block in below:
                del block.forward

    def kept(self, examples: Encoded, limit: float) -> Encoded:
        """The same examples, whose batches bring their prefix, up to `limit` bytes of them.

        Where there is nothing to keep, or where the model does not work with it, they come back as they are.
        """
        if self.refusal or not limit or not len(examples):
            return examples
        kept = Kept(examples.labels, examples, self, limit)
        self.refusal = self._try(examples, kept)
        return examples if self.refusal else kept

    def _try(self, examples: Encoded, kept: Encoded) -> str:
        """What is against keeping; on batches of two and of three, since a batch unpacks as a tuple of its length does."""
        self.model.peft.eval()
        self.model.trainable("AB")
        try:
            if self.hidden(examples.batch(np.zeros(1, np.int64), self.model.device)).requires_grad:
                return "something that is trained lies below the first adapter"
            with torch.no_grad():
                same = all(self._agree(examples, kept, np.arange(count) % len(examples)) for count in (2, 3))
        except Exception:  # whatever the blocks above make of inputs that they do not expect
            same = False
        finally:
            self.model.freeze()
        return "" if same else f"{type(self.blocks[0]).__name__} hands on more than its hidden states"

    def _agree(self, examples: Encoded, kept: Encoded, indices: np.ndarray) -> bool:
        usual, ours = (self.model.forward(e.batch(indices, self.model.device)).logits for e in (examples, kept))
        tolerance = max(TOLERANCE, 10 * torch.finfo(next(self.blocks.parameters()).dtype).eps)
        return torch.allclose(usual, ours, rtol=tolerance, atol=tolerance * float(usual.abs().max()))


@dataclass(frozen=True)
class Kept(Encoded):
    """Examples with what the frozen prefix makes of them."""

    examples: Encoded
    prefix: Prefix
    limit: float  # bytes

    def batch(self, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """As that of the examples, with their hidden states (n, T, H) before the first adapted block."""
        batch = self.examples.batch(indices, device)
        indices = np.asarray(indices)
        for chunk in np.unique(indices[indices < self._capacity] // NEIGHBOURS):
            if int(chunk) not in self._computed:
                self._computed[int(chunk)] = self._compute(int(chunk), device)
        beyond = indices[indices >= self._capacity]
        anew = iter(self._rows(beyond, device) if len(beyond) else ())
        rows = [self._computed[i // NEIGHBOURS][i % NEIGHBOURS] if i < self._capacity else next(anew) for i in indices.tolist()]
        return batch | {PREFIX: pad_sequence(rows, batch_first=True)} if rows else batch

    @cached_property
    def _computed(self) -> dict[int, list[Tensor]]:
        """Number of a neighbourhood → the hidden states (T, H) of its examples."""
        return {}

    @cached_property
    def _lengths(self) -> np.ndarray | None:
        return self.examples.lengths()

    @cached_property
    def _capacity(self) -> int:
        """The examples before this one are kept: as many as the limit has room for."""
        row = self._rows(np.arange(1), self.prefix.model.device)[0]
        positions = np.full(len(self.examples), len(row)) if self._lengths is None else self._lengths
        sizes = np.cumsum(positions) * row[0].nbytes
        whole = int(np.searchsorted(sizes, self.limit, side="right"))
        return whole if whole == len(self.examples) else whole // NEIGHBOURS * NEIGHBOURS

    def _compute(self, chunk: int, device: torch.device) -> list[Tensor]:
        return self._rows(np.arange(chunk * NEIGHBOURS, min((chunk + 1) * NEIGHBOURS, len(self.examples))), device)

    def _rows(self, indices: np.ndarray, device: torch.device) -> list[Tensor]:
        with torch.no_grad():
            hidden = self.prefix.hidden(self.examples.batch(indices, device))
        if self._lengths is None:
            return list(hidden)
        return [row[:length].clone() for row, length in zip(hidden, self._lengths[indices], strict=True)]


def _pass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def blocks(model: AdaptedModel) -> tuple[nn.ModuleList, int]:
    """The list of blocks that the adapters are in, and the first with one; an empty list and 0 where they are elsewhere."""
    names = [re.fullmatch(r"(.*?)\.(\d+)\.(.*)", layer) for layer in model.layers]
    lists = {match[1] for match in names if match}
    if len(lists) != 1 or not all(names):
        return nn.ModuleList(), 0
    blocks = model.peft.get_submodule(lists.pop())
    if not isinstance(blocks, nn.ModuleList):
        return nn.ModuleList(), 0
    return blocks, min(int(match[2]) for match in names if match)
