"""The dataset that a process keeps, and its digest.

It is read once: what runs here goes on with the same examples whatever happens to the files. Where a run begins, `refresh`
looks whether they have changed.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from fedlora import data
from fedlora.config import DatasetConfig
from fedlora.data.examples import Dataset

STORED = ("digits", "files", "hub")  # the same for every seed
State = tuple[tuple[str, int, int], ...]  # path, bytes and time of the last change of each file that a dataset names


def dataset(config: DatasetConfig, seed: int) -> Dataset:
    """The dataset, as it was read first. Raises ConfigError where it cannot be read, or cannot train and test a classifier."""
    return _load(*_key(config, seed))[0]


def refresh(config: DatasetConfig, seed: int) -> None:
    """Let the dataset be read again if its files have changed since."""
    if _load(*_key(config, seed))[1] != _state(config):
        _load.cache_clear()


def digest(config: DatasetConfig, seed: int) -> str:
    """`Dataset.digest` of the files as they are now. Raises ConfigError as `dataset` does."""
    return _digest(*_key(config, seed), _state(config))


def _key(config: DatasetConfig, seed: int) -> tuple[str, int]:
    return json.dumps(asdict(config), sort_keys=True), 0 if config.name in STORED else seed


def _state(config: DatasetConfig) -> State:
    files = [Path(name).expanduser() for name in (config.path, config.test) if name] if config.name == "files" else []
    found = [(str(file.absolute()), file.stat()) for file in files if file.is_file()]  # loading says what is wrong with others
    return tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in found)


@lru_cache(maxsize=1)  # it may be large
def _load(text: str, seed: int) -> tuple[Dataset, State]:
    config = DatasetConfig(**json.loads(text))
    state = _state(config)  # before it is read, so that a change meanwhile is noticed
    return data.load(config, seed), state


@lru_cache(maxsize=256)
def _digest(text: str, seed: int, state: State) -> str:
    refresh(DatasetConfig(**json.loads(text)), seed)
    return _load(text, seed)[0].digest
