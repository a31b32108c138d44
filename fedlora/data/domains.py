"""Feature skew made from any images: every example is in one domain, which changes how it looks and not what it shows.

    python run.py partition=domains dataset.domains=[plain,rotation,inversion]

Labels are untouched, and each domain has its even share of each class. Stroke and blur are in pens: a pen is 1/16 of an
image's shorter side, but at least one pixel, so that a domain looks alike at every size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedlora import seeds
from fedlora.check import ConfigError
from fedlora.data.examples import Dataset, Examples


def plain(image: np.ndarray) -> np.ndarray:
    """As it is."""
    return image


def rotation(image: np.ndarray) -> np.ndarray:
    """Turned by 60° anticlockwise about its centre (bilinear), in its own frame: what is outside is lost, gaps are black."""
    from scipy import ndimage

    return ndimage.rotate(image, 60, reshape=False, order=1)


def inversion(image: np.ndarray) -> np.ndarray:
    """1 − x: what was black is white."""
    return 1 - image


def stroke(image: np.ndarray) -> np.ndarray:
    """Bright strokes wider by a pen on each side: as many grey dilations with a cross of 3 × 3 pixels as a pen has pixels."""
    from scipy import ndimage

    cross = ndimage.generate_binary_structure(2, 1)[..., np.newaxis]
    for _ in range(_pen(image)):
        image = ndimage.grey_dilation(image, footprint=cross)
    return image


def blur(image: np.ndarray) -> np.ndarray:
    """Gaussian, with a standard deviation of a pen; mirrored at the border, so that the mean stays."""
    from scipy import ndimage

    return ndimage.gaussian_filter(image, (_pen(image), _pen(image), 0))


def _pen(image: np.ndarray) -> int:
    return max(1, round(min(image.shape[:2]) / 16))


# Each takes an image (H, W, C), float32 in [0, 1], to one of the same shape, type and range.
DOMAINS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    domain.__name__: domain for domain in (plain, rotation, inversion, stroke, blur)
}


def names() -> list[str]:
    """The domains there are."""
    return sorted(DOMAINS)


def spread(dataset: Dataset, domains: list[str]) -> Dataset:
    """The dataset with every example, of training and of test, in one of the domains, whose name becomes its group.

    Which one is dealt at random and evenly: class by class, the domains' shares differ by one example at most. The seed is
    fixed, as that of the test split is: runs with different seeds see the same images.
    Raises ConfigError where the examples are not images.
    """
    if dataset.kind != "image":
        raise ConfigError(f"dataset.domains={','.join(domains)} changes images, and these examples are text; set it to []")
    return replace(
        dataset,
        train=_spread(dataset.train, domains, seeds.stream(0, "domains train")),
        test=_spread(dataset.test, domains, seeds.stream(0, "domains test")),
    )


def _spread(examples: Examples, domains: list[str], rng: np.random.Generator) -> Examples:
    shuffled = rng.permutation(len(examples))
    by_label = shuffled[np.argsort(examples.labels[shuffled], kind="stable")]
    groups = np.resize(np.array(domains), len(examples))[np.argsort(by_label)]  # by_label[i] gets domain i mod their number
    images = [DOMAINS[name](image) for name, image in zip(groups, examples.inputs, strict=True)]
    return Examples(np.stack(images) if isinstance(examples.inputs, np.ndarray) else images, examples.labels, groups)
