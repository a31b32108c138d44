"""The checks of a configuration: of each setting, whose range stands beside its declaration, and of several together.

They need a list of what there is, such as the names of datasets, and no data or model. They stand at the doors: where a
command line is composed, and wherever a configuration arrives as JSON.
"""

from __future__ import annotations

import json
import math
import pkgutil
from pathlib import Path

from fedlora import check, data, models
from fedlora.check import ConfigError
from fedlora.config import Config, DatasetConfig, EngineConfig, TrainConfig, declared, from_dict, value_of
from fedlora.data import domains, partition
from fedlora.models import heads


def from_json(text: str) -> Config:
    """The inverse of `Config.to_json`; raises ConfigError for keys that no setting has, and for values as `checked` does."""
    return checked(from_dict(json.loads(text)))


def checked(config: Config) -> Config:
    """The same configuration, if each value is possible and all are together.

    Raises ConfigError, in one sentence that names the setting, its value and the cure, for the first that is wrong.
    """
    for name, said in declared().items():
        value = value_of(config, name)
        if said.takes is not None and value is not None:
            said.takes(**{name: value})
            if said.most < math.inf:
                check.at_most(said.most, **{name: value})
    _check_run(config)
    _check_train(config.train)
    _check_privacy(config)
    _check_data(config)
    _check_ranks(config)
    _check_server(config)
    check.one_of(engine_names(), **{"engine.name": config.engine.name})
    _check_cohort(config.engine.cohort)
    _check_address(config.engine)
    return config


def _check_cohort(cohort: str) -> None:
    """auto, or a number of clients; more digits than any number of clients has are not read as one."""
    number = int(cohort) if cohort.isascii() and cohort.isdecimal() and len(cohort) < 8 else 0
    if cohort != "auto" and not number:
        raise ConfigError(
            f"engine.cohort={check.shown(cohort)} must be auto or a number of clients from 1 on (at most 9,999,999)"
        )


def _check_address(engine: EngineConfig) -> None:
    address = engine.address
    if address is None:
        return
    if engine.name != "ray":
        raise ConfigError(
            f"engine.address={address} needs engine=ray, and engine={engine.name} runs on this machine; set it to null"
        )
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"engine.address={address} must be auto, or host:port of the head node, such as 10.0.0.1:6379")


def _check_ranks(config: Config) -> None:
    adapter = config.adapter
    if adapter.ranks is not None and adapter.memory is not None:
        raise ConfigError("adapter.ranks and adapter.memory both set the clients' ranks; remove one of them")
    for name, values in (("adapter.ranks", adapter.ranks), ("adapter.memory", adapter.memory)):
        if values is None:
            continue
        if isinstance(values, dict) and values:
            given = list(values)
            if any(not isinstance(share, int | float) or share <= 0 for share in values.values()) or (
                not abs(sum(values.values()) - 1) <= 1e-6
            ):
                raise ConfigError(f"{name}={values}: shares must be above 0 and add up to 1, as in {name}={{4:.5,8:.5}}")
        elif isinstance(values, list) and len(values) == config.clients:
            given = values
        elif isinstance(values, list):
            raise ConfigError(f"{name} lists {len(values)} clients, and clients={config.clients}; give one for each")
        else:
            raise ConfigError(f"{name}={values} must be a list with one for each client, or shares such as {{4:.5,8:.5}}")
        for value in given:
            number = float(value) if str(value).replace(".", "", 1).isdigit() else 0.0
            if number <= 0 or (name == "adapter.ranks" and not number.is_integer()):
                raise ConfigError(f"{name} has {value}, which is no {'rank' if name == 'adapter.ranks' else 'size in MB'}")
            if name == "adapter.ranks" and number > adapter.rank:
                raise ConfigError(f"adapter.ranks has {value}, above adapter.rank={adapter.rank}; set adapter.rank={value}")
    if adapter.unequal:
        for setting, bad in (
            ("privacy=user", config.privacy.name == "user"),
            ("server.mean", config.server.mean != "weighted"),
        ):
            if bad:
                raise ConfigError(
                    f"adapter.ranks and adapter.memory do not go with {setting}, which needs updates of one shape"
                )


def _check_server(config: Config) -> None:
    server, compression = config.server, config.compression
    if server.mean != "weighted" and config.privacy.name == "user":
        raise ConfigError(f"server.mean={server.mean} does not go with privacy=user, whose noise is made for a clipped sum")
    if config.aggregation == "secure":
        for setting, bad in (
            ("privacy=user", config.privacy.name == "user"),
            (f"server.mean={server.mean}", server.mean != "weighted"),
            (f"server.max_weight={server.max_weight}", server.max_weight < 1),
            (f"compression.up={compression.up}", compression.up != "none"),
        ):
            if bad:
                raise ConfigError(f"aggregation=secure does not go with {setting}, which needs what each client sends")
        from fedlora.secure import LEAST  # `cryptography` loads here, for those who need it

        if config.cohort_size < (least := LEAST[config.privacy.name]):
            raise ConfigError(
                f"aggregation=secure needs {least} clients a round, and clients_per_round is {config.cohort_size}; raise it, "
                "since of two clients each learns the other's changes from the sum"
            )


def engine_names() -> list[str]:
    """The engines there are, by the files of their folder; importing them would load Flower for a question about a name."""
    parts = {"base", "cluster", "local", "instep", "pool"}  # what engines share, and what sweeps use
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "engines")]) if m.name not in parts)


def _check_run(config: Config) -> None:
    if config.min_online is not None and config.min_online > config.clients:
        raise ConfigError(f"min_online={config.min_online} is more than clients={config.clients}; lower it")
    if config.clients_per_round is not None and config.clients_per_round > config.clients:
        raise ConfigError(
            f"clients_per_round={config.clients_per_round} is more than clients={config.clients}; "
            "lower the first or raise the second"
        )


def _check_train(train: TrainConfig) -> None:
    if train.epochs is None and train.steps is None:
        raise ConfigError("train.steps and train.epochs are both none; set one of them")
    if train.momentum and train.optimizer != "sgd":
        raise ConfigError(f"train.momentum={train.momentum} has no meaning with train.optimizer=adamw; set it to 0")


def _check_privacy(config: Config) -> None:
    privacy = config.privacy
    if privacy.name == "none":
        if privacy.epsilon is not None or privacy.noise_multiplier is not None:
            raise ConfigError("privacy.epsilon and privacy.noise_multiplier need privacy=record or user; add it or remove them")
        return
    if privacy.epsilon is None and privacy.noise_multiplier is None:
        raise ConfigError(f"privacy={privacy.name} needs privacy.epsilon=<budget> or privacy.noise_multiplier=<σ>")
    noise = privacy.noise_multiplier if privacy.noise_multiplier is not None else math.isfinite(privacy.epsilon or 0)
    if math.isinf(privacy.clip) and noise:
        raise ConfigError("privacy.clip=inf bounds nothing, so that no noise protects; set a number, or privacy.epsilon=inf")
    if privacy.name == "user":
        if privacy.epsilon is not None and privacy.noise_multiplier is not None:
            raise ConfigError("privacy=user takes privacy.epsilon or privacy.noise_multiplier, not both; remove one")
        return
    if privacy.adjacency == "replace" and privacy.accountant == "rdp":
        raise ConfigError("privacy.accountant=rdp bounds no privacy.adjacency=replace; set privacy.accountant=prv")
    if config.train.max_grad_norm is not None:
        raise ConfigError(
            f"train.max_grad_norm={config.train.max_grad_norm} clips whole batches, which bounds no record's part; "
            "with privacy=record set it to null and use privacy.clip"
        )
    if config.model.dropout:
        raise ConfigError(
            "model.dropout=true draws masks for places in a batch, so that one record moves the gradients of others; "
            "with privacy=record set it to false (adapter.dropout works, record by record)"
        )


def _check_data(config: Config) -> None:
    check.one_of(models.names(), **{"model.name": config.model.name})
    check.one_of(data.names(), **{"dataset.name": config.dataset.name})
    check.one_of(partition.names(), **{"partition.name": config.partition.name})
    heads.checked(config.model.head)
    _check_domains(config.dataset)
    if config.model.name == "hf" and not config.model.path:
        raise ConfigError("model=hf needs model.path=<folder or hub name>")
    _check_deploy(config)
    if config.dataset.name in ("files", "hub"):
        if not config.dataset.path and not config.deploy:
            what = "file" if config.dataset.name == "files" else "name on the hub"
            raise ConfigError(f"dataset={config.dataset.name} needs dataset.path=<{what}>")
        if bool(config.dataset.text) == bool(config.dataset.image):
            raise ConfigError("dataset.text and dataset.image: name one column of the two, such as dataset.text=sentence")


def _check_deploy(config: Config) -> None:
    own = config.partition.name == "own"
    if not config.deploy:
        if own:
            raise ConfigError("partition=own needs deploy=<connection>, whose devices have their own data; choose another")
        return
    for setting, bad, cure in (
        (f"partition={config.partition.name}", not own, "remove it: each device keeps what it has"),
        (f"dataset={config.dataset.name}", config.dataset.name != "files", "set dataset=files"),
        (f"dataset.domains={config.dataset.domains}", bool(config.dataset.domains), "remove it"),
        ("dataset.classes=[]", not config.dataset.classes, "name all labels, which no device knows: dataset.classes=[no,yes]"),
        (
            f"privacy=user and privacy.sampling={config.privacy.sampling}",
            config.privacy.name == "user" and config.privacy.sampling != "none",
            "traffic and timing show who takes part, so that sampling amplifies nothing: set privacy.sampling=none",
        ),
    ):
        if bad:
            raise ConfigError(f"deploy={config.deploy} does not go with {setting}; {cure}")


def _check_domains(dataset: DatasetConfig) -> None:
    for name in dataset.domains:
        check.one_of(domains.names(), **{"dataset.domains": name})
    if len(set(dataset.domains)) < len(dataset.domains):
        raise ConfigError(f"dataset.domains={','.join(dataset.domains)} names a domain twice; name each once")
    if dataset.domains and dataset.group:
        raise ConfigError(
            f"dataset.domains={','.join(dataset.domains)} makes groups of its own beside those of "
            f"dataset.group={dataset.group}; set the first to [] or the second to null"
        )
