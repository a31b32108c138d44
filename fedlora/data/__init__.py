"""Datasets: what the federation's clients train on and what the server tests on.

A dataset is one module of this folder with a function `load(config, seed) -> Dataset`, and one file of the same name in
`configs/dataset/`; nothing else lists it. Importing this package loads no dataset library: each module imports its own
when it is called.
"""

from __future__ import annotations

import importlib
import pkgutil

import numpy as np

from fedlora import check
from fedlora.check import ConfigError
from fedlora.config import DatasetConfig
from fedlora.data.examples import Dataset, Examples

__all__ = ["Dataset", "Examples", "check_files", "load", "names"]

# Modules of this folder that define no dataset, besides those with a leading underscore.
HELPERS = {"domains", "examples", "labels", "partition", "resident"}


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
