"""Base models: one file or folder here each, found by itself, with `load(config, dataset, seed) -> Base`.

Importing this package imports no model library; `load` does.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlora import check

if TYPE_CHECKING:
    from fedlora.config import ModelConfig
    from fedlora.data import Dataset, Examples
    from fedlora.models.base import Base
    from fedlora.models.encode import Encoded

# Modules of this package that are not models.
_PARTS = {
    *("adapted", "base", "encode", "export", "files", "heads", "pretrained", "reading", "targets", "tokens", "trial"),
}


def names() -> list[str]:
    """The names of all base models, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _PARTS)


def digest(config: ModelConfig) -> str:
    """SHA-256, in hexadecimal, of the checkpoint's files: weights, configuration and tokenizer; of a hub name its revision.

    A model with a folder of its own here, such as vit_digits, is that folder's files. One that reads no checkpoint is its code.
    Imports no torch; a file is read once a process, as long as it does not change. Raises ConfigError where there is no such
    checkpoint.
    """
    from fedlora.models import files

    check.one_of(names(), **{"model.name": config.name})
    own = Path(__file__).parent / config.name
    if own.is_dir():
        return files.digest(str(own))
    return files.digest_of(own.with_suffix(".py")) if config.path is None else files.digest(config.path)


def load(config: ModelConfig, dataset: Dataset, seed: int) -> Base:
    """The base model of that name, ready for `dataset`'s classes. Raises ConfigError where the two do not fit."""
    module = importlib.import_module(f"fedlora.models.{check.one_of(names(), **{'model.name': config.name})}")
    base: Base = module.load(config, dataset, seed)
    base.classes = base.classes or list(dataset.classes)
    base.head = base.head or ("drawn at random" if base.new else "the model has one")
    if base.classes != dataset.classes:
        base.encode = _in_order(base, dataset)
    return base


def _in_order(base: Base, dataset: Dataset) -> Callable[[Examples], Encoded]:
    """The encoding with labels that count as the checkpoint's logits do, instead of as the dataset's classes."""
    encode, places = base.encode, np.array([base.classes.index(name) for name in dataset.classes], dtype=np.int64)
    return lambda examples: encode(replace(examples, labels=places[examples.labels]))
