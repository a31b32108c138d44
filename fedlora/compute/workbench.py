"""What one process builds once and then shares among all the clients that it plays: data, split, model.

Every part is cached by the settings that it depends on and no others, so that the cells of a sweep share what they can.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from fedlora import config as settings
from fedlora import identity, models
from fedlora.check import ConfigError
from fedlora.compute.prefix import Prefix
from fedlora.compute.rows import Rows
from fedlora.config import Config
from fedlora.data import Dataset, partition, resident
from fedlora.models import export
from fedlora.models.adapted import AdaptedModel
from fedlora.models.base import Base
from fedlora.models.encode import Encoded
from fedlora.models.trial import tried
from fedlora.validate import from_json


@dataclass
class Workbench:
    """The resident parts of one experiment in one process."""

    config: Config
    dataset: Dataset
    model: AdaptedModel
    shards: list[np.ndarray]  # client → indices into dataset.train, held-out examples included

    @cached_property
    def train(self) -> Encoded:
        """The training examples of all clients, encoded."""
        return _encoded(_parts(self.config), self.config.engine.prefix_cache, "train")

    @cached_property
    def test(self) -> Encoded:
        """The central test examples, encoded."""
        return _encoded(_parts(self.config), self.config.engine.prefix_cache, "test")

    @cached_property
    def rows(self) -> Rows:
        """The model with factors by example."""
        return _rows(_parts(self.config), self.config.engine.prefix_cache)

    @cached_property
    def identity(self) -> str:
        """That of the experiment, for the keys of all its clients."""
        return identity.digest(self.config)

    @cached_property
    def counts(self) -> np.ndarray:
        """(clients,) how many examples each client trains on; counted without drawing which."""
        share = self.config.evaluate.holdout
        return np.array([len(shard) - partition.held_out(len(shard), share) for shard in self.shards], np.int64)

    def examples_of(self, client: int) -> tuple[np.ndarray, np.ndarray]:
        """The indices that a client trains on and those that it holds back."""
        return partition.holdout(self.shards[client], self.config.evaluate.holdout, self.config.seed, client)


def build(config: Config) -> Workbench:
    """The workbench of an experiment; a second call with the same settings gives the resident one."""
    return build_from(config.to_json())


def refreshed(config: Config) -> Workbench:
    """The same for a run that begins: made anew where the files of the data have changed since they were read."""
    resident.refresh(config.dataset, config.seed)
    bench = build(config)
    if bench.dataset is _model(_parts(config)).dataset is resident.dataset(config.dataset, config.seed):
        return bench
    for kept in (build_from, _model, _encoded, _rows):
        kept.cache_clear()
    return build(config)


@lru_cache(maxsize=64)  # cells in step take turns
def build_from(text: str) -> Workbench:
    """The same for the configuration that a message carries, checked again where it arrives."""
    config = from_json(text)
    parts = _parts(config)
    dataset = _examples(parts)
    shards = partition.split(config.partition, dataset.train, config.clients, config.seed)
    model = _model(parts).model
    if config.save_merged:
        export.refuse_merging(model)
    return Workbench(config, dataset, model, shards)


class Parts(NamedTuple):
    """What the base model, the examples as it takes them, and the order of their sums depend on."""

    model: str
    adapter: str
    dataset: str
    seed: int
    device: str
    threads: int


def _parts(config: Config) -> Parts:
    groups = _json(config.model), _json(config.adapter), _json(config.dataset)
    return Parts(*groups, config.seed, config.device, config.threads)


def _examples(parts: Parts) -> Dataset:
    return resident.dataset(settings.DatasetConfig(**json.loads(parts.dataset)), parts.seed)


class Made(NamedTuple):
    """What is made of them. Examples are encoded from this dataset, whatever is read later."""

    dataset: Dataset
    base: Base
    model: AdaptedModel
    prefix: Prefix


@lru_cache(maxsize=1)
def _model(parts: Parts) -> Made:
    """The one base model of this process. Another one takes its place, and whatever refers to the old one is let go."""
    for dependent in (build_from, _encoded, _rows):
        dependent.cache_clear()
    torch.set_num_threads(parts.threads)
    threadpool_limits(parts.threads, "blas")  # the server's sums too, which a machine's cores would order otherwise
    dataset = _examples(parts)
    base = models.load(settings.ModelConfig(**json.loads(parts.model)), dataset, parts.seed)
    model = AdaptedModel(base, settings.AdapterConfig(**json.loads(parts.adapter)), torch_device(parts.device))
    tried(model, dataset)
    model.prefix = prefix = Prefix(model)
    return Made(dataset, base, model, prefix)


@lru_cache(maxsize=2)
def _encoded(parts: Parts, limit: float, part: str) -> Encoded:
    """The examples of a part, with what is the same in every step of it: in half of the `limit` (GB) for both parts."""
    dataset, base, _, prefix = _model(parts)
    return prefix.kept(base.encode(getattr(dataset, part)), limit * 1e9 / 2)


@lru_cache(maxsize=1)
def _rows(parts: Parts, limit: float) -> Rows:
    return Rows(_model(parts).model, _encoded(parts, limit, "train"))


def torch_device(device: str) -> torch.device:
    """The device that `device=auto|cpu|cuda` stands for here. Raises ConfigError for cuda where there is none."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device=cuda, but torch sees no GPU here; use device=auto or device=cpu")
    return torch.device("cuda" if device != "cpu" and available else "cpu")


def _json(group: object) -> str:
    return json.dumps(dataclasses.asdict(group), sort_keys=True)  # type: ignore[call-overload]
