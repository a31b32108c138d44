"""One forward pass before any training: what a model does not take is said in one sentence, and not from inside a client."""

from __future__ import annotations

import numpy as np
import torch

from fedlora.check import ConfigError, reason
from fedlora.data import Dataset
from fedlora.models.adapted import AdaptedModel

TRIED = 64  # examples of which the longest is tried


def tried(model: AdaptedModel, dataset: Dataset) -> None:
    """Raises ConfigError where the model cannot take the shortest and the longest of the first examples.

    Nothing is drawn and nothing is kept. With no examples there is nothing to try.
    """
    examples = dataset.train if len(dataset.train) else dataset.test
    if not len(examples):
        return
    few = model.base.encode(examples.take(np.arange(min(len(examples), TRIED))))
    lengths = few.lengths()
    chosen = np.array([0, len(few) - 1] if lengths is None else [lengths.argmin(), lengths.argmax()])
    model.peft.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model.forward(few.batch(chosen, model.device)).logits
    except Exception as error:  # as varied as models are
        longest = "" if lengths is None else f" of {lengths.min()} and {lengths.max()} tokens"
        cure = "use another checkpoint" if lengths is None else "lower model.max_length, or use another checkpoint"
        raise ConfigError(f"model.path={model.base.source} cannot take examples{longest} ({reason(error)}); {cure}") from error
    if logits.shape != (2, len(dataset.classes)):
        raise ConfigError(
            f"model.path={model.base.source} gives logits of shape {tuple(logits.shape)} for 2 examples of "
            f"{len(dataset.classes)} classes; use a checkpoint for classification"
        )
