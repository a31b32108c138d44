"""Where every trained array stands in one flat vector.

    [ A of each layer | B of each layer | the head's arrays ]      each by name, row by row; a factor not trained is absent

Optimiser, clipping and noise then see one parameter (P,) instead of two a layer, and many clients stack to (K, P).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np

from fedlora.arrays.lowrank import Adapters
from fedlora.arrays.messages import Factors


class Slot(NamedTuple):
    """One array of the vector."""

    name: str  # of the layer, or of a dense array
    factor: str  # "A", "B", or "" for a dense array
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The slots of a vector, in order."""

    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, adapters: Adapters, dense: Mapping[str, np.ndarray], trains: str) -> Layout:
        """The layout of what a client trains that was sent these arrays."""
        layers = [Slot(n, f, getattr(adapters[n], f).shape) for f in "AB" if f in trains for n in sorted(adapters)]
        return cls((*layers, *(Slot(name, "", dense[name].shape) for name in sorted(dense))))

    @cached_property
    def sizes(self) -> list[int]:
        """The number of entries of each slot."""
        return [prod(slot.shape) for slot in self.slots]

    @property
    def size(self) -> int:
        """P, the number of entries of the vector."""
        return sum(self.sizes)

    def join(self, adapters: Adapters, dense: Mapping[str, np.ndarray]) -> np.ndarray:
        """The vector (P,) of these arrays, float32."""
        arrays = [getattr(adapters[name], factor) if factor else dense[name] for name, factor, _ in self.slots]
        return np.concatenate([np.ravel(array) for array in arrays], dtype=np.float32)

    def split(self, vector: np.ndarray) -> tuple[Factors, dict[str, np.ndarray]]:
        """The factors by layer and the dense arrays of a vector (P,), as views of it."""
        factors: Factors = {}
        dense: dict[str, np.ndarray] = {}
        for slot, part in zip(self.slots, np.split(vector, np.cumsum(self.sizes)[:-1]), strict=True):
            if slot.factor:
                factors.setdefault(slot.name, {})[slot.factor] = part.reshape(slot.shape)
            else:
                dense[slot.name] = part.reshape(slot.shape)
        return factors, dense

    def places_in(self, wide: Layout) -> np.ndarray | None:
        """Where the entries of this vector stand in a `wide` one of equal or higher ranks: (P,); None for the same layout.

        A lower rank takes the first rows of A and the first columns of B.
        """
        if self == wide:
            return None
        factors, dense = wide.split(np.arange(wide.size))
        arrays = [factors[name][factor] if factor else dense[name] for name, factor, _ in self.slots]
        corners = [tuple(slice(length) for length in shape) for _, _, shape in self.slots]
        return np.concatenate([array[corner].ravel() for array, corner in zip(arrays, corners, strict=True)])
