"""Base models: one file or folder here each, found by itself, with `load(config, dataset, seed) -> Base`.

Importing this package imports no model library; `load` does.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from fedlora import check

if TYPE_CHECKING:
    from fedlora.config import ModelConfig
    from fedlora.data import Dataset
    from fedlora.models.base import Base

# Modules of this package that are not models.
_PARTS = {"adapted", "base", "dropout", "encode", "layout", "prefix", "readout", "rows", "targets"}


def names() -> list[str]:
    """The names of all base models, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _PARTS)


def load(config: ModelConfig, dataset: Dataset, seed: int) -> Base:
    """The base model of that name, ready for `dataset`'s classes. Raises ConfigError where the two do not fit."""
    module = importlib.import_module(f"fedlora.models.{check.one_of(names(), **{'model.name': config.name})}")
    base: Base = module.load(config, dataset, seed)
    return base
