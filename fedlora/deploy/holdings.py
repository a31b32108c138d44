"""What belongs to a device and never comes from a server, and an experiment with that in its place."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from clients.task import local_steps, sampling_rate
from fedlora.config import Config, DatasetConfig, EngineConfig, PartitionConfig
from fedlora.data import partition
from fedlora.data.examples import ordered
from fedlora.deploy.reasons import Reason, Refused
from fedlora.identity import resolved
from fedlora.validate import checked

NOT_ASKED = (
    "name", "results", "overwrite", "plan", "save_merged", "deploy", "min_online", "patience", "device", "engine", "partition",
    "dataset", "checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class Holdings:
    """What belongs to a device and never comes from the server."""

    client: int  # its number in the federation
    examples: int
    data: DatasetConfig  # its file and columns, and the classes that its owner declared
    model: tuple[str, str | None]  # name and path of its base model
    device: str  # auto, cpu or cuda
    cache: float  # GB for what the frozen blocks make of its examples
    agreed: Config | None = None  # the only experiment that it takes part in; None: any within its limits


def localised(own: Holdings, config: Config) -> Config:
    """The experiment as this device runs it. Raises Refused where it is not for this device, or not what was agreed to."""
    if own.agreed is not None and asked(config) != asked(own.agreed):
        raise Refused(Reason.NOT_AGREED, "the experiment is not the one that this device's owner agreed to by --experiment")
    kinds = {True: "text", False: "images"}
    for what, mine, theirs in (
        ("holds the model", own.model[0], config.model.name),
        ("holds", kinds[bool(own.data.text)], kinds[bool(config.dataset.text)]),
        ("has the classes", ordered(own.data.classes), ordered(config.dataset.classes)),
    ):
        if mine != theirs:
            raise Refused(Reason.NOT_HELD, f"this device {what} {mine}, the experiment is for {theirs}")
    if own.client >= config.clients:
        raise Refused(Reason.NOT_HELD, f"this device is client {own.client}, and the experiment has clients={config.clients}")
    sizes = [0] * config.clients  # those of others are not known here, and change nothing
    sizes[own.client] = own.examples
    return checked(
        replace(
            config,
            dataset=replace(own.data, classes=config.dataset.classes),  # the same ones, in the order of the model's outputs
            model=replace(config.model, path=own.model[1]),
            partition=PartitionConfig(name="own", sizes=sizes),
            engine=EngineConfig(name="inline", cohort="1", prefix_cache=own.cache),
            device=own.device,
            deploy=config.deploy or "none",  # the experiment that was agreed to may be a simulation's
        )
    )


def work(own: Holdings, config: Config) -> tuple[float, int, int]:
    """(q, steps a round, training examples) of this device in an experiment."""
    kept, _ = partition.holdout(np.arange(own.examples), config.evaluate.holdout, config.seed, own.client)
    return sampling_rate(config.train.batch_size, len(kept)), local_steps(config.train, len(kept)), len(kept)


def identity(config: Config, lineage: str = "") -> str:
    """A name for what is asked, the same wherever a server goes on with it; by another `lineage` it begins anew."""
    return hashlib.sha256(json.dumps([asked(config), lineage], sort_keys=True).encode()).hexdigest()[:32]


def asked(config: Config) -> dict[str, Any]:
    """What an experiment asks of a device, whoever runs it and where."""
    settings = {key: value for key, value in resolved(config).items() if key not in NOT_ASKED}
    return settings | {"model": settings["model"] | {"path": None}, "classes": ordered(config.dataset.classes)}
