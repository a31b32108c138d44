"""CSV and TSV: rows of fields, each with as many as there are columns, and errors that name the line to mend."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedlora.check import ConfigError
from fedlora.data._table import Columns
from fedlora.data._text import decoded
from fedlora.data.labels import quoted

if TYPE_CHECKING:
    from fedlora.config import DatasetConfig

CURE = "or give the data as JSON Lines or Parquet"


def comma(source: str, content: bytes, config: DatasetConfig) -> Columns:
    """The names of a CSV's columns, and their values by name. Raises ConfigError for what is not well-formed."""
    return _read(source, content, config, delimiter=",")


def tab(source: str, content: bytes, config: DatasetConfig) -> Columns:
    """The same of a TSV, which has no quoting."""
    return _read(source, content, config, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read(source: str, content: bytes, config: DatasetConfig, **dialect: Any) -> Columns:
    text = decoded(source, content)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    lines: list[list[str]] = []
    names = list(config.columns)
    first = 1  # line in which the row begins; it ends in line rows.line_num
    try:
        with _fields_of(len(text)):
            for fields in rows:
                if fields and not names:
                    names = _header(source, fields, config, dialect["delimiter"])
                elif fields:  # else a blank line
                    _require_width(source, fields, names, first, rows.line_num)
                    lines.append(fields)
                first = rows.line_num + 1
    except csv.Error as error:
        line, why = _fault(text, first, rows.line_num, str(error))
        raise ConfigError(f"{source} is malformed in line {line} ({why}); mend that line, {CURE}") from error
    if lines and lines[0] == config.columns:
        raise ConfigError(f"{source} has a header line, which dataset.columns repeats; remove dataset.columns")
    return names, lambda name: [fields[names.index(name)] for fields in lines]


@contextmanager
def _fields_of(length: int) -> Iterator[None]:
    """Within, a field may have `length` characters; Python's own limit of 131,072 is for all its readers, and comes back."""
    before = csv.field_size_limit()
    csv.field_size_limit(max(before, length))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _require_width(source: str, fields: list[str], names: list[str], first: int, last: int) -> None:
    if len(fields) != len(names):
        where = f"line {first}" if first == last else f"lines {first} to {last}, which a quoted field holds together"
        raise ConfigError(
            f"{source} has {len(fields)} fields in {where}, and {len(names)} columns ({_shown(names)}); mend that line, {CURE}"
        )


def _fault(text: str, first: int, last: int, error: str) -> tuple[int, str]:
    """The line to mend in a row that begins in line `first` and fails in line `last`, and why.

    A quotation mark that is not closed makes a field of all that follows, up to the next one: the fault is where it opens.
    """
    row = "".join(list(io.StringIO(text, newline=""))[first - 1 :])
    opened = _faulty_quote(row)
    if opened is None:
        return last, error
    line = first + len(io.StringIO(row[:opened] + ".", newline="").readlines()) - 1
    if error == "unexpected end of data":
        return line, "the quotation mark that opens a field there is never closed"
    return line, f"the quotation mark that opens a field there is followed by one in line {last} that does not end the field"


def _faulty_quote(row: str) -> int | None:
    """Where the first quoted field of a row opens that is not closed at its end."""
    at = 0
    while at < len(row):
        if row[at] == '"':
            closed = re.compile(r'"(?:[^"]|"")*+"').match(row, at)
            if closed is None or row[closed.end() : closed.end() + 1] not in (",", "\r", "\n", ""):
                return at
            at = closed.end()
        end = re.compile(r"[,\r\n]").search(row, at)
        if end is None or end[0] != ",":
            return None
        at = end.end()
    return None


def _header(source: str, fields: list[str], config: DatasetConfig, delimiter: str) -> list[str]:
    """The first line as the names of the columns, unless it looks like an example: it has no name that is asked for."""
    wanted = [name for name in (config.text, config.image, config.label) if name]
    if set(wanted).intersection(fields):
        return fields
    kinds = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
    for other, kind in kinds.items():
        if len(fields) == 1 and other != delimiter and set(wanted).intersection(fields[0].split(other)):
            raise ConfigError(
                f"{source} has its fields between {kind}, and its ending says {kinds[delimiter]}; write it with those, or "
                "rename it: .csv is for commas, .tsv for tabs"
            )
    raise ConfigError(
        f"{source} has no column named {' or '.join(wanted)}, its first line is {_shown(fields)}; name columns "
        f"it has, or if that line is an example, give every column a name: dataset.columns=[{','.join(wanted)}]"
    )


def _shown(fields: list[str], most: int = 20) -> str:
    """Fields of a line for an error, long ones cut, and many of them too."""
    return ", ".join(map(quoted, fields[:most])) + (f" … and {len(fields) - most:,} more" if len(fields) > most else "")
