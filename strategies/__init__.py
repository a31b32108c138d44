"""Federated LoRA strategies: one file each, found by itself.

    import strategies
    strategy = strategies.make("fedsvd", every=1)      # by name, settings as keywords
    from strategies import FedSVD                      # or by class, in anybody's Flower ServerApp

The name of a strategy is the name of its file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any, NamedTuple, get_type_hints

from fedlora import check
from fedlora.arrays.messages import ServerState, Update
from fedlora.check import ConfigError
from strategies.base import FlowerFedAvg, LoRAStrategy

MOST = 1e9  # that a whole number of a strategy's own settings may be

_CLASSES: dict[str, type[LoRAStrategy]] = {}
for _module in pkgutil.iter_modules(__path__):
    if _module.name != "base":
        for _value in vars(importlib.import_module(f"strategies.{_module.name}")).values():
            if inspect.isclass(_value) and issubclass(_value, LoRAStrategy) and _value.__module__.endswith(f".{_module.name}"):
                _CLASSES[_module.name] = _value
                globals()[_value.__name__] = _value

__all__ = ["LoRAStrategy", "ServerState", "Update", "make", "names", "settings", "strategy_class"]
__all__ += [_class.__name__ for _class in _CLASSES.values()]


def __getattr__(name: str) -> type[LoRAStrategy]:
    """Tells type checkers that the classes found above are attributes of this package."""
    raise AttributeError(f"module 'strategies' has no attribute {name!r}")


def names() -> list[str]:
    """The names of all strategies, sorted."""
    return sorted(_CLASSES)


def strategy_class(name: str) -> type[LoRAStrategy]:
    """The class of that name; raises ConfigError with a suggestion for an unknown one."""
    return _CLASSES[check.one_of(names(), strategy=name)]


class Setting(NamedTuple):
    """A setting of a strategy, as its signature declares it: `every: Annotated[int, "what it means"] = 1`.

    A third argument of Annotated, such as "strategy.solver=sgd", names what else must be chosen for the setting to be read.
    """

    default: Any
    type: type
    help: str
    only: tuple[str, ...] = ()


def settings(name: str) -> dict[str, Setting]:
    """The settings of a strategy that a user may choose: `init`, which all share, and its own keywords."""
    return dict(_settings_of(strategy_class(name)))


@cache
def _settings_of(chosen: type[LoRAStrategy]) -> dict[str, Setting]:
    """The same of a class, whose signature is read once."""
    shared = {"init": inspect.signature(LoRAStrategy).parameters["init"]}
    own: dict[str, inspect.Parameter] = {}
    hints = get_type_hints(LoRAStrategy.__init__, include_extras=True)
    for base in reversed(chosen.__mro__):
        if issubclass(base, LoRAStrategy) and base is not LoRAStrategy and "__init__" in vars(base):
            own |= {key: p for key, p in inspect.signature(base.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY}
            hints |= get_type_hints(base.__init__, include_extras=True)
    said = {key: getattr(hints[key], "__metadata__", ("",)) for key in shared | own}
    return {key: Setting(p.default, type(p.default), said[key][0], said[key][1:]) for key, p in (shared | own).items()}


def make(name: str, **keywords: Any) -> LoRAStrategy:
    """The strategy of that name with its settings, and any of LoRAStrategy's and Flower's keywords.

    Raises ConfigError, with a suggestion, for an unknown name or setting, and for a value of the wrong type or range.
    """
    chosen, known = strategy_class(name), settings(name)
    runtime = _keywords(LoRAStrategy) | _keywords(FlowerFedAvg)
    for key, value in keywords.items():
        if key in known:
            _check_type(f"strategy.{key}", value, known[key])
        elif key not in runtime:
            raise ConfigError(f"strategy.{key} is not a setting of {name}; {check.suggest(key, known)}")
    return chosen(**keywords)


def _keywords(function: Any) -> set[str]:
    """The names of what may be passed by keyword; **rest is not the name of one."""
    return {key for key, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}


def _check_type(name: str, value: Any, setting: Setting) -> None:
    """Values come from a command line, so an int may stand for a float, and nothing else for anything else."""
    wanted = setting.type
    fits = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(
            f"{name}={check.shown(value)} is of the wrong type; it takes {wanted.__name__} (default {setting.default})"
        )
    if wanted is int:
        check.at_most(MOST, **{name: value})
