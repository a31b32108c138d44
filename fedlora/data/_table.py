"""From named columns to a `Dataset`: what `files` and `hub` have in common.

Labels, groups and text are words or integers; integers become their digits, so that a CSV (which has only text) and a
Parquet file (which has types) with the same values give the same dataset. No value and an empty one are the same too,
and an error: an example is never dropped in silence.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora import check
from fedlora.check import ConfigError
from fedlora.data import labels
from fedlora.data._text import one_line
from fedlora.data.examples import Dataset, Examples, ordered
from fedlora.data.partition import split_off_test

if TYPE_CHECKING:
    from fedlora.config import DatasetConfig


Columns = tuple[list[str], Callable[[str], list[Any]]]  # names, and the values of the column of a name

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which JSON can write and UTF-8 cannot


@dataclass(frozen=True)
class Table:
    """One file or split with the names of its columns; a column is read only when it is asked for."""

    source: str
    """How errors call it: the setting that named it and its value, such as dataset.path=train.csv."""
    names: Sequence[str]
    column: Callable[[str], Sequence[Any]]
    """The values of a column, None where there is none. An image is a path, its bytes, or a file of them in memory."""
    folder: Path = Path()
    """What the paths of images start from."""
    classes: Sequence[str] | None = None
    """Names of the labels where the source declares them; else those that occur in training."""

    def values(self, setting: str, name: str) -> Sequence[Any]:
        """The values of the column `name`, which the setting `dataset.<setting>` asked for, none of them missing."""
        asked = f"dataset.{setting}={name}"
        if name not in self.names:
            raise ConfigError(f"{asked} is not a column of {self.source}, {self._hint(name)}")
        if list(self.names).count(name) > 1:
            raise ConfigError(f"{asked} names several columns of {self.source}; rename all but one")
        try:
            values = self.column(name)
        except ConfigError:
            raise
        except Exception as error:  # what is in a column is a library's affair, pyarrow's or that of datasets
            raise ConfigError(
                f"{asked} cannot be read from {self.source} ({one_line(error)}); write that column as text or integers"
            ) from error
        for row, value in enumerate(values, start=1):
            if value is None or value == "" or value != value:  # only NaN differs from itself
                raise ConfigError(
                    f"{asked} has no value in row {row} of {self.source} (the first example is "
                    "row 1); fill it in or remove that row"
                )
        return values

    def _hint(self, name: str) -> str:
        """What to say in place of the column `name`, which is not there."""
        inside = [other for other in self.names if other.startswith(f"{name}.")]
        if inside:
            return f"which has columns inside it; name one of: {labels.listed(inside)}"
        near = check.suggest(name, map(labels.plain, self.names))
        if near.startswith("did you mean"):
            return f"which has {labels.listed(self.names)}; {near}"
        return f"which has no column like it; choose one of: {labels.listed(self.names)}"

    def words(self, setting: str, name: str) -> list[str]:
        """The column as text."""
        values = self.values(setting, name)
        for row, value in enumerate(values, start=1):
            if not isinstance(value, str | int) or isinstance(value, bool):
                raise ConfigError(
                    f"dataset.{setting}={name} is {labels.cut(repr(value))} in row {row} of {self.source}, neither text nor an "
                    "integer; convert the column to one of them or name another"
                )
            if isinstance(value, str) and SURROGATE.search(value):
                raise ConfigError(
                    f"dataset.{setting}={name} has half a character (a lone surrogate) in row {row} of {self.source}, in "
                    f"{labels.quoted(value)}; write the character in full or remove it"
                )
        return [str(value) for value in values]

    def images(self, name: str) -> np.ndarray | list[np.ndarray]:
        """The column as pixels: (N, H, W, C) float32 in [0, 1], or a list of (H, W, C) where shapes differ."""
        images = []
        for row, value in enumerate(self.values("image", name), start=1):
            try:
                images.append(_pixels(self.folder / value if isinstance(value, str) else value))
            except Exception as error:  # Pillow's decoders raise whatever the broken bytes led them into
                what = labels.quoted(value, 100) if isinstance(value, str) else "the image"
                raise ConfigError(
                    f"dataset.image={name}: {what} in row {row} of {self.source} cannot be read as an image "
                    f"({getattr(error, 'strerror', None) or one_line(error)}); replace it or remove that row"
                ) from error
        return np.stack(images) if len({image.shape for image in images}) == 1 else images


def dataset(config: DatasetConfig, train: Table | None, test: Table | None) -> Dataset:
    """The dataset of a training table and a test table; without the latter, `config.test_fraction` is split off.

    With `config.classes` either may lack labels, or be absent: no examples then.
    Raises ConfigError for a column that is not there, a value that is missing or unusable, labels that are no classes, and
    a label that is none of the classes, which are those of the training table unless they are named.
    """
    if config.text == config.label:
        raise ConfigError(f"dataset.text={config.text} is the column of the label too; name another, or dataset.label")
    given = train.words("label", config.label) if train else []
    if train and not given:
        raise ConfigError(f"{train.source} holds no examples; name data that has some")
    classes = _classes(config, train, given)
    known = config.classes or given
    examples = _examples(config, train, classes, known) if train else None
    tests = _examples(replace(config, group=None), test, classes, known) if test else None
    kind = "text" if config.text else "image"
    if examples is not None and tests is None and config.test_fraction:
        kept, held = split_off_test(examples.labels, config.test_fraction)
        return Dataset(kind, classes, examples.take(kept), examples.take(held))
    none = (examples or tests or Examples([], np.zeros(0, np.int64))).take(np.zeros(0, np.int64))
    return Dataset(kind, classes, none if examples is None else examples, none if tests is None else tests)


def _classes(config: DatasetConfig, train: Table | None, given: list[str]) -> list[str]:
    """The classes in the order in which `dataset.classes` or the source names them, else those of the training data, sorted."""
    if len(set(config.classes)) < len(config.classes):
        twice = next(name for name in config.classes if config.classes.count(name) > 1)
        raise ConfigError(f"dataset.classes names {labels.quoted(twice)} twice; name each class once")
    if len(config.classes) == 1:
        raise ConfigError(f"dataset.classes names only {labels.quoted(config.classes[0])}; a classifier needs two or more")
    named = config.classes or (train.classes if train else None)
    if named:
        return list(named)
    if train:
        labels.require_classes(f"dataset.label={config.label}", train.source, given)
    return ordered(given)


def _examples(config: DatasetConfig, table: Table, classes: list[str], known: Collection[str]) -> Examples:
    given = table.words("label", config.label)
    if unknown := set(given).difference(known):
        row = next(row for row, label in enumerate(given, start=1) if label in unknown)
        reason = (
            f"none of dataset.classes={labels.cut(','.join(config.classes), 200)}; correct the one or the other"
            if config.classes
            else "a class without training examples; add some or remove it from the test set"
        )
        raise ConfigError(
            f"dataset.label={config.label} is {labels.quoted(given[row - 1])} in row {row} of {table.source}, {reason}"
        )
    groups = np.array(table.words("group", config.group)) if config.group else None
    return Examples(_inputs(config, table), _encoded(given, classes), groups)


def _inputs(config: DatasetConfig, table: Table) -> list[str] | np.ndarray | list[np.ndarray]:
    return table.words("text", config.text) if config.text else table.images(str(config.image))


def _encoded(given: list[str], classes: list[str]) -> np.ndarray:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[label] for label in given], np.int64)


def _pixels(file: Any) -> np.ndarray:
    """The pixels of an image (H, W, C), upright, float32 in [0, 1]; C is 1 for grey levels and else 3, RGB."""
    from PIL import Image, ImageOps

    if isinstance(file, bytes):
        file = io.BytesIO(file)
    if not isinstance(file, Path | io.BytesIO):
        raise ValueError(f"{type(file).__name__}, neither a path nor the bytes of an image")
    if isinstance(file, Path) and file.exists() and not file.is_file():  # to open a pipe may wait for ever
        raise ValueError("a folder, a pipe or a device, not a file")
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # convert() would clip these to 255
            return (np.asarray(image, np.float32) / 65535)[..., np.newaxis]
        if image.mode in ("I", "F"):
            raise ValueError("pixels without a fixed range")
        grey = image.mode in ("1", "L", "LA")
        pixels = np.asarray(image.convert("L" if grey else "RGB"), np.float32) / 255
        return pixels[..., np.newaxis] if grey else pixels
