"""Real vectors as integers modulo 2³², in which masks cancel exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST = 2**31 - 1  # of a sum, so that its sign can be told


@dataclass(frozen=True)
class FixedPoint:
    """The code of K clients' weighted vectors, n_k·x_k with |x_k| ≤ `bound` and 1 ≤ n_k ≤ M = `most_examples`.

    A client sends q_k = round(L · (n_k/M) · x_k/bound), L = ⌊(2³¹ − 1)/K⌋, and n_k itself in a last word.

    No wrap: |x_k| ≤ bound and n_k ≤ M give |q_k| ≤ L, in floating point too since its rounding keeps order; hence
    |Σ q_k| ≤ K·L ≤ 2³¹ − 1 for K or fewer clients. K·M < 2³² is asked for, so Σ n_k cannot wrap either.

    Precision: one unit of q stands for `step` = bound·M/L, about K·M·bound/2³¹, of n_k·x_k. Each client rounds by at most
    half a unit (and 2⁻²⁰ of one: float64 has 53 bits, and q below 31), so Σ n_k x_k is off by at most K/2 steps and the mean
    over N = Σ n_k examples by at most K·step/(2N): K·bound/2³² where all n_k = M.

    Raises ValueError for a bound that is not finite and positive, M < 1, or K·M ≥ 2³².
    """

    bound: float
    most_examples: int
    clients: int

    def __post_init__(self) -> None:
        if not 0 < self.bound < np.inf:
            raise ValueError(f"bound={self.bound} must be finite and above 0")
        if not 1 <= self.most_examples < 2**32 / self.clients:
            raise ValueError(f"most_examples={self.most_examples} must be at least 1, and below 2^32 for all clients together")

    @property
    def levels(self) -> int:
        """L, the integer that n_k·x_k = M·bound becomes."""
        return LARGEST // self.clients

    @property
    def step(self) -> float:
        """What one unit stands for in Σ n_k x_k."""
        return self.bound * self.most_examples / self.levels

    def encode(self, vector: np.ndarray, examples: int) -> np.ndarray:
        """(d,) real, n_k → (d + 1,) uint32.

        Raises ValueError for a coordinate above the bound or not a number, or n_k outside 1 … M: nothing is ever clipped.
        The sentence has no value of the client's own in it, because the server reads it.
        """
        if not 1 <= examples <= self.most_examples:
            raise ValueError(f"the number of examples is not within 1 and most_examples={self.most_examples}")
        if not np.all(np.abs(vector) <= self.bound):
            raise ValueError(f"a coordinate is above bound={self.bound:g} in magnitude, or is not a number")
        shares = vector.astype(np.float64) * (examples / self.most_examples) / self.bound
        return np.append(np.rint(shares * self.levels).astype(np.int64), examples).astype(np.uint32)

    def decode(self, total: np.ndarray) -> tuple[np.ndarray, int]:
        """The sum modulo 2³² of encoded vectors (d + 1,) uint32 → Σ n_k x_k (d,) float64, and Σ n_k."""
        return total[:-1].view(np.int32) * self.step, int(total[-1])
