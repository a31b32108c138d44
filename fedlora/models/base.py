"""What a base model is to the rest of the program: a classifier from transformers and how examples become its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from fedlora.data import Examples
from fedlora.models.encode import Encoded


def _nothing(folder: Path) -> None:
    """Saves nothing."""


@dataclass
class Base:
    """A pretrained classifier, not yet adapted. `models.load` fills in `classes` and `head` where a model leaves them empty.

    `new` names the parameters that the checkpoint lacked, so that they were drawn at random (a fresh head); `dropout` says
    whether the dropout inside the base acts while adapters are trained; `dtype` is what its frozen parameters are to be.
    """

    model: nn.Module  # forward(**batch, labels=(N,)) gives .loss and .logits (N, classes)
    encode: Callable[[Examples], Encoded]
    new: list[str] = field(default_factory=list)
    dropout: bool = False
    dtype: str = "float32"
    classes: list[str] = field(default_factory=list)  # the dataset's class of each logit; empty: the dataset's order
    head: str = ""  # where the head comes from, for the plan
    source: str = ""  # folder or hub name of the checkpoint, as an adapter's file records it
    task: str | None = None  # PEFT's name of the task: SEQ_CLS for text
    save_inputs: Callable[[Path], None] = _nothing  # the tokenizer or image processor, into a folder
