"""What a user typed, as Hydra's grammar takes it: values of text settings are put in quotes.

Hydra reads `name=1e5` as a number, and `dataset.path=reviews (1).csv` not at all. Which settings are text their
declarations say, so their values stay what was typed. All other values are left to Hydra.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import check
from fedlora.check import ConfigError
from fedlora.config import declared

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

MOST_DIGITS = 300  # of a number: Python reads no more than 4300, and a float holds 308
MOST_CELLS = 10_000  # of a sweep
NAME = re.compile(r"[\w.-]+")
FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort)\(.*\)")  # of Hydra's grammar of sweeps
TEXT, TEXTS = (str, str | None), (list[str],)
WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text",
    list[str]: "a list, such as [a,b]", list[int]: "a list of whole numbers, such as [1,2]",
}  # fmt: skip


def parsed(arguments: list[str], multirun: bool) -> list[Override]:
    """The arguments as Hydra parses them. Raises ConfigError for the first that is not setting=value."""
    return [_parsed(argument, multirun) for argument in arguments]


def _parsed(argument: str, multirun: bool) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for character in argument:
        if unicodedata.category(character) in ("Cc", "Cs"):  # a line break, or what is not Unicode
            raise ConfigError(f"{argument!a} has the character U+{ord(character):04X}, which no setting may have; remove it")
    key, equals, value = argument.partition("=")
    if not NAME.fullmatch(key):
        raise ConfigError(f"{check.shown(argument)} is not setting=value; write the name of a setting, = and its value")
    if not equals:
        example = declared()[key].default if key in declared() else None
        such = "" if example in (None, "", []) or isinstance(example, dict) else f", such as {key}={example}"
        raise ConfigError(f"{check.shown(key)} has no value; write {check.shown(key)}=<value>{such}")
    if _type(key) not in (*TEXT, *TEXTS) and re.search(rf"\d{{{MOST_DIGITS},}}", value):
        raise ConfigError(f"{key}={check.shown(value)} has a number of {MOST_DIGITS} digits or more; no setting takes it")
    try:
        override = OverridesParser.create().parse_override(f"{key}={quoted(key, value, multirun)}")
    except (HydraException, RecursionError) as error:
        if _type(key) not in (None, Any, *TEXT):
            raise wrong_type(key, value) from error
        raise ConfigError(
            f"{key}={check.shown(value)} cannot be read; put quotes around a value with special characters, and around these "
            f"for your shell: \"{key}='…'\""
        ) from error
    if override.is_sweep_override() and not multirun:
        quotes = _type(key) in TEXT and "'" not in value
        quote = f", or put quotes around one value that has commas: \"{key}='{value}'\"" if quotes else ""
        raise ConfigError(f"{check.shown(argument)} names several values; add -m to run one cell for each{quote}")
    return override


def values(override: Override) -> list[str]:
    """The values that a sweep gives a setting, each as it is typed; at most one more than `MOST_CELLS`.

    Raises ConfigError where there is none, or where they cannot be counted.
    """
    from hydra.errors import HydraException

    typed = check.shown(override.input_line)
    try:
        found = list(islice(override.sweep_string_iterator(), MOST_CELLS + 1)) if override.is_discrete_sweep() else []
    except (HydraException, ValueError, TypeError, OverflowError) as error:
        raise ConfigError(f"{typed} cannot be swept ({check.reason(error)}); name the values, with commas between") from error
    if not found:
        raise ConfigError(f"{typed} gives no value; name the values, with commas between")
    return found


def quoted(key: str, value: str, multirun: bool) -> str:
    """The value as Hydra is to read it: quoted where the setting is text and Hydra might take it for something else."""
    kind = _type(key)
    if kind in TEXTS:
        return ",".join(_list(part) for part in pieces(value))
    if kind not in TEXT or "${" in value or (multirun and FUNCTION.fullmatch(value)):
        return value
    if "," in value and not _is_path(value):
        return ",".join(_text(part.strip()) for part in pieces(value))
    return _text(value)


def pieces(value: str) -> Iterator[str]:
    """The parts between commas, of which those in quotes or brackets are none."""
    start, depth, quote, before = 0, 0, "", ""
    for place, character in enumerate(value):
        if quote:
            quote = "" if character == quote and before != "\\" else quote
        elif character in "'\"" and not value[start:place].strip(" ["):
            quote = character
        elif character in "[]":
            depth += 1 if character == "[" else -1
        elif character == "," and depth <= 0:
            yield value[start:place]
            start = place + 1
        before = character
    yield value[start:]


def _list(text: str) -> str:
    """A list, each of its elements a text; anything else is left as it is."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or "${" in text:
        return text
    inner = text[1:-1]
    return f"[{','.join(_text(part.strip(), null=False) for part in pieces(inner))}]" if inner.strip() else "[]"


def _text(text: str, null: bool = True) -> str:
    """One text in quotes, unless it is in quotes already, is empty, or is the null that unsets a setting."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if not text or (null and text == "null") or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        return text
    return QuotedString(text, Quote.single).with_quotes()


def _is_path(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such home, or a character that no file name has
        return False


def _type(key: str) -> Any:
    return declared()[key].type if key in declared() else None


def wrong_type(name: str, value: str) -> ConfigError:
    """The error for a value that is not of the setting's type, in our own words."""
    setting = declared().get(name)
    if setting is None:
        return ConfigError(f"{name}={value} cannot be set so; {check.command()} --help lists the settings")
    kind = next((kind for kind in WORDS if setting.type in (kind, kind | None)), str)
    optional = " or null" if setting.type == kind | None else ""
    default = "none" if setting.default is None else setting.default
    return ConfigError(f"{name}={check.shown(value)} is not {WORDS[kind]}{optional} (default {default})")
