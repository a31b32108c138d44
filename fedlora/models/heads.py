"""A checkpoint's own head and the dataset's classes: matched by name, so that a logit stands for the class that it learned.

model.head=auto          by name, case and spaces aside; a head without names by position; else refused
model.head=position      the checkpoint's first class is the dataset's first, and so on
model.head={neg:0,…}     the checkpoint's class → the dataset's class
model.head=new           the checkpoint's head is left out, and a new one drawn
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedlora import check
from fedlora.check import ConfigError
from fedlora.data import labels

HEADS = ("auto", "position", "new")
NONE = "the checkpoint has none for these classes"
_GENERIC = re.compile(r"label_(\d+)")  # what transformers calls a class that nobody has named
_SINGLE = "single_label_classification"
_SHOWN = 6  # classes that a sentence lists


class Placed(NamedTuple):
    """What becomes of a head."""

    classes: list[str]  # the dataset's class that each logit stands for
    keeps: bool  # whether the checkpoint's own head serves
    why: str
    refusal: str = ""  # why the head cannot serve, if the checkpoint has one


def checked(head: Any) -> None:
    """Raises ConfigError where `model.head` is neither one of HEADS nor a map."""
    if not isinstance(head, Mapping):
        check.one_of(HEADS, **{"model.head": head})


def place(path: str, own: Sequence[str], classes: Sequence[str], head: Any) -> Placed:
    """Which class of the dataset each logit of the checkpoint's head stands for; `own` names the logits as it does."""
    if head == "new":
        return Placed([*classes], False, "drawn anew: model.head=new")
    if isinstance(head, Mapping):
        return _mapped(path, own, classes, {str(name): str(value) for name, value in head.items()})
    if head == "position":
        refusal = "" if len(own) == len(classes) else (
            f"model.head=position, but the head of model.path={path} has {len(own)} classes and the data have "
            f"{len(classes)}; set model.head=new"
        )  # fmt: skip
        why = "the checkpoint has one; its classes are taken by position (model.head=position)"
        return Placed([*classes], True, why, refusal)
    return _by_name(path, own, classes)


def refuse(path: str, placed: Placed, problem: str | None, head: Any) -> None:
    """Raises ConfigError where a checkpoint's head cannot serve: of another kind (its `problem_type`), or for other classes."""
    if problem not in (None, _SINGLE) and head != "new":
        raise ConfigError(
            f"model.path={path} has a head for {problem}, and fedlora trains one class an example; draw a new head by "
            "model.head=new"
        )
    if placed.refusal:
        raise ConfigError(placed.refusal)


def refuse_none(path: str, head: Any) -> None:
    """Raises ConfigError where `model.head` says how to take the head of a checkpoint that has none."""
    if head == "position" or isinstance(head, Mapping):
        raise ConfigError(
            f"model.head says what the head of model.path={path} stands for, but it has none; leave model.head out"
        )


def _by_name(path: str, own: Sequence[str], classes: Sequence[str]) -> Placed:
    if sorted(own) == sorted(classes):
        return Placed([*own], True, "the checkpoint has one" if [*own] == [*classes] else _MATCHED)
    numbers = [_GENERIC.fullmatch(plain(name)) for name in own]
    names = [match[1] if match else plain(name) for name, match in zip(own, numbers, strict=True)]
    known = {plain(name): name for name in classes}
    if len(known) == len(classes) and sorted(names) == sorted(known):
        return Placed([known[name] for name in names], True, _MATCHED)
    as_many = len(own) == len(classes)
    if all(numbers) and as_many:
        return Placed([*classes], True, f"the checkpoint has one without names; its classes are taken as {listed(classes)}")
    if not as_many and (all(numbers) or not set(names) & set(known)):
        return Placed([*classes], False, NONE)  # another task, another head
    typed = all(re.fullmatch(r"[\w .-]+", name) for name in own)  # Hydra's grammar has no other keys
    pairs = ",".join(f"{name}:…" for name in own[:2])
    maps = f"say which is which by 'model.head={{{pairs}}}', or " if typed else ""
    position = "set model.head=position where they stand in the same order; or "
    refusal = (
        f"model.path={path} has a head for the classes {listed(own)}, and the data have {listed(classes)}; "
        + (maps + position if as_many else "")
        + "draw a new head by model.head=new"
    )
    return Placed([*classes], False, NONE, refusal)


def _mapped(path: str, own: Sequence[str], classes: Sequence[str], head: Mapping[str, str]) -> Placed:
    wrong = [(name, own, "its head has not") for name in head if name not in own]
    wrong += [(value, classes, "the data have not") for value in head.values() if value not in classes]
    refusal = ""
    if wrong:
        name, options, what = wrong[0]
        refusal = f"model.head names the class {name}, which {what}; {check.suggest(name, options)}"
    elif sorted(head) != sorted(own) or sorted(head.values()) != sorted(classes):
        refusal = (
            f"model.head must give each class of model.path={path} ({listed(own)}) one class of the data "
            f"({listed(classes)}); where they are not as many, set model.head=new"
        )
    why = "the checkpoint has one; its classes are mapped by model.head"
    return Placed([head.get(name, name) for name in own], True, why, refusal)


def plain(name: str) -> str:
    """A class name, case and spaces aside."""
    return " ".join(name.casefold().split())


def listed(names: Sequence[str]) -> str:
    """The first few names, in their order."""
    return ", ".join(map(labels.plain, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


_MATCHED = "the checkpoint has one; its classes are matched by name"
