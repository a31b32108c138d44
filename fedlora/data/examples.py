"""What a dataset is: examples in a fixed order, and the classes of their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Examples:
    """N examples in a fixed order; a client's data is a `take` of them."""

    inputs: list[str] | np.ndarray | list[np.ndarray]
    """Text; or images, float32 in [0, 1], channels last: (N, H, W, C), or a list of (H, W, C) where sizes differ."""
    labels: np.ndarray
    """(N,) int64, index into `Dataset.classes`."""
    groups: np.ndarray | None = None
    """(N,) natural client ids or domains, where the dataset has them."""

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Examples:
        """The examples at `indices` (n,), in that order."""
        inputs = self.inputs
        return Examples(
            inputs=inputs[indices] if isinstance(inputs, np.ndarray) else [inputs[i] for i in indices],
            labels=self.labels[indices],
            groups=None if self.groups is None else self.groups[indices],
        )


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training examples, to be dealt out to clients, and test examples, which the server keeps."""

    kind: str
    """"text" or "image"."""
    classes: list[str]
    """Names of the labels, in the order that `dataset.classes` or a ClassLabel says, else as `ordered` sorts them."""
    train: Examples
    test: Examples

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the examples as they were read: texts or pixels, labels, groups, names of the classes."""
        found = hashlib.sha256()
        for part in (self.kind, *self.classes, "train", *_parts(self.train), "test", *_parts(self.test)):
            content = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
            found.update(len(content).to_bytes(8, "big"))  # so that ("ab", "c") is not ("a", "bc")
            found.update(content)
        return found.hexdigest()


def _parts(examples: Examples) -> Iterator[str | bytes]:
    """All that training and tests see of the examples, in their order."""
    arrays = [examples.inputs] if isinstance(examples.inputs, np.ndarray) else examples.inputs
    for part in (*arrays, examples.labels):
        if isinstance(part, str):
            yield part
        else:
            yield f"{part.dtype.str} {part.shape}"
            yield part.tobytes()
    yield from ["no groups"] if examples.groups is None else ["groups", *map(str, examples.groups.tolist())]


def ordered(words: Iterable[str]) -> list[str]:
    """The distinct words, sorted; by value where all are integers, so that class "10" comes after class "9"."""
    distinct = sorted(set(words))
    try:
        return sorted(distinct, key=int)
    except ValueError:
        return distinct
