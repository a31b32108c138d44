"""Arrays that come from outside are used only where they are of the form asked for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Arrays = dict[str, np.ndarray]


def form(content: Mapping[str, np.ndarray], name: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    """The array of that name. Raises ValueError where it is missing, or of another data type or shape (None: any length)."""
    array = content.get(name)
    if not isinstance(array, np.ndarray) or array.dtype != dtype or not _fits(array.shape, shape):
        asked = " × ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} is missing, or is not {np.dtype(dtype).name} of shape {asked}")
    return array


def _fits(shape: tuple[int, ...], asked: tuple[int | None, ...]) -> bool:
    return len(shape) == len(asked) and all(want in (None, have) for have, want in zip(shape, asked, strict=True))
