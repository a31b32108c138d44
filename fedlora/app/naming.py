"""Names of folders: made from settings, so that equal names mean equal numbers, or chosen by the user."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from fedlora.check import ConfigError
from fedlora.config import Config
from fedlora.identity import flat, identifies

LONGEST, CUT = 110, 100  # characters, for people
BYTES = 240  # of what is never cut: file systems end at 255


def changed(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, by dotted name; the strategy's own against that strategy's defaults."""
    usual = _usual(config.strategy["name"])
    return {name: value for name, value in flat(config).items() if value != usual[name]}


@cache
def _usual(strategy: str) -> dict[str, Any]:
    """Every setting at its default, as `flat` has them."""
    return flat(Config(strategy={"name": strategy}))


def name_of(config: Config) -> str:
    """The folder of a run in `results`: what the user calls it, or a name from its settings. Raises as `check_name`."""
    return run_name(config) if config.name is None else check_name(config.name)


def run_name(config: Config, swept: Sequence[str] = ()) -> str:
    """A folder's name from the settings that can change a number, so that equal names mean equal numbers.

    The strategy comes first, then the `swept` settings, whole and at their defaults too, then the others that differ from
    their defaults. Of a path its last part is shown.
    """
    values, parts = flat(config), [("", str(config.strategy["name"]))]
    parts += [(name, values[name]) for name in swept if name in values and name != "strategy.name"]
    kept = len(_join(parts, _short))
    parts += [(name, value) for name, value in changed(config).items() if identifies(name) and name not in swept]
    return _named(_join(parts, _short), _join(parts, _whole), kept)


def sweep_name(cells: Sequence[Config], swept: Sequence[str]) -> str:
    """A folder's name from all in which the cells differ, with the values, and all that they share and is not a default."""
    values = [flat(cell) for cell in cells]
    same = sorted({str(cell.strategy["name"]) for cell in cells})
    parts: list[tuple[str, Any]] = [("", same[0])] if len(same) == 1 else []
    for name in swept:
        distinct = [own[name] for own in values if name in own]
        parts.append((name, [value for place, value in enumerate(distinct) if value not in distinct[:place]]))
    parts += [(name, value) for name, value in changed(cells[0]).items() if identifies(name) and name not in swept]
    return _named(_join(parts, _short), _join(parts, _whole), 0)


def folder_name(text: str) -> str:
    """The text as the name of a folder: no separators, at most 110 characters, different for different texts."""
    return _named(text, text, 0)


def check_name(name: str) -> str:
    """The name that a user gives a run or a sweep. Raises ConfigError for one that is none, or leads out of `results`."""
    parts = name.split("/")
    if not name.isprintable() or name != name.strip() or any(part in ("", ".", "..") for part in parts):
        raise ConfigError(
            f"name={name!r} names no folder in results; give a name such as name=first, or name=study/first, without . and .."
        )
    return name


def setting(name: str, value: Any) -> str:
    """A setting as a user writes it: rounds=30, strategy=fedsvd."""
    return f"{name.removesuffix('.name')}={_whole(value)}"


def _join(parts: Sequence[tuple[str, Any]], text: Any) -> str:
    return ",".join(f"{name.removesuffix('.name')}={text(value)}" if name else str(value) for name, value in parts)


def _whole(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else str(value)
    if isinstance(value, list):
        return ",".join(map(_whole, value))
    if isinstance(value, dict):
        return ",".join(f"{key}:{_whole(share)}" for key, share in value.items())
    return str(value)


def _short(value: Any) -> str:
    """The same, of each path its last part."""
    if isinstance(value, list):
        return ",".join(map(_short, value))
    return PurePosixPath(value).name if isinstance(value, str) else _whole(value)


def _named(short: str, whole: str, kept: int) -> str:
    """The short text as a folder's name, with a digest of the whole one where it does not say all of it.

    It is cut where it is long, but not within its first `kept` characters.
    """
    name = re.sub(r"[^\w.,=+-]+", "_", short)
    if len(name) > LONGEST:
        name = name[: max(CUT, kept)]
    name = name.encode()[:BYTES].decode(errors="ignore")
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
