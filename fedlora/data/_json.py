"""JSON: one object an example, one below the other (JSON Lines) or in a list, each on one line or on several.

Objects inside an example give columns with a dot: {"review": {"text": "fine"}} has the column review.text. A list inside a
list is read as if its examples stood in the outer one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedlora.check import ConfigError
from fedlora.data._table import Columns
from fedlora.data._text import decoded
from fedlora.data.labels import listed, quoted

if TYPE_CHECKING:
    from fedlora.config import DatasetConfig

BLANK = re.compile(r"[ \t\n\r]*")  # what JSON allows between values; U+2028 and its like may stand in its strings


class _Doubled(dict[str, Any]):
    """An object with a name that it has twice."""

    name: str


def read(source: str, content: bytes, config: DatasetConfig) -> Columns:
    """The names of all columns, and their values by name, None where an example lacks it.

    Raises ConfigError for what is no JSON, an example that is no object, and an object with a name twice.
    """
    records: list[dict[str, Any]] = []
    for number, example in enumerate(_examples(source, decoded(source, content)), start=1):
        try:
            records.append(_flat(example))
        except KeyError as error:
            raise ConfigError(f"{source} has the name {quoted(error.args[0])} twice in row {number}; remove one") from error
        except RecursionError as error:
            raise ConfigError(f"{source} nests objects too deeply in row {number}; write that one flat") from error
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        raise ConfigError(f"{source} holds no examples; name data that has some")
    wanted = [name for name in (config.text, config.image, config.label) if name]
    if len(records) == 1 and not set(wanted).intersection(names):
        raise ConfigError(
            f"{source} holds one object ({listed(names, 10)}) without {' or '.join(wanted)}; write the examples as objects, "
            "one a line or in a list"
        )
    return names, lambda name: [record.get(name) for record in records]


def _examples(source: str, text: str) -> Iterator[dict[str, Any]]:
    """The objects in their order."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
    at = BLANK.match(text, 0).end()  # type: ignore[union-attr]  # matches always
    while at < len(text):
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            position = getattr(error, "pos", at)
            why = "a comma between objects that are in no list" if text[at] == "," else getattr(error, "msg", str(error))
            lines = sorted({_line(text, len(text[:position].rstrip())), _line(text, min(position, len(text.rstrip()) - 1))})
            where = f"line {lines[0]}" if len(lines) == 1 else f"lines {lines[0]} to {lines[1]}"
            raise ConfigError(f"{source} is not JSON in {where} ({why}); mend that line") from error
        for example in _items(value):
            if not isinstance(example, dict):
                raise ConfigError(
                    f"{source} holds no object in {_place(text, at, end)} but {quoted(str(example))}; write each example as "
                    'an object, {"column": value, …}'
                )
            yield example
        at = BLANK.match(text, end).end()  # type: ignore[union-attr]


def _items(value: Any) -> Iterator[Any]:
    """The value, or if it is a list what is in it, and in the lists in it."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += reversed(item)
        else:
            yield item


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        record = _Doubled(record)
        record.name = next(name for name in names if names.count(name) > 1)
    return record


def _integer(digits: str) -> int | str:
    """An integer; one of thousands of digits stays text, since Python refuses to convert it, and only its digits are used."""
    return int(digits) if len(digits) < 4000 else digits


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """The values by the names of their columns. Raises KeyError with a name that occurs twice."""
    flat: dict[str, Any] = {}
    for name, value in _columns(record):
        if name in flat:
            raise KeyError(name)
        flat[name] = value
    return flat


def _columns(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(record, _Doubled):
        raise KeyError(prefix + record.name)
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _columns(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _place(text: str, start: int, end: int) -> str:
    first, last = _line(text, start), _line(text, end - 1)
    return f"line {first}" if first == last else f"lines {first} to {last}"


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, max(position, 0)) + 1
