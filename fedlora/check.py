"""Errors a user can cure, and validators that name the setting by itself.

`positive(rank=rank)` returns the value, or raises a `ConfigError` whose one sentence names the setting, the value and
the cure. The command line prints that sentence and exits with status 2.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting, a file or a model that the user can put right: one sentence, exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on though its settings were right: one sentence, exit status 1."""


def sentence(error: BaseException) -> str:
    """What an exception says: its sentence alone where it is one of ours, else its class and its text."""
    return str(error) if isinstance(error, ConfigError | RunError) else f"{type(error).__name__}: {error}"


def exit_status(command: Callable[[], int]) -> int:
    """What a command returns; 2 for a ConfigError and 1 for a RunError, whose sentences are printed."""
    try:
        return command()
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def positive(**setting: float) -> Any:
    """The value of the one keyword, if it is above zero."""
    return _require(setting, lambda value: value > 0, "must be above 0")


def not_negative(**setting: float) -> Any:
    """The value of the one keyword, if it is zero or above."""
    return _require(setting, lambda value: value >= 0, "must be 0 or above")


def fraction(**setting: float) -> Any:
    """The value of the one keyword, if it lies in (0, 1]."""
    return _require(setting, lambda value: 0 < value <= 1, "must lie above 0 and be at most 1")


def between(low: float, high: float, **setting: float) -> Any:
    """The value of the one keyword, if it lies in [low, high]."""
    return _require(setting, lambda value: low <= value <= high, f"must lie between {low:g} and {high:g}")


def finite(**setting: float) -> Any:
    """The value of the one keyword, if it is a number and not infinite."""
    return _require(setting, math.isfinite, "must be finite")


def below_one(**setting: float) -> Any:
    """The value of the one keyword, if it lies in [0, 1)."""
    return _require(setting, lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def one_of(options: Collection[str], **setting: str) -> Any:
    """The value of the one keyword, if it is among `options`; else an error that suggests the nearest."""
    (name, value), *_ = setting.items()
    if value in options:
        return value
    raise ConfigError(f"{name}={value} is not known; {suggest(str(value), options)}")


def suggest(word: str, options: Iterable[str]) -> str:
    """'did you mean x?', or the list of `options` where none comes near."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"choose one of: {', '.join(options)}"


def _require(setting: dict[str, float], holds: Any, demand: str) -> Any:
    (name, value), *_ = setting.items()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value} is not a number; it {demand}")
    if not holds(value):  # NaN fails every comparison, so it is refused here too
        raise ConfigError(f"{name}={value} is out of range; it {demand}")
    return value
