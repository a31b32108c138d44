"""How good a model is on given examples: accuracy, loss, macro-F1."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fedlora.models.adapted import AdaptedModel
from fedlora.models.encode import Encoded


def evaluate(model: AdaptedModel, examples: Encoded, indices: np.ndarray, batch_size: int) -> dict[str, float]:
    """Accuracy in [0, 1], mean cross-entropy in nats, and the unweighted mean of the classes' F1, over `indices`.

    Macro-F1 is over the classes that occur among the labels or the predictions, as scikit-learn has it.
    """
    from sklearn.metrics import f1_score

    logits = predict(model, examples, indices, batch_size)
    labels = examples.labels[torch.from_numpy(indices)]
    guesses = logits.argmax(dim=1)
    return {
        "accuracy": float((guesses == labels).double().mean()),
        "loss": float(functional.cross_entropy(logits.double(), labels)),
        "macro_f1": float(f1_score(labels.numpy(), guesses.numpy(), average="macro")),
    }


def predict(model: AdaptedModel, examples: Encoded, indices: np.ndarray, batch_size: int) -> torch.Tensor:
    """Logits of the examples at `indices`, in that order: (N, classes), float32, on the CPU."""
    model.peft.eval()
    with torch.no_grad():
        return torch.cat(
            [
                model.forward(examples.batch(indices[start : start + batch_size], model.device)).logits.float().cpu()
                for start in range(0, len(indices), batch_size)
            ]
        )
