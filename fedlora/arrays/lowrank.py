"""Pairs of thin factors and their algebra. Nothing here ever forms an m × n matrix.

    W      =  W0     +  scale ·  B     @  A
    (m, n)    (m, n)             (m, r)   (r, n)       r ≪ m, n

Every function computes in float64 and gives back the dtype of what it was given (`bias` stays in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """One adapted layer: W = W0 + scale · B @ A."""

    A: np.ndarray  # (r, n)
    B: np.ndarray  # (m, r)

    @property
    def rank(self) -> int:
        """The number of rows of A, which is the number of columns of B."""
        return int(self.A.shape[0])


Adapters = dict[str, Pair]  # layer name → factors


def average(arrays: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Σ w_k X_k over arrays of one shape, summed in float64."""
    total, part = np.zeros(arrays[0].shape), np.empty(arrays[0].shape)
    for array, weight in zip(arrays, weights, strict=True):
        total += np.multiply(array, weight, out=part, dtype=np.float64)  # into the same memory: new pages cost more than sums
    return total.astype(arrays[0].dtype)


def mean(pairs: Sequence[Pair], weights: np.ndarray) -> Pair:
    """The factor-wise average (Σ w_k A_k, Σ w_k B_k). Its product is not Σ w_k B_k A_k: see `bias`."""
    return Pair(average([p.A for p in pairs], weights), average([p.B for p in pairs], weights))


def stack(pairs: Sequence[Pair], weights: np.ndarray) -> Pair:
    """The exact Σ w_k B_k A_k as one pair of rank Σ r_k: A = [A_1; A_2; …], B = [w_1 B_1, w_2 B_2, …].

    Where all pairs hold the very same array A (or B), it is factored out and the rank stays what it was.
    """
    first = pairs[0]
    if all(pair.A is first.A for pair in pairs):
        return Pair(first.A, average([pair.B for pair in pairs], weights))
    if all(pair.B is first.B for pair in pairs):
        return Pair(average([pair.A for pair in pairs], weights), first.B)
    A = np.concatenate([p.A for p in pairs])
    B = np.concatenate([w * p.B for p, w in zip(pairs, weights, strict=True)], axis=1)
    return Pair(A, B.astype(A.dtype))


def pad(pair: Pair, rank: int, rows: np.ndarray | None = None) -> Pair:
    """The same product at a higher rank: columns of zeros beside B, and below A rows of zeros, or those of `rows` (rank, n)."""
    more = rank - pair.rank
    if not more:
        return pair
    below = np.zeros((more, pair.A.shape[1]), pair.A.dtype) if rows is None else rows[pair.rank :]
    return Pair(np.concatenate([pair.A, below]), np.pad(pair.B, ((0, 0), (0, more))))


def subtract(left: Pair, right: Pair) -> Pair:
    """A pair whose product is left.B @ left.A − right.B @ right.A, of rank r_left + r_right."""
    return stack([left, right], np.array([1.0, -1.0]))


def compact(pair: Pair) -> Pair:
    """The same product at a rank of at most min(r, m, n), as thin as it gets without rounding anything away.

    Guarantee: directions whose row of A or column of B is zero are left out (all of them, so that rank 0 stands for a zero
    factor), which changes no bit of the product; beyond min(m, n) the product itself becomes one factor and the identity
    the other, exact to rounding and no larger than a factor of that rank. Small directions stay.
    """
    kept = pair.A.any(axis=1) & pair.B.any(axis=0)
    A, B = pair.A[kept], pair.B[:, kept]
    m, n = len(B), A.shape[1]
    if len(A) <= min(m, n):
        return Pair(A, B)
    whole = (B.astype(np.float64) @ A.astype(np.float64)).astype(A.dtype)
    return Pair(whole, np.eye(m, dtype=A.dtype)) if m <= n else Pair(np.eye(n, dtype=A.dtype), whole)


def add(old: Pair | None, new: Pair) -> Pair:
    """The exact sum of two products as one compact pair in the dtype of `new`; None stands for zero."""
    both = [new] if old is None else [Pair(*(x.astype(new.A.dtype, copy=False) for x in old)), new]
    return compact(stack(both, np.ones(len(both))))


def bias(pairs: Sequence[Pair], weights: np.ndarray) -> Pair:
    """What the factor-wise average misses: Σ w_k B_k A_k − B̄ Ā, for weights that sum to one.

    Identity: it equals Σ w_k (B_k − B̄)(A_k − Ā), which is how it is built here, in float64, so that for equal clients it
    is zero to the square of rounding instead of a small difference of large numbers. Where all pairs hold the very same
    array A (or B) it is zero.
    """
    if all(pair.A is pairs[0].A for pair in pairs) or all(pair.B is pairs[0].B for pair in pairs):
        return Pair(np.zeros(pairs[0].A.shape), np.zeros(pairs[0].B.shape))
    centre = mean([_double(p) for p in pairs], weights)
    return stack([Pair(p.A - centre.A, p.B - centre.B) for p in pairs], weights)


def norm(pair: Pair) -> float:
    """‖B A‖_F from the r × r Gram matrices: ‖BA‖² = ⟨BᵀB, AAᵀ⟩. Costs O((m + n) r²).

    Guarantee: relative error below about 1e-8 (a square root of the rounding of float64) where the product of stacked
    factors cancels, and near rounding elsewhere. A zero factor gives 0. Of factors so fat that the product has fewer entries
    than they have, the product is formed.
    """
    A, B = _double(pair)
    if pair.rank > min(len(B), A.shape[1]):
        return float(np.linalg.norm(B @ A))
    return float(np.sqrt(max(np.sum((B.T @ B) * (A @ A.T)), 0.0)))


def noise(pair: Pair, drawn: Pair, variance: float) -> tuple[float, float]:
    """How large the noise in the factors is in B A: ‖BA − B°A°‖² as it was drawn, and what is expected of it.

    `pair` holds the noisy factors, `drawn` what was added to them (all zero for a factor that got none), with `variance` σ²
    a coordinate. For the factors before noise, E‖BA − B°A°‖² = σ²(m‖A°‖² + n‖B°‖²) + σ⁴·m·n·r; the terms of a factor
    without noise are absent. Built from BA − B°A° = N_B A + B° N_A, in which nothing cancels.
    """
    (A, B), (in_A, in_B) = _double(pair), _double(drawn)
    quiet = Pair(A - in_A, B - in_B)
    difference = Pair(np.concatenate([A, in_A]), np.concatenate([in_B, quiet.B], axis=1))
    (r, n), m, noisy_A, noisy_B = A.shape, len(B), in_A.any(), in_B.any()
    expected = variance * (noisy_B * m * np.sum(quiet.A**2) + noisy_A * n * np.sum(quiet.B**2))
    expected += variance**2 * m * n * r * (noisy_A and noisy_B)
    return norm(difference) ** 2, float(expected)


def noise_between(pair: Pair, drawn: np.ndarray, variance: float) -> tuple[float, float]:
    """The same for noise in an R (r, r) that stands between the factors: ‖B N A‖², and σ² ‖A‖² ‖B‖², which is expected."""
    A, B = _double(pair)
    return norm(Pair(drawn @ A, B)) ** 2, variance * float(np.sum(A**2) * np.sum(B**2))


def spectrum(pair: Pair) -> np.ndarray:
    """The min(r, m, n) leading singular values of B A, in falling order: shape (min(r, m, n),)."""
    return _core(pair)[1]


def nuclear_norm(singular_values: np.ndarray) -> float:
    """‖B A‖_* = Σ σ_i, from `spectrum`."""
    return float(singular_values.sum())


def principal_angle(factors: Sequence[np.ndarray]) -> float:
    """The mean principal angle, in radians from 0 to π/2, between the row spaces of all pairs of (r, n) arrays of one shape.

    Angles below 1e-7 are rounding. 0 for fewer than two arrays. A K r × K r Gram matrix and K²/2 SVDs of r × r.
    """
    bases = np.stack([np.linalg.qr(A.astype(np.float64).T)[0].T for A in factors])  # (K, k, n), k = min(r, n)
    K, k, n = bases.shape
    if K < 2:
        return 0.0
    flat = bases.reshape(K * k, n)
    gram = (flat @ flat.T).reshape(K, k, K, k).transpose(0, 2, 1, 3)
    cosines = np.linalg.svd(gram[np.triu_indices(K, 1)], compute_uv=False)
    return float(np.arccos(np.clip(cosines, 0.0, 1.0)).mean())


def effective_rank(singular_values: np.ndarray) -> float:
    """exp(entropy of the normalised singular values) (Roy and Vetterli, 2007): 0 for a zero matrix, at most its rank."""
    total = singular_values.sum()
    if total <= 0:
        return 0.0
    shares = singular_values[singular_values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def recompress(pair: Pair, rank: int) -> Pair:
    """The best approximation of B A of the given rank, as A = V_rᵀ (orthonormal rows) and B = U_r S_r.

    QR of both factors and an SVD of the small core: exact, O((m + n) r²). With `rank` ≥ the rank of B A the product is
    unchanged. Edge cases, both in the tests:

    * B A has fewer than `rank` directions (B rank-deficient, zero, or with m < `rank` rows): the spare rows of A complete
      an orthonormal basis inside the row space of the old A, and the spare columns of B are zero. So a recompression to
      the old rank keeps the row space of an A of full rank, whatever B is;
    * `rank` exceeds the rows that A spans (r or n smaller): the rows of A and columns of B beyond are zero.
    """
    left, values, right = _core(pair)
    rows, columns = min(rank, len(right)), min(rank, values.size)
    A = np.zeros((rank, pair.A.shape[1]))
    B = np.zeros((pair.B.shape[0], rank))
    A[:rows] = right[:rows]
    B[:, :columns] = left[:, :columns] * values[:columns]
    return Pair(A.astype(pair.A.dtype), B.astype(pair.B.dtype))


def split(pair: Pair, rank: int) -> Pair:
    """The same approximation with √S on either side: A = √S Vᵀ, B = U √S, √ of the leading `rank` singular values.

    Where a singular value is numerically zero the row of A has the length of the first instead of none, and the column of
    B what keeps the product: a direction with a zero on both sides gets no gradient, so it could never be trained again.
    Of a zero product, A is orthonormal and B zero; rows beyond those that A spans are zero, both as in `recompress`.
    """
    best = recompress(_double(pair), rank)
    values = np.linalg.norm(best.B, axis=0)
    if values.any():
        largest = values.max()
        side = np.sqrt(np.where(values > np.finfo(pair.A.dtype).eps * largest, values, largest))
        best = Pair(side[:, None] * best.A, best.B / side)
    return Pair(best.A.astype(pair.A.dtype), best.B.astype(pair.B.dtype))


def coordinates(A: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """R (r, r) with A = R · basis, for an A (r, n) in the row space of the basis (r, n); else the nearest, by least squares.

    Exactly the identity where A is the basis.
    """
    if np.array_equal(A, basis):
        return np.eye(len(A), dtype=A.dtype)
    R = np.linalg.lstsq(basis.astype(np.float64).T, A.astype(np.float64).T, rcond=None)[0].T
    return np.ascontiguousarray(R, dtype=A.dtype)


def draw(shape: tuple[int, int], init: str, rng: np.random.Generator) -> np.ndarray:
    """A random A of shape (r, n), float32. Whoever draws the layers in sorted order from one generator gets the same.

    kaiming: uniform in ±1/√n, PEFT's own (rows of norm about 0.577); orthonormal: A Aᵀ = I, for r ≤ n.
    """
    if init == "kaiming":
        return rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(np.sqrt(shape[1]))
    rows = orthonormal_rows(rng.standard_normal(shape))
    return np.ascontiguousarray(rows, np.float32)  # as it would come off the wire: another layout has other last bits


def orthonormal_rows(A: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the row space of A (r, n), r ≤ n, by QR; signs fixed so that A = R·result has R_ii > 0."""
    Q, R = np.linalg.qr(A.astype(np.float64).T)
    return (Q * np.where(np.diag(R) < 0, -1.0, 1.0)).T.astype(A.dtype)


def _double(pair: Pair) -> Pair:
    return Pair(pair.A.astype(np.float64), pair.B.astype(np.float64))


def _core(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SVD of B A through its r × r core: left (m, k_b), values (min(k_b, k_a),), right (k_a, n), k_b = min(m, r) and
    k_a = min(n, r).

    The columns of `left` and the rows of `right` are orthonormal even where values are zero, and the rows of `right` span
    the row space of A (if A has full rank), so nothing is divided by a small singular value.
    """
    A, B = _double(pair)
    Qb, Rb = np.linalg.qr(B)  # (m, k_b), (k_b, r)
    Qa, Ra = np.linalg.qr(A.T)  # (n, k_a), (k_a, r)
    U, values, Vt = np.linalg.svd(Rb @ Ra.T)
    return Qb @ U, values, Vt @ Qa.T
