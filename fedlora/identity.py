"""What a run is: the settings that can change a number, and digests of what they only name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import strategies
from fedlora import models
from fedlora.config import Config
from fedlora.data import resident

# Settings that cannot change a number.
_NOT_IDENTITY = ("engine.", "checkpoint.", "name", "results", "overwrite", "plan", "save_merged")
DATA, BASE, STRATEGY = "data", "base model", "strategy code"  # what settings name and do not hold


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, the strategy's own with their defaults filled in."""
    rows: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        group = dataclasses.is_dataclass(getattr(config, name))
        rows |= {f"{name}.{key}": own for key, own in value.items()} if group else {name: value}
    return {f"strategy.{key}": value for key, value in _filled(rows.pop("strategy")).items()} | rows


def resolved(config: Config) -> dict[str, Any]:
    """Every setting as `Config` nests them, the strategy's own with their defaults filled in."""
    return dataclasses.asdict(config) | {"strategy": _filled(config.strategy)}


def _filled(chosen: dict[str, Any]) -> dict[str, Any]:
    own = {key: setting.default for key, setting in strategies.settings(chosen["name"]).items()}
    return {"name": chosen["name"]} | {key: chosen.get(key, default) for key, default in own.items()}


def identifies(setting: str) -> bool:
    """Whether a setting can change a number, so that it belongs to what a run is."""
    return not setting.startswith(_NOT_IDENTITY)


def digest(config: Config) -> str:
    """SHA-256, in hexadecimal, of every setting that can change a number: the same in any process and on any engine."""
    known = {name: value for name, value in flat(config).items() if identifies(name)}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def sources(config: Config, launched: bool = False) -> dict[str, str]:
    """SHA-256 of the data, the base model and the code of the strategy, as they are now.

    They are no part of `digest`: it keys random streams, and a device that derives the same streams has other data. With
    deploy the data are the server's own, its test set; for whoever launches it (`launched`) the code alone, since data and
    model are on the server. Raises ConfigError where data or model cannot be read.
    """
    code = {STRATEGY: strategy_digest(config.strategy["name"])}
    if launched:
        return code
    return {DATA: resident.digest(config.dataset, config.seed), BASE: models.digest(config.model)} | code


@lru_cache
def strategy_digest(name: str) -> str:
    """SHA-256 of the source of a strategy: its own file and those of ours that its classes are built from."""
    found = hashlib.sha256()
    modules = dict.fromkeys(base.__module__ for base in strategies.strategy_class(name).__mro__)
    for module in modules:
        if module.startswith(("strategies.", "fedlora.server.")) and (file := sys.modules[module].__file__):
            source = Path(file).read_bytes()
            found.update(f"/{module}/{len(source)}/".encode() + source)
    return found.hexdigest()
