"""Datasets: what the federation's clients train on and what the server tests on.

A dataset is one module of this folder with a function `load(config, seed) -> Dataset`, and one file of the same name in
`configs/dataset/`; nothing else lists it. Importing this package loads no dataset library: each module imports its own
when it is called.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fedlora import check
from fedlora.check import ConfigError

if TYPE_CHECKING:
    from fedlora.config import DatasetConfig

HELPERS = {
    "domains",
    "labels",
    "partition",
}  # modules of this folder that define no dataset, besides those with a leading underscore


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


def names() -> list[str]:
    """The datasets there are, read from the folder without importing any of them."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if not name.startswith("_") and name not in HELPERS)


def check_files(config: DatasetConfig) -> None:
    """Whether the files that the settings name are there, at once: nothing of them is read and no library is loaded.

    Raises ConfigError where a file of `dataset.path` or `dataset.test` is missing, unreadable, a folder or a pipe, or has an
    ending that is not read; for `hub`, where `dataset.path` is written as a local folder and there is none.
    """
    from fedlora.data import _file

    named = {"dataset.path": config.path, "dataset.test": config.test}
    if config.name == "files":
        for setting, name in named.items():
            if name:  # a server of real devices has no training file
                _file.locate(setting, name)
    if config.name == "hub" and config.path is not None:
        _file.locate_folder("dataset.path", config.path)


def ordered(words: Iterable[str]) -> list[str]:
    """The distinct words, sorted; by value where all are integers, so that class "10" comes after class "9"."""
    distinct = sorted(set(words))
    try:
        return sorted(distinct, key=int)
    except ValueError:
        return distinct


def load(config: DatasetConfig, seed: int) -> Dataset:
    """The dataset that `config` names.

    `seed` is the run's, for datasets that are generated. Where the test set is split off, that split does not depend on
    it: runs with different seeds are tested on the same examples.

    Raises ConfigError where the name is unknown, the data cannot be read, or they cannot train and test a classifier.
    """
    check.one_of(names(), **{"dataset.name": config.name})
    dataset: Dataset = importlib.import_module(f"{__name__}.{config.name}").load(config, seed)
    if not config.classes:  # named, so that one device may have none of some, and its server no training data at all
        _check(config, dataset)
    if config.domains:
        from fedlora.data import domains

        return domains.spread(dataset, config.domains)
    return dataset


def _check(config: DatasetConfig, dataset: Dataset) -> None:
    if not len(dataset.train):
        raise ConfigError(f"dataset={config.name} has no training examples; name data that has some")
    if not len(dataset.test) and config.test_fraction:
        raise ConfigError(f"dataset={config.name} has no test examples; add examples or name a test set by dataset.test")
    trained = np.unique(dataset.train.labels)
    if len(trained) < 2:
        from fedlora.data.labels import quoted

        only = quoted(dataset.classes[trained[0]])
        raise ConfigError(f"dataset.label={config.label} has only the class {only}; a classifier needs two or more")
    unseen = np.setdiff1d(dataset.test.labels, trained)
    if len(unseen):
        raise ConfigError(
            f"dataset.label={config.label}: the class '{dataset.classes[unseen[0]]:.40}' of the test set has no training "
            "example; add some or remove it from the test set"
        )
