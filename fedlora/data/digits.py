"""The embedded dataset: scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, which need no download.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedlora.data import Dataset, Examples
from fedlora.data.partition import split_off_test

if TYPE_CHECKING:
    from fedlora.config import DatasetConfig


def load(config: DatasetConfig, seed: int) -> Dataset:
    """Images (N, 8, 8, 1) in [0, 1] and classes "0" to "9"; of each, `config.test_fraction` is the test set."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., np.newaxis]  # grey levels are 0 to 16
    examples = Examples(inputs=images, labels=digits.target.astype(np.int64))
    train, test = split_off_test(examples.labels, config.test_fraction)
    return Dataset("image", [str(digit) for digit in range(10)], examples.take(train), examples.take(test))
