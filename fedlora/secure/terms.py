"""What all sides of a secure sum agree on before it begins; all of it is public."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.forms import form

LEAST = {"none": 3, "record": 2}  # clients of a sum, by the privacy that their vectors have: of two, each has the other's
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
    def read(cls, content: Mapping[str, np.ndarray]) -> Terms:
        """The terms in a message; raises ValueError for anything that `to_array` does not make."""
        array = form(content, "terms", np.float64, (3,))
        threshold, bound, most_examples = array.tolist()
        whole = threshold.is_integer() and most_examples.is_integer()
        if not (whole and 0 <= threshold < 2**31 and 0 < bound < np.inf and 1 <= most_examples < 2**32):
            raise ValueError("the terms of the secure sum are out of range")
        return cls(int(threshold), bound, int(most_examples))
