"""Examples from local files: CSV, TSV, JSON Lines and Parquet, told apart by their ending.

    python run.py dataset=files dataset.path=train.csv dataset.text=sentence dataset.test=dev.csv

The same examples give the same dataset in every format. Nothing is guessed: "NA" and "null" are text like any other,
"01" stays "01", and a TSV has no quoting at all (a quotation mark is a character; neither a tab nor a line break can be
part of a text). Lines are checked one by one, so that an error can say which to mend; that is why this file reads with
the standard library, not with pandas, which fills, renames and shifts columns where lines are uneven.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fedlora.check import ConfigError
from fedlora.data import Dataset, _file, _table
from fedlora.data._table import Table

if TYPE_CHECKING:
    from fedlora.config import DatasetConfig


def load(config: DatasetConfig, seed: int) -> Dataset:
    """The dataset of the file `config.path` and, where given, the test file `config.test`.

    Raises ConfigError, which names the file's setting, where a file cannot be read or is not what its ending says.
    """
    train = _read("dataset.path", config.path, config) if config.path else None  # a server of real devices has none
    test = _read("dataset.test", config.test, config) if config.test else None
    return _table.dataset(config, train, test)


def _read(setting: str, name: str, config: DatasetConfig) -> Table:
    path, content = _file.read(setting, name)
    source = f"{setting}={name}"
    names, column = READERS[path.suffix.lower()](source, content, config)
    return Table(source, names, column, path.parent)


Columns = tuple[list[str], Callable[[str], list[Any]]]  # names, and the values of the column of a name


def _delimited(source: str, content: bytes, config: DatasetConfig, **dialect: Any) -> Columns:
    rows = csv.reader(io.StringIO(_decoded(source, content), newline=""), strict=True, **dialect)
    lines: list[list[str]] = []
    names = list(config.columns)
    try:
        for fields in rows:
            if not fields:  # a blank line
                continue
            if not names:
                names = _header(source, fields, config)
                continue
            if len(fields) != len(names):
                raise ConfigError(
                    f"{source} has {len(fields)} fields in line {rows.line_num} and {len(names)} columns "
                    f"({_shown(names)}); mend that line, or give the data as JSON Lines or Parquet"
                )
            lines.append(fields)
    except csv.Error as error:
        raise ConfigError(
            f"{source} is malformed in line {rows.line_num} ({error}); mend that line, or give the data as JSON Lines "
            "or Parquet"
        ) from error
    if lines and lines[0] == config.columns:
        raise ConfigError(f"{source} has a header line, which dataset.columns repeats; remove dataset.columns")
    return names, lambda name: [fields[names.index(name)] for fields in lines]


def _header(source: str, fields: list[str], config: DatasetConfig) -> list[str]:
    """The first line as the names of the columns, unless it looks like an example: it has no name that is asked for."""
    wanted = [name for name in (config.text, config.image, config.label) if name]
    if not set(wanted).intersection(fields):
        raise ConfigError(
            f"{source} has no column named {' or '.join(wanted)}, its first line is {_shown(fields)}; name columns "
            f"it has, or if that line is an example, give every column a name: dataset.columns=[{','.join(wanted)}]"
        )
    return fields


def _csv(source: str, content: bytes, config: DatasetConfig) -> Columns:
    return _delimited(source, content, config)


def _tsv(source: str, content: bytes, config: DatasetConfig) -> Columns:
    return _delimited(source, content, config, delimiter="\t", quoting=csv.QUOTE_NONE)


def _json_lines(source: str, content: bytes, config: DatasetConfig) -> Columns:
    _refuse_columns(source, config)
    records = []
    # Not splitlines(), which also splits at characters that a JSON string may hold as they are, such as U+2028.
    for number, line in enumerate(_decoded(source, content).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            raise ConfigError(f"{source} is not JSON in line {number} ({why}); mend that line") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{source} holds no object in line {number}; write one {{…}} a line, without a list around them")
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    return names, lambda name: [record.get(name) for record in records]


def _parquet(source: str, content: bytes, config: DatasetConfig) -> Columns:
    import pyarrow
    from pyarrow import parquet

    _refuse_columns(source, config)
    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{source} is not a Parquet file, or a damaged one; write it again") from error
    return table.column_names, lambda name: table.column(name).to_pylist()


READERS: dict[str, Callable[[str, bytes, DatasetConfig], Columns]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}


def _decoded(source: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source} is not UTF-8 in line {line}; save it with that encoding") from error


def _refuse_columns(source: str, config: DatasetConfig) -> None:
    if config.columns:
        raise ConfigError(f"dataset.columns={config.columns} is for CSV and TSV, {source} names its own; remove it")


def _shown(fields: Iterable[str]) -> str:
    """Fields of a line for an error, long ones cut."""
    return ", ".join(f"'{field[:37]}…'" if len(field) > 40 else f"'{field}'" for field in fields)
