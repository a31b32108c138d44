"""What a base model is to the rest of the program: a classifier from transformers and how examples become its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from fedlora.data import Examples
from fedlora.models.encode import Encoded


@dataclass
class Base:
    """A pretrained classifier, not yet adapted.

    `new` names the parameters that the checkpoint lacked, so that they were drawn at random (a fresh head); `dropout` says
    whether the dropout inside the base acts while adapters are trained; `dtype` is what its frozen parameters are to be.
    """

    model: nn.Module  # forward(**batch, labels=(N,)) gives .loss and .logits (N, classes)
    encode: Callable[[Examples], Encoded]
    new: list[str] = field(default_factory=list)
    dropout: bool = False
    dtype: str = "float32"
