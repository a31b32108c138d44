"""`model=vit_digits`: a 4-layer ViT that has read printed digits and never a handwritten one.

The checkpoint beside this file was trained on digits from the fonts that matplotlib ships, bent at random,
drawn with a random pen and passed through the steps that made scikit-learn's `load_digits`; no real digit was
used for training, for selection or for stopping.
Fine-tuning it on real digits is therefore honest transfer: the features are there, the handwriting is not.
Make it again with `python -m fedlora.models.vit_digits.pretrain`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.config import ModelConfig
    from fedlora.data import Dataset, Examples
    from fedlora.models import base
    from fedlora.models.encode import Encoded

FOLDER = Path(__file__).parent
PROCESSOR = "preprocessor_config.json"


def load(config: ModelConfig, dataset: Dataset, seed: int) -> base.Base:
    """The embedded checkpoint. Raises ConfigError for anything but 8 × 8 grey images of ten classes."""
    from fedlora.check import ConfigError
    from fedlora.models import hf
    from fedlora.models.base import Base

    examples = dataset.train if len(dataset.train) else dataset.test
    shape = getattr(examples.inputs, "shape", None) if dataset.kind == "image" else None
    if not len(examples) and dataset.kind == "image":
        shape = (0, 8, 8, 1)  # a server without examples of its own
    if shape is None or shape[1:] != (8, 8, 1) or len(dataset.classes) != 10:
        raise ConfigError("model=vit_digits reads 8 × 8 grey digits only; use dataset=digits, or model=hf for other data")
    model, new, classes, head = hf.load_classifier(str(FOLDER), dataset, seed, config.head)
    return Base(model, encode, new, False, config.dtype, classes, head, str(FOLDER), save_inputs=save_inputs)


def save_inputs(folder: Path) -> None:
    """The file by which `model=hf` normalises pixels as `encode` does."""
    import shutil

    shutil.copyfile(FOLDER / PROCESSOR, folder / PROCESSOR)


def encode(examples: Examples) -> Encoded:
    """Grey values from [0, 1] to [-1, 1], as in pretraining; pixels (N, 1, 8, 8)."""
    import numpy as np
    import torch

    from fedlora.models.encode import Images

    pixels = np.asarray(examples.inputs, dtype=np.float32).transpose(0, 3, 1, 2)
    return Images(torch.from_numpy(examples.labels), torch.from_numpy((pixels - 0.5) / 0.5))
