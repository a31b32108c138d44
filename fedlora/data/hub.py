"""Examples from the Hugging Face hub, or from a local folder that `datasets` can read or has saved.

    python run.py dataset=hub dataset.path=stanfordnlp/sst2 dataset.text=sentence dataset.test=validation

Needs the optional package: pip install 'fedlora[hub]'. Class names are those of a ClassLabel feature, else the values
that occur in training.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import check
from fedlora.check import ConfigError
from fedlora.data import _file, _table
from fedlora.data._table import Table
from fedlora.data._text import one_line
from fedlora.data.examples import Dataset

if TYPE_CHECKING:
    from fedlora.config import DatasetConfig


def load(config: DatasetConfig, seed: int) -> Dataset:
    """The dataset of the split `config.train_split` and, where given, the split `config.test`.

    Raises ConfigError where the package, the dataset, a split or a column cannot be had.
    """
    splits = _fetched(config)
    train = _split("dataset.train_split", config.train_split, splits, config)
    test = _split("dataset.test", config.test, splits, config) if config.test else None
    return _table.dataset(config, train, test)


def _fetched(config: DatasetConfig) -> dict[str, Any]:
    """The splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("dataset=hub needs a package that is not installed; pip install 'fedlora[hub]'") from error
    _file.locate_folder("dataset.path", str(config.path))
    try:
        folder = Path(str(config.path)).expanduser()
        if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):  # left by save_to_disk
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else str(config.path), config.subset)
    except Exception as error:  # network, hub, file formats: each of the libraries below has exceptions of its own
        subset = f" dataset.subset={config.subset}" if config.subset else ""
        raise ConfigError(
            f"dataset.path={config.path}{subset} cannot be loaded ({one_line(error.__cause__ or error)}); correct the "
            "name or the connection, or name a local folder"
        ) from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if not splits:
        raise ConfigError(f"dataset.path={config.path} holds no split; name a dataset that has one")
    return splits


def _split(setting: str, name: str, splits: dict[str, Any], config: DatasetConfig) -> Table:
    import datasets

    check.one_of(splits, **{setting: name})
    split = splits[name].flatten()  # a struct's columns get its name and a dot in front, as in a file
    source = f"{setting}={name}"
    label = split.features.get(config.label)
    declared = label.names if isinstance(label, datasets.ClassLabel) else None

    def column(column_name: str) -> list[Any]:
        feature = split.features[column_name]
        if column_name == config.image:
            if not isinstance(feature, datasets.Image):
                raise ConfigError(f"dataset.image={column_name} is not an image feature of {source}; name one that is")
            raw = split.cast_column(column_name, datasets.Image(decode=False))
            return [_undecoded(image) for image in raw[column_name]]
        values = list(split[column_name])
        if isinstance(feature, datasets.ClassLabel):
            if -1 in values:  # how the hub marks test sets whose labels are kept secret
                raise ConfigError(f"{source} of dataset.path={config.path} has unlabelled rows; name a split with labels")
            known = range(len(feature.names))
            if row := next((row for row, value in enumerate(values, 1) if value is not None and value not in known), 0):
                raise ConfigError(
                    f"the column {column_name} of {source} is {values[row - 1]} in row {row}, and its ClassLabel has "
                    f"{len(known)} names; correct the labels or the names"
                )
            return [None if value is None else feature.names[value] for value in values]
        return values

    return Table(source, split.column_names, column, classes=declared)


def _undecoded(image: dict[str, Any] | None) -> Any:
    """The path or the bytes of an image that `datasets` has not decoded."""
    if image is None:
        return None
    return image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
