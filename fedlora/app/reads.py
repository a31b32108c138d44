"""Which settings the chosen options read: nothing that a user typed is ignored in silence.

A setting's declaration names what it is read with (`only` of `fedlora.setting.setting`). The settings that the YAML file of
a chosen option names are read too, which is how an option that somebody adds says what it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from copy import copy
from typing import Any

from fedlora import check
from fedlora.check import ConfigError
from fedlora.config import GROUPS, Config, declared, from_dict, value_of
from fedlora.setting import MULTIRUN, Condition, as_text

Look = Callable[[str], Any]  # dotted name → the value of that setting


def unread(config: Config, named: Collection[str] = (), multirun: bool = False) -> dict[str, Condition]:
    """The settings that this configuration does not read, each with the condition that fails.

    `named` are those that the files of the chosen options name.
    """

    def look(name: str) -> Any:
        return multirun if name == MULTIRUN else value_of(config, full(name))

    conditions = {name: () if name in named else setting.only for name, setting in declared().items()}
    failing = {name: first_failing(name, conditions, look) for name in conditions}
    return {name: condition for name, condition in failing.items() if condition is not None}


def first_failing(name: str, conditions: Mapping[str, tuple[Condition, ...]], look: Look) -> Condition | None:
    """The condition for which a setting is not read; None where it is read.

    A condition on a setting that is itself not read fails for the reason of that one; but what must be null then is.
    """
    for condition in conditions.get(name, ()):
        deeper = first_failing(full(condition.key), conditions, look)
        if deeper is not None and not condition.unset:
            return deeper
        if deeper is None and not condition.holds(look(condition.key)):
            return condition
    return None


def cleared(config: Config, names: Collection[str]) -> Config:
    """The configuration with these settings at their defaults, so that equal runs have equal settings."""
    values = dataclasses.asdict(config)
    for name in names:
        group, _, own = name.rpartition(".")
        (values[group] if group else values)[own] = copy(declared()[name].default)
    return from_dict(values)


def refuse(name: str, value: Any, condition: Condition, other: Any) -> ConfigError:
    """The sentence for a setting that is given and not read: what it is not read with, and what would read it.

    `other` is the value of the setting that the condition is about.
    """
    key, given = condition.key, f"{name}={check.shown(as_text(value))}"
    if key == MULTIRUN:
        return ConfigError(f"{given} is not read without -m; add it, or remove {name}")
    if not condition.values:
        how = f"without {key}; set it" if other is None else f"with {key}={as_text(other)}; change that"
        return ConfigError(f"{given} is not read {how}, or remove {name}")
    how = f"{given} is not read with {key}={check.shown(as_text(other))}"
    if condition.unset:
        return ConfigError(f"{how}; remove one of them")
    if condition.negated:
        return ConfigError(f"{how}; remove {name}")
    options = " or ".join(f"{key}={option}" for option in condition.values)
    return ConfigError(f"{how}; set {options}, or remove {name}")


def prefix(name: str) -> str:
    """What the help of a setting begins with: the options that read it."""
    group, parts = name.rpartition(".")[0], []
    for condition in declared()[name].only:
        owner = full(condition.key).rpartition(".")[0]
        if condition.unset:
            parts.append(f"without {condition.key}")
        elif condition.negated:
            parts.append(f"not with {condition.key}={' or '.join(condition.values)}")
        elif not condition.values:
            parts.append("a sweep (-m)" if condition.key == MULTIRUN else f"with {condition.key}")
        elif group and owner == group:
            parts.append(" or ".join(condition.values))
        else:
            parts.append(f"{condition.key}={' or '.join(condition.values)}")
    return f"{', '.join(parts)}: " if parts else ""


def full(key: str) -> str:
    """dataset → dataset.name, which holds the option that is chosen of a group."""
    return f"{key}.name" if key in GROUPS else key
