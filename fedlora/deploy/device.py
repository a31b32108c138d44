"""What a device makes of an experiment that it is sent: its own data, its own limits, nothing that is not the server's to say.

The server says how to train (strategy, adapters, learning rate, privacy). The device's owner says on what, where, and how
much privacy at least; an experiment that asks for less is refused before anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict, UserConfig

from clients.app import KEY, app
from clients.start import LASTING
from clients.task import local_steps, sampling_rate
from fedlora import messages, seeds, workbench
from fedlora.check import RunError
from fedlora.config import CheckpointConfig, Config, DatasetConfig, EngineConfig, PartitionConfig
from fedlora.data import partition
from fedlora.deploy.account import Account
from fedlora.deploy.memory import Memory
from fedlora.deploy.sums import SecureSums, needed, of_a_sum

PUBLIC = (messages.CLIENT, messages.EXAMPLES, "seconds", "cohort", "steps")  # what a private round tells besides its update
NOT_ASKED = (
    "name", "results", "overwrite", "plan", "save_merged", "deploy", "min_online", "patience", "device", "engine", "partition",
    "dataset", "checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class Holdings:
    """What belongs to a device and never comes from the server."""

    client: int  # its number in the federation
    examples: int
    data: DatasetConfig  # its file and columns
    model: tuple[str, str | None]  # name and path of its base model
    device: str  # auto, cpu or cuda
    cache: float  # GB for what the frozen blocks make of its examples
    agreed: Config | None = None  # the only experiment that it takes part in; None: any within its limits


class Device:
    """Answers messages as the simulator's client does, or refuses them with a RunError whose sentence says why."""

    def __init__(
        self, own: Holdings, account: Account, say: Callable[[str], object] = print, sums: SecureSums | None = None
    ) -> None:
        self.own, self.account, self.say, self.sums = own, account, say, sums
        self.memory = Memory(account.folder, say)
        self._localised: dict[str, Config] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply; `context.state` is changed as the ClientApp changes it.

        It lives as long as the Flower run. What a later round begins with is on disk before the reply leaves.
        """
        kind = message.metadata.message_type
        place = UserConfig({"partition-id": self.own.client, messages.EXAMPLES: self.own.examples})
        if kind == MessageType.QUERY:
            return app(message, _within(context, place))
        job = message.content.config_records[messages.CONFIG]
        config = self.localised(str(job[messages.EXPERIMENT]))
        same_base(config, job)
        key, round = identity(job), int(job[messages.ROUND])  # type: ignore[arg-type]
        if config.aggregation == "secure":
            needed(self.sums)
        if kind == MessageType.TRAIN:
            place |= self.admit(config, job, message.metadata.run_id)
            context.state = self.memory.newest(key, round - 1)
        elif kind == MessageType.EVALUATE and math.isfinite(self.account.limits.epsilon):
            raise RunError("this device keeps the accuracy on its own examples to itself, since no ε covers it")
        elif kind == MessageType.EVALUATE:
            context.state = self.memory.newest(key, round)
        message.content[messages.CONFIG] = ConfigRecord(dict(job) | {messages.EXPERIMENT: config.to_json()})
        own = _within(context, place)
        reply = needed(self.sums)(app, message, own, key, round) if of_a_sum(kind) else app(message, own)
        context.state = own.state
        if kind == MessageType.TRAIN and config.aggregation == "secure":
            needed(self.sums).began(own.state, key, round)
        if kind == MessageType.TRAIN:
            lasting = RecordDict({name: own.state[name] for name in LASTING if name in own.state})
            self.memory.keep(key, round, lasting, goes_back(config.checkpoint, round))
        if kind == MessageType.TRAIN and config.privacy.name == "record":
            told = reply.content.metric_records[messages.METRICS]
            reply.content[messages.METRICS] = MetricRecord({name: told[name] for name in PUBLIC if name in told})
        return reply

    def localised(self, experiment: str) -> Config:
        """The experiment, checked again, with what is this device's own in it. Raises RunError where it cannot take part."""
        if experiment not in self._localised:
            self._localised = {experiment: localised(self.own, Config.from_json(experiment))}
        return self._localised[experiment]

    def admit(self, config: Config, job: ConfigRecord, run: int) -> dict[str, Any]:
        """Raises RunError for a round that the owner does not allow. The ledger has it when this returns.

        What is returned belongs into the node configuration: the streams that the round's privacy rests on.
        """
        rate, steps, _ = work(self.own, config)
        check(self.account, config, steps)
        round = int(job[messages.ROUND])  # type: ignore[arg-type]
        if config.privacy.name != "record":
            self.say(f"round {round}: {steps} steps, without privacy")
            return {}
        sigma = float(job[messages.NOISE][self.own.client])  # type: ignore[index]
        serial = self.account.admit({"run": run, "round": round, "clip": config.privacy.clip}, sigma, rate, steps)
        self.say(f"round {round}: {steps} steps with σ = {sigma:.4g}; with it ε = {self.account.spent:.4g} is spent")
        return {KEY: seeds.derive(bytes.fromhex(self.account.secret), serial).hex()}


def identity(job: ConfigRecord) -> str:
    """A name for what is asked, the same wherever the server goes on with it, and another where it begins anew."""
    asked = _asked(Config.from_json(str(job[messages.EXPERIMENT])))
    text = json.dumps([asked, job.get(messages.LINEAGE, "")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def goes_back(config: CheckpointConfig, round: int) -> int:
    """The round after which a server that is broken off in this one stands, with the oldest of its checkpoints."""
    if not config.every:
        return round  # it begins anew
    return max(0, (round - 1) // config.every - config.keep + 1) * config.every


def localised(own: Holdings, config: Config) -> Config:
    """The experiment as this device runs it. Raises RunError where it is not for this device, or not what was agreed to."""
    if own.agreed is not None and _asked(config) != _asked(own.agreed):
        raise RunError("the experiment is not the one that this device's owner agreed to by --experiment")
    if config.model.name != own.model[0]:
        raise RunError(f"this device holds the model {own.model[0]}, the experiment has model={config.model.name}")
    if own.client >= config.clients:
        raise RunError(f"this device is client {own.client}, and the experiment has clients={config.clients}")
    if bool(config.dataset.text) != bool(own.data.text):
        raise RunError(f"this device holds {'text' if own.data.text else 'images'}, the experiment is about the other")
    return replace(
        config,
        dataset=replace(own.data, classes=config.dataset.classes),
        model=replace(config.model, path=own.model[1]),
        partition=PartitionConfig(name="own", sizes=[own.examples] * config.clients),
        engine=EngineConfig(name="inline", cohort="1", prefix_cache=own.cache),
        device=own.device,
        deploy=config.deploy or "none",  # the experiment that was agreed to may be a simulation's
    ).checked()


def work(own: Holdings, config: Config) -> tuple[float, int, int]:
    """(q, steps a round, training examples) of this device in an experiment."""
    kept, _ = partition.holdout(np.arange(own.examples), config.evaluate.holdout, config.seed, own.client)
    return sampling_rate(config.train.batch_size, len(kept)), local_steps(config.train, len(kept)), len(kept)


def check(account: Account, config: Config, steps: int) -> None:
    """Raises RunError where an experiment asks for less privacy, or for more work, than the owner allows."""
    limits, privacy = account.limits, config.privacy
    if steps > limits.steps:
        raise RunError(f"this device takes at most {limits.steps} steps a round (--max-steps), the experiment asks for {steps}")
    if math.isinf(limits.epsilon):
        return
    if privacy.name != "record":
        raise RunError(f"this device trains with privacy=record only (--epsilon), the experiment has privacy={privacy.name}")
    if privacy.clip > limits.clip:
        raise RunError(
            f"this device clips at {limits.clip:g} or below (--clip), the experiment has privacy.clip={privacy.clip:g}"
        )
    if privacy.delta > limits.delta:
        raise RunError(f"this device allows δ = {limits.delta:g} (--delta), the experiment has privacy.delta={privacy.delta:g}")


def same_base(config: Config, job: ConfigRecord) -> None:
    """Raises RunError where this device's base model has other frozen weights than the server's."""
    own = workbench.build(config).model.digest
    if (theirs := job.get(messages.BASE, own)) != own:
        raise RunError(
            f"this device's weights of {config.model.path or config.model.name} are others than the server's "
            f"(SHA-256 {own[:12]}… and {str(theirs)[:12]}…); give the device a copy of the server's model, by --model"
        )


def _asked(config: Config) -> dict[str, Any]:
    """What an experiment asks of a device, whoever runs it and where."""
    return {key: value for key, value in asdict(config).items() if key not in NOT_ASKED} | {"classes": config.dataset.classes}


def _within(context: Context, place: UserConfig) -> Context:
    return Context(context.run_id, context.node_id, place, context.state, UserConfig())
