"""The classes of a dataset: how many examples each has, which names look alike, and labels that are no classes.

Names look alike where they differ only in case, in spaces, in invisible characters or in how a number is written: "pos",
"Pos" and "pos ", or "1" and "1.0". They are told, never merged: they may be meant.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.check import ConfigError

if TYPE_CHECKING:
    from fedlora.data.examples import Dataset

SHOWN = 10  # names in one line of the terminal
FEW = 50  # rows: with so many or fewer, each may have a class of its own


def counts(dataset: Dataset) -> dict[str, int]:
    """Class → its training examples that are here, in the order of the model's outputs; 0 with deploy, where there are none."""
    found = np.bincount(dataset.train.labels, minlength=len(dataset.classes))
    return dict(zip(dataset.classes, found.tolist(), strict=True))


def alike(classes: Iterable[str]) -> list[list[str]]:
    """Groups of two names or more that look alike, in the order of their first names."""
    groups: dict[Any, list[str]] = {}
    for name in dict.fromkeys(classes):
        groups.setdefault(_key(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def notes(dataset: Dataset) -> list[str]:
    """A sentence about classes whose names look alike, or none."""
    groups = [" and ".join(_told_apart(group)) for group in alike(dataset.classes)]
    if not groups:
        return []
    return [f"classes whose names look alike are trained as different ones: {_cut(groups, '; ')}; if not, mend the labels"]


def shown(dataset: Dataset) -> str:
    """The classes on one line, the first ten of many, each with its training examples where there are any here."""
    return _cut([f"{plain(name)} × {count}" if len(dataset.train) else plain(name) for name, count in counts(dataset).items()])


def derived(dataset: Dataset) -> list[tuple[str, str, str]]:
    """The classes for the plan, as (name, value, reason), and a warning where some look alike."""
    each = ", with the training examples of each" if len(dataset.train) else ""
    reason = f"{len(dataset.classes)} in the order of the model's outputs{each}"
    rows = [("classes", shown(dataset), reason)]
    same = [", ".join(_told_apart(group)) for group in alike(dataset.classes)]
    if same:
        reason = "names that differ only in case, spaces or how a number is written; if they mean the same, mend the labels"
        rows.append(("warning", f"classes {_cut(same, '; ')}", reason))
    return rows


def require_classes(setting: str, source: str, labels: Sequence[str]) -> None:
    """Raise ConfigError where `labels` of more than 50 rows have a different value for more than half of the rows.

    Those are answers to instructions, or measurements. A dataset that says which classes it has is not asked this.
    """
    distinct = len(set(labels))
    if len(labels) > FEW and 2 * distinct > len(labels):
        raise ConfigError(
            f"{setting} has {distinct} different values in the {len(labels)} rows of {source}: texts or numbers, not classes; "
            "fedlora trains classifiers, and language models are not possible yet; name a column with few different values, "
            "or if these are classes, name them all by dataset.classes"
        )


def quoted(word: str, length: int = 40) -> str:
    """A word of the data for a sentence: in quotes, on one line, what does not print as its code, cut at `length`."""
    return repr(cut(word, length))


def cut(text: str, length: int = 40) -> str:
    """The text, or its beginning and an ellipsis where it has more than `length` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}…"


def plain(word: str) -> str:
    """The same without quotes where the word can do without them."""
    bare = word.isprintable() and word == word.strip() and len(word) <= 40 and word and not set(word) & set(",'\"")
    return word if bare else quoted(word)


def listed(words: Sequence[str], most: int = 20) -> str:
    """Words of the data for a sentence, sorted; what follows the first `most` is counted."""
    return _cut([plain(word) for word in sorted(words)], most=most)


def _told_apart(group: list[str]) -> list[str]:
    """Names that look alike, in quotes; with codes beyond ASCII where they would print as the same."""
    same = len({unicodedata.normalize("NFC", name) for name in group}) < len(group)
    return [ascii(cut(name)) if same else quoted(name) for name in group]


def _cut(words: Sequence[str], separator: str = ", ", most: int = SHOWN) -> str:
    more = f" … and {len(words) - most:,} more" if len(words) > most else ""
    return separator.join(words[:most]) + more


def _key(name: str) -> Any:
    """What names that look alike have in common."""
    text = "".join(letter for letter in unicodedata.normalize("NFKC", name) if unicodedata.category(letter) != "Cf")
    text = " ".join(text.split()).casefold()
    try:
        number = Decimal(text)  # equal, and of one hash, however it is written
    except InvalidOperation:
        return text
    return number if number.is_finite() else text
