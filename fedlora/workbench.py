"""What one process builds once and then shares among all the clients that it plays: data, split, model.

Every part is cached by the settings that it depends on and no others, so that the cells of a sweep share what they can.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from fedlora import config as settings
from fedlora import data, models
from fedlora.check import ConfigError
from fedlora.config import Config
from fedlora.data import Dataset, partition
from fedlora.models.adapted import AdaptedModel
from fedlora.models.base import Base
from fedlora.models.encode import Encoded
from fedlora.models.rows import Rows


@dataclass
class Workbench:
    """The resident parts of one experiment in one process."""

    config: Config
    dataset: Dataset
    base: Base
    model: AdaptedModel
    shards: list[np.ndarray]  # client → indices into dataset.train, held-out examples included

    @cached_property
    def train(self) -> Encoded:
        """The training examples of all clients, encoded."""
        return self.base.encode(self.dataset.train)

    @cached_property
    def rows(self) -> Rows:
        """The model with factors by example."""
        return Rows(self.model, self.train)

    @cached_property
    def test(self) -> Encoded:
        """The central test examples, encoded."""
        return self.base.encode(self.dataset.test)

    def examples_of(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        """The indices that a client trains on and those that it holds back."""
        return partition.holdout(self.shards[client], self.config.evaluate.holdout, self.config.seed, client)


@lru_cache(maxsize=2)
def experiment(text: str) -> Config:
    """The configuration that a message carries, checked again where it arrives."""
    return Config.from_json(text)


def build(config: Config) -> Workbench:
    """The workbench of an experiment; a second call with the same settings gives the resident one."""
    return _build(config.to_json())


@lru_cache(maxsize=1)
def _build(text: str) -> Workbench:
    config = experiment(text)
    torch.set_num_threads(config.threads)
    dataset = _dataset(_json(config.dataset), config.seed)
    shards = partition.split(config.partition, dataset.train, config.clients, config.seed)
    base, model = _model(_json(config.model), _json(config.adapter), _json(config.dataset), config.seed, config.device)
    return Workbench(config, dataset, base, model, shards)


@lru_cache(maxsize=1)
def _dataset(text: str, seed: int) -> Dataset:
    return data.load(settings.DatasetConfig(**json.loads(text)), seed)


@lru_cache(maxsize=1)
def _model(model: str, adapter: str, dataset: str, seed: int, device: str) -> tuple[Base, AdaptedModel]:
    base = models.load(settings.ModelConfig(**json.loads(model)), _dataset(dataset, seed), seed)
    return base, AdaptedModel(base, settings.AdapterConfig(**json.loads(adapter)), torch_device(device))


def torch_device(device: str) -> torch.device:
    """The device that `device=auto|cpu|cuda` stands for here. Raises ConfigError for cuda where there is none."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device=cuda, but torch sees no GPU here; use device=auto or device=cpu")
    return torch.device("cuda" if device != "cpu" and available else "cpu")


def _json(group: object) -> str:
    return json.dumps(dataclasses.asdict(group), sort_keys=True)  # type: ignore[call-overload]
