"""How a setting is declared: its default, what `--help` says of it, which values it takes, and what it is read with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any, NamedTuple

FINITE = 1e30  # the most that a number may be whose bound is of no interest: float32 still holds it
MULTIRUN = "-m"  # as the key of a condition: a sweep


class Condition(NamedTuple):
    """What another setting must be for a setting to be read: one of `values`, or none of them.

    Without values it must be set at all: not null, 0 or empty.
    """

    key: str
    values: tuple[str, ...] = ()
    negated: bool = False

    @classmethod
    def of(cls, text: str) -> Condition:
        """From `dataset=files|hub`, `dataset!=digits`, `train.epochs=null`, `deploy` (any value) or `-m` (a sweep)."""
        key, _, values = text.partition("=")
        return cls(key.removesuffix("!"), tuple(filter(None, values.split("|"))), key.endswith("!"))

    def holds(self, value: Any) -> bool:
        """Whether the other setting's value is one that this asks for."""
        if not self.values:
            return bool(value)
        return (as_text(value) in self.values) != self.negated

    @property
    def unset(self) -> bool:
        """Whether the other setting must be null."""
        return self.values == ("null",) and not self.negated


def setting(
    default: Any,
    help: str,
    *,
    takes: Callable[..., Any] | None = None,
    most: float = math.inf,
    only: str | tuple[str, ...] = (),
    also: str = "",
) -> Any:
    """A dataclass field with its default and the sentence that `--help` prints.

    `takes` is a check of `fedlora.check`, called with the setting as its one keyword unless the value is null; `most` is the
    largest number. `only` names what must be chosen for the setting to be read, as `Condition.of` has it; all of several.
    The command line refuses a setting that is not read, and `--help` says what it is read with. `also` are names that other
    programs give the same thing, with spaces between them: who types one is told ours.
    """
    conditions = tuple(Condition.of(text) for text in ((only,) if isinstance(only, str) else only))
    metadata = {"help": help, "takes": takes, "most": most, "only": conditions, "also": tuple(also.split())}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def as_text(value: Any) -> str:
    """A value as it is typed: null, true, false, or itself."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
