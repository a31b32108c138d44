"""What a run is: the settings that can change a number, and their digest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import strategies

if TYPE_CHECKING:
    from fedlora.config import Config

# Settings that cannot change a number.
_NOT_IDENTITY = ("engine.", "checkpoint.", "name", "results", "overwrite", "plan", "save_merged")


def flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, the strategy's own with their defaults filled in."""
    rows: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        group = dataclasses.is_dataclass(getattr(config, name))
        rows |= {f"{name}.{key}": own for key, own in value.items()} if group else {name: value}
    chosen = rows.pop("strategy")
    own = {key: p.default for key, p in strategies.settings(chosen["name"]).items()}
    return {"strategy.name": chosen["name"]} | {f"strategy.{k}": chosen.get(k, d) for k, d in own.items()} | rows


def identifies(setting: str) -> bool:
    """Whether a setting can change a number, so that it belongs to what a run is."""
    return not setting.startswith(_NOT_IDENTITY)


def digest(config: Config) -> str:
    """SHA-256, in hexadecimal, of every setting that can change a number."""
    known = {name: value for name, value in flat(config).items() if identifies(name)}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
