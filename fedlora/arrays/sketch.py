"""A sum of products found from random sketches of its terms, in two messages (Halko et al., SIAM Review 2011; FedASK).

    Y = Σ p_k B_k (A_k Ω)        Q = an orthonormal basis of Y        Q · Σ p_k (Qᵀ B_k) A_k  ≈  Σ p_k B_k A_k
    (m, l)                       (m, l)

The right side is the projection of the sum on the span of Y: exact if the sum has rank l or less. Ω (n, l) is drawn alike by
every client from the run's seed, so it does not travel. Neither a client nor the server ever forms an m × n matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlora import seeds
from fedlora.arrays.lowrank import Adapters

COLUMNS = "columns"  # the array that asks for a sketch: l, shape (1,)


def omega(shapes: Mapping[str, tuple[int, int]], columns: int, seed: int, round: int) -> dict[str, np.ndarray]:
    """Ω of every layer, layer name → standard normal (n, l) with l = min(columns, m, n), from its (m, n), in sorted order."""
    rng = seeds.stream(seed, "sketch", round=round)
    return {name: rng.standard_normal((n, min(columns, m, n))) for name, (m, n) in sorted(shapes.items())}


def sketch(adapters: Adapters, columns: int, seed: int, round: int) -> dict[str, np.ndarray]:
    """A client's answer to the first message: `<layer>.sketch` = B (A Ω), shape (m, l)."""
    drawn = omega({name: (len(pair.B), pair.A.shape[1]) for name, pair in adapters.items()}, columns, seed, round)
    return {
        f"{name}.sketch": (pair.B.astype(np.float64) @ (pair.A.astype(np.float64) @ drawn[name])).astype(pair.B.dtype)
        for name, pair in adapters.items()
    }


def basis(sketches: np.ndarray) -> np.ndarray:
    """Q (m, l), orthonormal columns whose span holds that of the (m, l) sum of sketches, l ≤ m."""
    return np.linalg.qr(sketches.astype(np.float64))[0].astype(sketches.dtype)


def project(adapters: Adapters, bases: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A client's answer to the second message, which brings `<layer>.basis`: `<layer>.projected` = (Qᵀ B) A, shape (l, n)."""
    return {
        f"{name}.projected": ((bases[f"{name}.basis"].T.astype(np.float64) @ pair.B) @ pair.A).astype(pair.A.dtype)
        for name, pair in adapters.items()
    }
