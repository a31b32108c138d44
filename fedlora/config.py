"""Every setting of an experiment as plain dataclasses; `fedlora.validate` checks their values.

The same classes are Hydra's schema (types), the program's argument (`Config`) and, as one JSON string, what travels to a
client. Settings of `engine` and `checkpoint` change no number; those of every other group may, and the two never mix in one
group.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple, get_type_hints

from fedlora import check
from fedlora.check import ConfigError
from fedlora.groups import (
    AdapterConfig,
    CheckpointConfig,
    CompressionConfig,
    DatasetConfig,
    EngineConfig,
    EvaluateConfig,
    ModelConfig,
    PartitionConfig,
    PrivacyConfig,
    ServerConfig,
    TrainConfig,
)
from fedlora.setting import Condition, setting


@dataclass
class Config:
    """One experiment. `strategy` holds the strategy's name and that strategy's own settings."""

    name: str | None = setting(None, "folder of the results; none: made from the settings that differ from the defaults")
    seed: int = setting(0, "the one seed; every random stream is derived from it", takes=check.not_negative, most=1e18)
    clients: int = setting(50, "clients in the federation", takes=check.positive, most=1e7, also="num_clients")
    rounds: int = setting(30, "communication rounds", takes=check.positive, most=1e5, also="num_rounds")
    clients_per_round: int | None = setting(
        None, "clients drawn each round, without replacement", takes=check.positive, most=1e7
    )
    fraction: float | None = setting(
        0.2,
        "share of the clients drawn each round, two at least; none: all",
        takes=check.fraction,
        only="clients_per_round=null",
    )
    min_success: float = setting(
        0.5, "share of a round's clients that must return a usable update, else the run fails", takes=check.fraction
    )
    round_timeout: float = setting(3600.0, "seconds to wait for a round's clients", takes=check.positive, most=1e8)
    deploy: str | None = setting(None, "name of the connection to a SuperLink, whose devices are the clients; none: simulate")
    min_online: int | None = setting(
        None, "devices that a round waits for; none: all clients", takes=check.positive, most=1e7, only="deploy"
    )
    patience: float = setting(
        600.0,
        "seconds that a round waits for them, and that a SuperLink out of reach is tried",
        takes=check.positive,
        most=1e8,
        only="deploy",
    )
    device: str = setting(
        "auto",
        "auto, cpu or cuda: what clients and the evaluation compute on",
        takes=partial(check.one_of, ("auto", "cpu", "cuda")),
    )
    threads: int = setting(
        1, "torch threads a process; changes the order of sums, so results may differ", takes=check.positive, most=512
    )
    aggregation: str = setting(
        "plain",
        "plain, or secure: the server learns sums of updates only (linear strategies)",
        takes=partial(check.one_of, ("plain", "secure")),
    )
    save_merged: bool = setting(False, "save the merged model as well (merged/), as transformers reads it")
    results: str = setting("results", "folder that holds the results folders")
    overwrite: bool = setting(False, "run again where finished results or those of other settings stand")
    plan: bool = setting(False, "print sizes, bytes, memory, steps and time, and train nothing")
    strategy: dict[str, Any] = setting({"name": "fedsvd"}, "the strategy and its settings; see --list")
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def to_json(self) -> str:
        """The experiment as one line of JSON with sorted keys, the form in which it travels and is compared."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def cohort_size(self) -> int:
        """Clients drawn each round: two at least, where there are two, unless `clients_per_round` says otherwise."""
        if self.clients_per_round is not None:
            return self.clients_per_round
        return max(min(2, self.clients), round(self.clients * (1.0 if self.fraction is None else self.fraction)))

    @property
    def poisson(self) -> bool:
        """Whether cohorts are drawn client by client, as user-level accounting with Poisson sampling demands."""
        return self.privacy.name == "user" and self.privacy.sampling == "poisson"

    @property
    def fresh_noise(self) -> bool:
        """Whether a round that is taken again has other noise than before: from secrets of devices, or of their server."""
        return bool(self.deploy) and self.privacy.name != "none"

    @property
    def for_devices(self) -> Config:
        """The experiment without what is no device's affair: the server's paths and names, and the sizes of other clients."""
        partition = dataclasses.replace(self.partition, sizes=[0] * len(self.partition.sizes))
        dataset = dataclasses.replace(self.dataset, path=None, test=None)
        return dataclasses.replace(self, name=None, results="", deploy="yes", partition=partition, dataset=dataset)


def from_dict(values: dict[str, Any]) -> Config:
    """A Config from nested dictionaries, its values not checked; an unknown key raises ConfigError with a suggestion."""
    return _build(Config, values, "")


class Declared(NamedTuple):
    """What the declaration of a setting says (`fedlora.setting.setting`)."""

    default: Any
    type: Any
    help: str
    takes: Callable[..., Any] | None
    most: float
    only: tuple[Condition, ...]
    also: tuple[str, ...]


@lru_cache(maxsize=1)
def declared() -> Mapping[str, Declared]:
    """Every setting by its dotted name, groups in their order. A default that is a list or a dict is not to be changed."""
    rows: dict[str, Declared] = {}
    for prefix, config_class in (("", Config), *((f"{name}.", group) for name, group in GROUPS.items())):
        hints = get_type_hints(config_class)
        for item in dataclasses.fields(config_class):
            if prefix or item.name not in GROUPS:
                default = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[operator]
                rows[prefix + item.name] = Declared(default, hints[item.name], **item.metadata)
    return rows


def value_of(config: Config, name: str) -> Any:
    """The value of the setting of this dotted name."""
    return reduce(getattr, name.split("."), config)


# The fields of Config that are dataclasses themselves, by name.
GROUPS: dict[str, type] = {
    name: kind for name, kind in get_type_hints(Config).items() if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


def _build(config_class: type, values: dict[str, Any], prefix: str) -> Any:
    names = {item.name for item in dataclasses.fields(config_class)}
    for key in values:
        if key not in names:
            raise ConfigError(f"{prefix}{key} is not a setting; {check.suggest(key, names)}")
    built = {
        key: _build(GROUPS[key], value, f"{key}.") if config_class is Config and key in GROUPS else value
        for key, value in values.items()
    }
    return config_class(**built)
