"""Examples as a model takes them: encoded once a process, cut into padded batches for every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PREFIX = "prefix"  # key of a batch: hidden states that the model need not compute (fedlora.compute.prefix)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for what a GPU still computes: the host goes on to the next batch meanwhile."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps pinned memory until the copy is done


@dataclass(frozen=True)
class Encoded:
    """Model-ready examples; a subclass says what a batch of them is."""

    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward pass for the examples at `indices`, labels among them."""
        chosen = torch.from_numpy(np.asarray(indices))
        inputs = self.inputs(chosen) | {"labels": self.labels[chosen]}
        return {name: moved(tensor, device) for name, tensor in inputs.items()}

    def inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        """The inputs without the labels."""
        raise NotImplementedError

    def lengths(self) -> np.ndarray | None:
        """The positions that each example has by itself (N,); None where all have the same."""
        return None


@dataclass(frozen=True)
class Images(Encoded):
    """Pixels of one size, normalised as the model expects."""

    pixels: Tensor  # (N, C, H, W) float32

    def inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        """`pixel_values` (n, C, H, W)."""
        return {"pixel_values": self.pixels[chosen]}


@dataclass(frozen=True)
class Texts(Encoded):
    """Token ids of their own lengths, padded only to the longest of a batch."""

    tokens: Sequence[np.ndarray]  # N arrays of ids
    padding: int  # id of the padding token

    def lengths(self) -> np.ndarray:
        """The number of tokens of each example (N,)."""
        return np.array([len(row) for row in self.tokens])

    def inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, both (n, longest of the batch)."""
        rows = [self.tokens[i] for i in chosen.tolist()]
        shape = (len(rows), max((len(row) for row in rows), default=0))
        ids, mask = np.full(shape, self.padding, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
