"""Errors a user can cure, and validators that name the setting by itself.

`positive(rank=rank)` returns the value, or raises a `ConfigError` whose one sentence names the setting, the value and
the cure. The command line prints that sentence and exits with status 2.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

ALIKE = 0.75  # how near a name must come to be suggested for another (of difflib's ratio, 1: equal)
MOST_NAMED, FEW = 20, 5  # options that are listed whole; of more, only the nearest
LONG = 120  # characters of a value that a sentence repeats


class ConfigError(ValueError):
    """A setting, a file or a model that the user can put right: one sentence, exit status 2."""


class RunError(RuntimeError):
    """A run that cannot go on though its settings were right: one sentence, exit status 1."""


def sentence(error: BaseException) -> str:
    """What an exception says: its sentence alone where it is one of ours, else its class and its text."""
    return str(error) if isinstance(error, ConfigError | RunError) else f"{type(error).__name__}: {error}"


def reason(error: BaseException) -> str:
    """The first line of what a library's error says, cut after 200 characters; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".: ") if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} …"


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


def positive_finite(**setting: float) -> Any:
    """The value of the one keyword, if it is above zero and not infinite."""
    positive(**setting)
    return finite(**setting)


def not_negative(**setting: float) -> Any:
    """The value of the one keyword, if it is zero or above."""
    return _require(setting, lambda value: value >= 0, "must be 0 or above")


def fraction(**setting: float) -> Any:
    """The value of the one keyword, if it lies in (0, 1]."""
    return _require(setting, lambda value: 0 < value <= 1, "must lie above 0 and be at most 1")


def between(low: float, high: float, **setting: float) -> Any:
    """The value of the one keyword, if it lies in [low, high]."""
    return _require(setting, lambda value: low <= value <= high, f"must lie between {low:g} and {high:g}")


def between_or_inf(low: float, high: float, **setting: float) -> Any:
    """The value of the one keyword, if it lies in (0, ∞) and in [low, high], or is infinite."""
    positive(**setting)
    return _require(
        setting, lambda value: low <= value <= high or value == math.inf, f"must lie between {low:g} and {high:g}, or be inf"
    )


def at_most(high: float, **setting: float) -> Any:
    """The value of the one keyword, if it lies in (−∞, high]."""
    most = f"{high:,.15g}" if high < 1e15 else f"{high:g}"
    return _require(setting, lambda value: value <= high, f"must be at most {most}")


def finite(**setting: float) -> Any:
    """The value of the one keyword, if it is a number and not infinite."""
    return _require(setting, lambda value: abs(value) < math.inf, "must be finite")


def below_one(**setting: float) -> Any:
    """The value of the one keyword, if it lies in [0, 1)."""
    return _require(setting, lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def below_half(**setting: float) -> Any:
    """The value of the one keyword, if it lies in [0, 0.5)."""
    return _require(setting, lambda value: 0 <= value < 0.5, "must be at least 0 and below 0.5, since it counts at both ends")


def inside_one(**setting: float) -> Any:
    """The value of the one keyword, if it lies in (0, 1)."""
    positive(**setting)
    return below_one(**setting)


def one_of(options: Collection[str], **setting: str) -> Any:
    """The value of the one keyword, if it is among `options`; else an error that suggests the nearest."""
    (name, value), *_ = setting.items()
    if value in options:
        return value
    raise ConfigError(f"{name}={shown(value)} is not known; {suggest(str(value), options)}")


def suggest(word: str, options: Iterable[str]) -> str:
    """'did you mean x?', or the list of `options` where none comes near; of many options the nearest."""
    options = sorted(options)
    if near := difflib.get_close_matches(word, options, n=1, cutoff=0.6):
        return f"did you mean {near[0]}?"
    if len(options) > MOST_NAMED:
        few = difflib.get_close_matches(word, options, n=FEW, cutoff=0.0)
        return f"the nearest of {len(options)} are: {', '.join(few)}"
    return f"choose one of: {', '.join(options)}"


def suggest_setting(name: str, names: Iterable[str], also: Mapping[str, str]) -> str:
    """What to say of a dotted name that no setting has: the settings of nearly that name, in the same group or of any other.

    `also` are settings by what other programs call them. A list of names is that of one group, never of all.
    """
    group, _, last = name.rpartition(".")
    own = {known.rpartition(".")[2]: known for known in names if known.rpartition(".")[0] == group}
    namesakes = sorted(known for known in names if known.rpartition(".")[2] == last)
    typed = difflib.get_close_matches(last, own, n=1, cutoff=ALIKE) if group else []
    alike = [] if own and group else difflib.get_close_matches(name, sorted(names), n=1, cutoff=ALIKE)
    near = [also[last]] if last in also else [own[word] for word in typed] or namesakes or alike
    if near:
        return f"did you mean {' or '.join(near)}?"
    if group and own:
        return f"the settings of {group} are: {', '.join(sorted(own))}"
    return f"{command()} --help lists the settings"


def shown(value: object) -> str:
    """A value for a sentence, cut where it is long."""
    text = str(value)
    return text if len(text) <= LONG else f"{text[: LONG - 20]}… ({len(text)} characters)"


def command() -> str:
    """How this program was called, for a sentence that says what to type."""
    typed = Path(sys.argv[0] if sys.argv else "")
    if typed.name == "__main__.py" and typed.parent.name == "fedlora":
        return "python -m fedlora"
    return "fedlora" if typed.name.removesuffix(".exe") == "fedlora" else "python run.py"


def _require(setting: dict[str, float], holds: Any, demand: str) -> Any:
    (name, value), *_ = setting.items()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={shown(value)} is not a number; it {demand}")
    if not holds(value):  # NaN fails every comparison, so it is refused here too
        raise ConfigError(f"{name}={shown(value)} is out of range; it {demand}")
    return value
