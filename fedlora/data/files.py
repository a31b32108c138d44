"""Examples from local files: CSV, TSV, JSON and Parquet, told apart by their ending.

    python run.py dataset=files dataset.path=train.csv dataset.text=sentence dataset.test=dev.csv

The same examples give the same dataset in every format. Nothing is guessed: "NA" and "null" are text like any other,
"01" stays "01", and a TSV has no quoting at all (a quotation mark is a character; neither a tab nor a line break can be
part of a text). Lines are checked one by one, so that an error can say which to mend; that is why this file reads with
the standard library, not with pandas, which fills, renames and shifts columns where lines are uneven.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedlora.check import ConfigError
from fedlora.data import _delimited, _file, _json, _table
from fedlora.data._table import Columns, Table
from fedlora.data._text import one_line
from fedlora.data.examples import Dataset

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
    source = _file.said(setting, name)
    ending = path.suffix.lower()
    if config.columns and ending not in (".csv", ".tsv"):
        raise ConfigError(f"dataset.columns={config.columns} is for CSV and TSV, {source} names its own; remove it")
    names, column = READERS[ending](source, content, config)
    return Table(source, names, column, path.parent)


def _parquet(source: str, content: bytes, config: DatasetConfig) -> Columns:
    """The columns of a Parquet file; those of a struct have its name and a dot in front, as in JSON."""
    import pyarrow
    from pyarrow import parquet

    try:
        # Threads of pyarrow may still be starting when a refused command ends, which then aborts.
        table = parquet.ParquetFile(pyarrow.BufferReader(content)).read(use_threads=False)
        while any(pyarrow.types.is_struct(column.type) for column in table.columns):
            table = table.flatten()
    except Exception as error:  # of pyarrow, and of whatever it meets in a damaged file
        reason = f"{source} is not a Parquet file, or a damaged one ({one_line(error)})"
        raise ConfigError(f"{reason}; write it again, or rename it if it holds something else") from error
    return table.column_names, lambda name: table.column(name).to_pylist()


READERS: dict[str, Callable[[str, bytes, DatasetConfig], Columns]] = {
    ".csv": _delimited.comma,
    ".tsv": _delimited.tab,
    ".jsonl": _json.read,
    ".ndjson": _json.read,
    ".json": _json.read,
    ".parquet": _parquet,
}
