"""How good a model is on given examples: accuracy, loss, macro-F1."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded


def evaluate(model: AdaptedModel, examples: Encoded, indices: np.ndarray, batch_size: int) -> dict[str, float]:
    """Accuracy in [0, 1], mean cross-entropy in nats, and the unweighted mean of the classes' F1, over `indices`."""
    logits = predict(model, examples, indices, batch_size)
    labels = examples.labels[torch.from_numpy(indices)]
    guesses = logits.argmax(dim=1)
    return {
        "accuracy": float((guesses == labels).double().mean()),
        "loss": float(functional.cross_entropy(logits.double(), labels)),
        "macro_f1": macro_f1(labels.numpy(), guesses.numpy()),
    }


def macro_f1(labels: np.ndarray, guesses: np.ndarray) -> float:
    """The unweighted mean of 2 TP / (TP + FP + TP + FN) over the classes that occur among labels or guesses, both (N,).

    Equal to scikit-learn's `f1_score(average="macro")`, whose import would take a second in every process.
    """
    classes = int(max(labels.max(), guesses.max())) + 1
    hits = np.bincount(labels[labels == guesses], minlength=classes)
    occurrences = np.bincount(labels, minlength=classes) + np.bincount(guesses, minlength=classes)
    occurs = occurrences > 0
    return float(np.mean(2 * hits[occurs] / occurrences[occurs]))


def predict(model: AdaptedModel, examples: Encoded, indices: np.ndarray, batch_size: int) -> torch.Tensor:
    """Logits of the examples at `indices`, in that order: (N, classes), float32, on the CPU."""
    if any(module.training for module in model.peft.modules()):  # to set the mode of all takes as long as a small forward pass
        model.peft.eval()
    with torch.no_grad():
        return torch.cat(
            [
                model.forward(examples.batch(indices[start : start + batch_size], model.device)).logits.float().cpu()
                for start in range(0, len(indices), batch_size)
            ]
        )
