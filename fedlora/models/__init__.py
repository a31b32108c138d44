"""Base models: one file or folder here each, found by itself, with `load(config, dataset, seed) -> Base`.

Importing this package imports no model library; `load` does.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora import check

if TYPE_CHECKING:
    from fedlora.config import ModelConfig
    from fedlora.data import Dataset
    from fedlora.models.base import Base

# Modules of this package that are not models.
_PARTS = {"adapted", "base", "dropout", "encode", "files", "layout", "prefix", "readout", "rows", "targets"}


def names() -> list[str]:
    """The names of all base models, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _PARTS)


def digest(config: ModelConfig) -> str:
    """SHA-256, in hexadecimal, of the checkpoint's files: weights, configuration and tokenizer; of a hub name its revision.

    A model with a folder of its own here, such as vit_digits, is that folder's files. Imports no torch; a file is read once a
    process, as long as it does not change. Raises ConfigError where there is no such checkpoint.
    """
    from fedlora.models import files

    check.one_of(names(), **{"model.name": config.name})
    folder = Path(__file__).parent / config.name
    return files.digest(str(folder) if folder.is_dir() else str(config.path))


def load(config: ModelConfig, dataset: Dataset, seed: int) -> Base:
    """The base model of that name, ready for `dataset`'s classes. Raises ConfigError where the two do not fit."""
    module = importlib.import_module(f"fedlora.models.{check.one_of(names(), **{'model.name': config.name})}")
    base: Base = module.load(config, dataset, seed)
    return base
