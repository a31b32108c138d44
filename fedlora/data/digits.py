"""The embedded dataset: scikit-learn's 1,797 handwritten digits of 8 × 8 pixels, which need no download.

E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlora.data.examples import Dataset, Examples
from fedlora.data.partition import split_off_test

if TYPE_CHECKING:
    from fedlora.config import DatasetConfig


def load(config: DatasetConfig, seed: int) -> Dataset:
    """Images (N, 8, 8, 1) in [0, 1] and classes "0" to "9"; of each, `config.test_fraction` is the test set."""
    # The file itself, since importing scikit-learn takes a second in each worker and nothing else of it is needed.
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is a dependency of this project"
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = (table[:, :64].reshape(-1, 8, 8, 1) / 16).astype(np.float32)  # grey levels are 0 to 16
    examples = Examples(inputs=images, labels=table[:, 64].astype(np.int64))
    train, test = split_off_test(examples.labels, config.test_fraction)
    return Dataset("image", [str(digit) for digit in range(10)], examples.take(train), examples.take(test))
