"""What all sides of a secure sum agree on before it begins; all of it is public."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedlora.secure.fixed_point import FixedPoint

ACTIONS = ("advertise", "share", "mask", "unmask")  # the four messages, each a method of `Participant`


class Terms(NamedTuple):
    """The threshold t, the bound on |x| (finite, above 0), and the most examples of any one client (≥ 1)."""

    threshold: int  # clients that must stay to the end; fewer together learn nothing of another's vector
    bound: float
    most_examples: int = 1

    def code(self, clients: int) -> FixedPoint:
        """The code of their vectors; raises ValueError unless 2 ≤ t ≤ `clients` < 2t and there is such a code.

        With t above half, no two disjoint groups can each give away one of the two secrets of the same client.
        """
        if self.threshold < 2:
            raise ValueError(f"threshold={self.threshold} lets the server see one client's vector; it must be at least 2")
        if clients < self.threshold:
            raise ValueError(f"only {clients} clients take part, and threshold={self.threshold}")
        if clients >= 2 * self.threshold:
            raise ValueError(f"threshold={self.threshold} must be above half of the {clients} clients")
        return FixedPoint(self.bound, self.most_examples, clients)

    def to_array(self) -> np.ndarray:
        """The three values as float64 (3,), which holds them exactly."""
        return np.array(self, np.float64)

    @classmethod
    def from_array(cls, array: np.ndarray) -> Terms:
        """The terms of `to_array`."""
        threshold, bound, most_examples = array.tolist()
        return cls(int(threshold), bound, int(most_examples))
