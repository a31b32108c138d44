"""The algebra of thin factors against plain dense matrices, shape by shape and edge by edge."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Pair

SHAPES = [  # (m, n, r)
    (7, 5, 3),
    (5, 7, 3),
    (4, 4, 4),
    (3, 8, 5),  # r > m
    (8, 3, 5),  # r > n
    (2, 2, 6),  # r > both
    (1, 9, 1),
    (9, 1, 2),
]
DTYPES: dict[type, float] = {np.float32: 2e-6, np.float64: 1e-13}  # and the relative error that rounding to it allows


def draw(shape: tuple[int, int, int], seed: int = 0, dtype: type = np.float64) -> Pair:
    m, n, r = shape
    rng = np.random.default_rng(seed)
    return Pair(rng.standard_normal((r, n)).astype(dtype), rng.standard_normal((m, r)).astype(dtype))


def dense(pair: Pair) -> np.ndarray:
    return pair.B.astype(np.float64) @ pair.A.astype(np.float64)


def close(left: np.ndarray, right: np.ndarray, relative: float = 1e-13) -> bool:
    return bool(np.linalg.norm(left - right) <= relative * max(float(np.linalg.norm(right)), 1e-300))


# ---- sums of products


def test_mean_and_bias_by_hand() -> None:
    """r = 1, m = n = 1: clients (A, B) = (1, 2) and (3, 6), weights 1/4 and 3/4.

    Ā = 2.5, B̄ = 5, B̄Ā = 12.5; ΔW = 1/4·2 + 3/4·18 = 14; so the bias is 1.5.
    """
    pairs = [Pair(np.array([[1.0]]), np.array([[2.0]])), Pair(np.array([[3.0]]), np.array([[6.0]]))]
    weights = np.array([0.25, 0.75])
    assert lowrank.mean(pairs, weights) == Pair(np.array([[2.5]]), np.array([[5.0]]))
    assert dense(lowrank.stack(pairs, weights)).item() == 14.0
    assert dense(lowrank.bias(pairs, weights)).item() == 1.5
    assert dense(lowrank.subtract(pairs[1], pairs[0])).item() == 16.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stack_mean_and_bias_are_the_dense_ones(shape: tuple[int, int, int], dtype: type) -> None:
    pairs = [draw(shape, seed, dtype) for seed in range(3)]
    weights = np.array([0.2, 0.5, 0.3])
    ideal = sum(w * dense(p) for w, p in zip(weights, pairs, strict=True))
    mean_A = sum(w * p.A.astype(np.float64) for w, p in zip(weights, pairs, strict=True))
    mean_B = sum(w * p.B.astype(np.float64) for w, p in zip(weights, pairs, strict=True))
    about_mean = sum(w * (p.B - mean_B) @ (p.A - mean_A) for w, p in zip(weights, pairs, strict=True))

    assert close(dense(lowrank.stack(pairs, weights)), ideal, DTYPES[dtype])
    assert close(lowrank.mean(pairs, weights).A, mean_A, DTYPES[dtype])
    assert close(lowrank.mean(pairs, weights).B, mean_B, DTYPES[dtype])
    missed = dense(lowrank.bias(pairs, weights))  # in float64 for either, so it costs no float32 cancellation
    assert close(missed, ideal - mean_B @ mean_A, 1e-12)
    assert close(missed, about_mean, 1e-12)  # METHODS' bias identity
    assert np.linalg.norm(missed) > 0.1


def test_stack_takes_pairs_of_different_ranks() -> None:
    pairs = [draw((6, 5, r), r) for r in (1, 2, 4)]
    weights = np.array([0.5, 0.2, 0.3])
    stacked = lowrank.stack(pairs, weights)
    assert stacked.rank == 7
    assert close(dense(stacked), sum(w * dense(p) for w, p in zip(weights, pairs, strict=True)))


def test_equal_clients_have_no_bias() -> None:
    """To the square of rounding: 49 times 1/49 is not one, so Ā is off by 1e-16 and B̄Ā with it, but not the bias."""
    pair = draw((7, 5, 3))
    weights = np.full(49, 1 / 49)
    assert not np.array_equal(lowrank.mean([pair] * 49, weights).A, pair.A)
    assert lowrank.norm(lowrank.bias([pair] * 49, weights)) < 1e-28 * lowrank.norm(pair)
    assert not dense(lowrank.bias([pair], np.ones(1))).any()  # one client: exactly zero


# ---- measures


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_spectrum_are_the_dense_ones(shape: tuple[int, int, int], dtype: type) -> None:
    pair = draw(shape, 1, dtype)
    values = np.linalg.svd(dense(pair), compute_uv=False)[: min(shape)]
    assert lowrank.norm(pair) == pytest.approx(np.linalg.norm(dense(pair)), rel=1e-12)
    assert lowrank.spectrum(pair).shape == (min(shape),)
    assert np.abs(lowrank.spectrum(pair) - values).max() < 1e-13 * values[0]


def test_norm_of_a_difference_that_cancels() -> None:
    """The guarantee of the docstring: rounding under the square root leaves about 1e-8 of the parts."""
    pair = draw((40, 30, 4))
    nearly = Pair(pair.A, pair.B * (1 + 1e-6))
    assert lowrank.norm(lowrank.subtract(pair, pair)) < 1e-7 * lowrank.norm(pair)
    assert lowrank.norm(lowrank.subtract(nearly, pair)) == pytest.approx(1e-6 * lowrank.norm(pair), rel=0.05)


def test_norm_of_zero_and_of_a_singular_product() -> None:
    assert lowrank.norm(Pair(np.ones((2, 3)), np.zeros((4, 2)))) == 0.0
    assert lowrank.norm(Pair(np.array([[1.0], [1.0]]), np.array([[1.0, -1.0]]))) == 0.0  # BA = 0 with neither zero


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 2.0, 2.0], 3.0),  # flat: its rank
        ([5.0, 0.0, 0.0], 1.0),
        ([0.0, 0.0], 0.0),
        ([3.0, 1.0], 4 / 3**0.75),  # exp(−¾ ln ¾ − ¼ ln ¼) = 1.7548
    ],
)
def test_effective_rank_by_hand(values: list[float], expected: float) -> None:
    assert lowrank.effective_rank(np.array(values)) == pytest.approx(expected, rel=1e-14)
    assert lowrank.effective_rank(1e-9 * np.array(values)) == pytest.approx(expected, rel=1e-12)


# ---- recompression


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_recompress_to_the_same_rank_keeps_the_product(shape: tuple[int, int, int], dtype: type) -> None:
    pair = draw(shape, 2, dtype)
    new = lowrank.recompress(pair, pair.rank)
    assert new.A.shape == pair.A.shape and new.B.shape == pair.B.shape
    assert new.A.dtype == new.B.dtype == dtype
    assert close(dense(new), dense(pair), DTYPES[dtype])
    assert close(new.B.T @ new.B, np.diag(np.diag(new.B.T @ new.B)), DTYPES[dtype])  # B = U S
    lengths = np.linalg.norm(new.B, axis=0)[: min(shape)]
    assert np.abs(lengths - lowrank.spectrum(pair)).max() < DTYPES[dtype] * lengths[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_recompress_is_the_best_approximation(shape: tuple[int, int, int], rank: int) -> None:
    """Eckart-Young: the error is the tail of the dense spectrum, whatever the rank asked for."""
    pair = draw(shape, 3)
    values = np.linalg.svd(dense(pair), compute_uv=False)
    error = np.linalg.norm(dense(lowrank.recompress(pair, rank)) - dense(pair))
    assert error == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-12 * values[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank_of_B", ["full", "one", "zero"])
def test_rows_of_a_recompressed_A(shape: tuple[int, int, int], rank_of_B: str) -> None:
    """min(r, n) orthonormal rows that span what the old A spanned, and the others zero: also where B says too little.

    A client trains B alone, so a direction that A lost would never come back.
    """
    m, n, r = shape
    pair = draw(shape, 4)
    B = {"full": pair.B, "one": np.outer(np.arange(1.0, m + 1), np.ones(r)), "zero": np.zeros((m, r))}[rank_of_B]
    A = lowrank.recompress(Pair(pair.A, B), r).A
    spanned = min(r, n)
    assert close(A @ A.T, np.diag([1.0] * spanned + [0.0] * (r - spanned)))
    assert close(A.T @ A, np.linalg.pinv(pair.A) @ pair.A, 1e-12)  # the same projector onto the row space
    assert close(dense(lowrank.recompress(Pair(pair.A, B), r)), B @ pair.A, 1e-12) or rank_of_B == "zero"


def test_recompress_of_zero_is_zero() -> None:
    pair = Pair(draw((6, 5, 2)).A, np.zeros((6, 2)))
    assert not lowrank.recompress(pair, 2).B.any()


def test_recompress_twice_changes_nothing_more() -> None:
    once = lowrank.recompress(draw((7, 6, 3)), 3)
    twice = lowrank.recompress(once, 3)
    signs = np.sign(np.diag(once.A @ twice.A.T))  # an SVD is unique up to signs
    assert close(signs[:, None] * twice.A, once.A) and close(twice.B * signs, once.B)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e20])
def test_recompress_does_not_depend_on_units(scale: float) -> None:
    """Nothing is divided by a small singular value and nothing is cut at an absolute threshold."""
    pair = draw((7, 6, 3))
    assert close(dense(lowrank.recompress(Pair(pair.A, scale * pair.B), 2)) / scale, dense(lowrank.recompress(pair, 2)))


def test_recompress_keeps_small_directions_of_an_ill_conditioned_product() -> None:
    """Singular values from 1 to 1e-10 survive, which they would not if Gram matrices were used for the SVD."""
    left, right = np.linalg.qr(draw((20, 4, 4)).B)[0], np.linalg.qr(draw((20, 4, 4), 1).B)[0].T
    values = np.array([1.0, 1e-4, 1e-7, 1e-10])
    pair = Pair(np.diag(np.sqrt(values)) @ right, left * np.sqrt(values))
    assert np.abs(lowrank.spectrum(pair) / values - 1).max() < 1e-5
    assert np.abs(np.linalg.norm(lowrank.recompress(pair, 4).B, axis=0) / values - 1).max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_orthonormal_rows(dtype: type, seed: int) -> None:
    A = draw((1, 9, 4), seed, dtype).A
    Q = lowrank.orthonormal_rows(A)
    assert Q.dtype == dtype
    assert close(Q @ Q.T, np.eye(4), DTYPES[dtype])
    coordinates = A.astype(np.float64) @ Q.T
    assert close(coordinates @ Q, A, DTYPES[dtype])  # the same row space
    assert (np.diag(coordinates) > 0).all()  # the signs are fixed, so the result is unique
    assert close(lowrank.orthonormal_rows(Q), Q, DTYPES[dtype])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_split_is_the_same_approximation_with_equal_sides(shape: tuple[int, int, int], dtype: type, rank: int) -> None:
    """Eckart-Young again, and A Aᵀ = BᵀB = S."""
    pair = draw(shape, 3, dtype)
    values = np.append(np.linalg.svd(dense(pair), compute_uv=False)[: min(shape)], np.zeros(rank))[:rank]
    half = lowrank.split(pair, rank)
    assert half.A.dtype == half.B.dtype == dtype and half.A.shape == (rank, shape[1]) and half.B.shape == (shape[0], rank)
    assert np.abs(dense(half) - dense(lowrank.recompress(pair, rank))).max() < 3 * DTYPES[dtype] * values[0]
    told = values > 0
    for gram in (half.A @ half.A.T, half.B.T @ half.B):
        assert np.abs(gram[told][:, told] - np.diag(values[told])).max() < 3 * DTYPES[dtype] * values[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_keeps_directions_that_have_no_value_yet(dtype: type) -> None:
    """B of rank one: the first row of A has length √σ, the others too, and all are orthogonal; B = 0: A Aᵀ = I."""
    pair = draw((6, 5, 3), dtype=dtype)
    flat = lowrank.split(Pair(pair.A, np.outer(np.arange(1.0, 7), [1, 2, 3]).astype(dtype)), 3)
    value = np.linalg.norm(dense(flat))
    assert close(flat.A @ flat.A.T / value, np.eye(3), 3 * DTYPES[dtype])
    assert np.abs(flat.B[:, 1:]).max() < 3 * DTYPES[dtype] * np.sqrt(value)
    none = lowrank.split(Pair(pair.A, np.zeros((6, 3), dtype)), 3)
    assert close(none.A @ none.A.T, np.eye(3), 3 * DTYPES[dtype]) and not none.B.any()


# ---- sums that stay thin


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_keeps_the_product_at_the_smallest_rank_that_is_sure(shape: tuple[int, int, int], dtype: type) -> None:
    pair = draw(shape, 5, dtype)
    small = lowrank.compact(pair)
    assert small.rank == min(shape) and small.A.shape == (min(shape), shape[1]) and small.B.shape == (shape[0], min(shape))
    assert small.A.dtype == small.B.dtype == dtype
    assert close(dense(small), dense(pair), DTYPES[dtype])
    if shape[2] <= min(shape[:2]):
        assert np.array_equal(small.A, pair.A) and np.array_equal(small.B, pair.B)  # nothing is gained, nothing is touched


def test_compact_leaves_out_what_is_zero_and_nothing_that_is_small() -> None:
    pair = draw((6, 5, 4))
    pair.A[0], pair.B[:, 2] = 0.0, 0.0
    pair.B[:, 3] *= 1e-30
    small = lowrank.compact(pair)
    assert small.rank == 2 and np.array_equal(dense(small), dense(Pair(pair.A[[1, 3]], pair.B[:, [1, 3]])))
    none = lowrank.compact(Pair(pair.A, np.zeros((6, 4))))
    assert none.A.shape == (0, 5) and none.B.shape == (6, 0)
    assert not dense(none).any() and lowrank.norm(none) == 0.0 and lowrank.spectrum(none).size == 0
    assert not dense(lowrank.recompress(none, 2)).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_is_the_dense_sum(shape: tuple[int, int, int], dtype: type) -> None:
    """From nothing, then beyond min(m, n); in the dtype of what is added."""
    m, n, _ = shape
    terms = [draw((m, n, r), r, dtype) for r in (2, 1, 3, 4)]
    total = lowrank.add(None, terms[0])
    for count, term in enumerate(terms[1:], 2):
        total = lowrank.add(Pair(*(x.astype(np.float64) for x in total)), term)
        assert total.A.dtype == total.B.dtype == dtype
        assert total.rank == min(m, n, sum((2, 1, 3, 4)[:count]))
        size = sum(float(np.linalg.norm(dense(x))) for x in terms)
        assert np.linalg.norm(dense(total) - sum(dense(x) for x in terms[:count])) < DTYPES[dtype] * size


# ---- random factors and the angles between them


def test_draw_by_hand() -> None:
    """kaiming is uniform in ±1/√n, so its rows have norm 1/√3; orthonormal has A Aᵀ = I; the generator decides all."""
    rng = np.random.default_rng
    A = lowrank.draw((200, 400), "kaiming", rng(0))
    assert A.dtype == np.float32 and A.shape == (200, 400) and 0.999 / 20 < np.abs(A).max() <= 1 / 20
    assert np.linalg.norm(A, axis=1).mean() == pytest.approx(3**-0.5, rel=0.01)
    Q = lowrank.draw((4, 9), "orthonormal", rng(0))
    assert Q.dtype == np.float32 and close(Q @ Q.T, np.eye(4), 1e-6)
    for init in ("kaiming", "orthonormal"):
        assert np.array_equal(lowrank.draw((2, 5), init, rng(1)), lowrank.draw((2, 5), init, rng(1)))
        assert not np.array_equal(lowrank.draw((2, 5), init, rng(1)), lowrank.draw((2, 5), init, rng(2)))


def test_nuclear_norm_is_the_dense_one() -> None:
    pair = draw((7, 5, 3))
    assert lowrank.nuclear_norm(lowrank.spectrum(pair)) == pytest.approx(np.linalg.norm(dense(pair), "nuc"), rel=1e-13)
    assert lowrank.nuclear_norm(np.array([3.0, 1.0, 0.0])) == 4.0


def test_principal_angle_by_hand() -> None:
    """Rows along e1, along e1 turned by 0.3, and along e2: angles .3, π/2 and π/2 − .3; lengths and signs do not matter."""
    e1, turned, e2 = np.array([[2.0, 0, 0]]), -np.array([[np.cos(0.3), np.sin(0.3), 0]]), np.array([[0, 0.1, 0]])
    assert lowrank.principal_angle([e1, turned, e2]) == pytest.approx((0.3 + np.pi / 2 + np.pi / 2 - 0.3) / 3, abs=1e-12)
    A = draw((1, 9, 3)).A
    assert lowrank.principal_angle([A, A]) < 1e-7
    assert lowrank.principal_angle([A, draw((3, 3, 3), 1).A @ A]) < 1e-7  # another basis of the same space
    assert lowrank.principal_angle([A]) == 0.0
    both = np.eye(4)[:2], np.array([[1.0, 0, 0, 0], [0, np.cos(0.4), np.sin(0.4), 0]])
    assert lowrank.principal_angle(both) == pytest.approx(0.2, abs=1e-12)  # angles 0 and 0.4


# ---- any shape, and no m × n matrix


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    rank=st.integers(1, 10),
    clients=st.integers(1, 4),
    null=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_algebra_for_any_shape(sizes: tuple[int, int, int], rank: int, clients: int, null: int, seed: int) -> None:
    pairs = [draw(sizes, seed + client) for client in range(clients)]
    for pair in pairs:
        pair.B[:, : min(null, sizes[2])] = 0.0  # a rank-deficient B
    weights = np.random.default_rng(seed).dirichlet(np.ones(clients))
    ideal = sum(w * dense(p) for w, p in zip(weights, pairs, strict=True))
    size = sum(np.linalg.norm(p.B) * np.linalg.norm(p.A) for p in pairs) + 1e-300
    values = np.append(np.linalg.svd(ideal, compute_uv=False), np.zeros(11))

    stacked = lowrank.stack(pairs, weights)
    small = lowrank.recompress(stacked, rank)
    assert np.linalg.norm(dense(stacked) - ideal) < 1e-13 * size
    assert abs(np.linalg.norm(dense(small) - ideal) - np.linalg.norm(values[rank:])) < 1e-12 * size
    assert abs(lowrank.norm(stacked) - np.linalg.norm(ideal)) < 1e-7 * size
    assert np.abs(lowrank.spectrum(stacked) - values[: lowrank.spectrum(stacked).size]).max() < 1e-12 * size
    assert 0 <= lowrank.effective_rank(values) <= min(sizes[0], sizes[1], stacked.rank) + 1e-9
    gram = small.A @ small.A.T
    assert np.abs(gram - np.diag(np.diag(gram) > 0.5)).max() < 1e-12  # rows orthonormal or zero
    centre = lowrank.mean(pairs, weights)
    assert np.linalg.norm(dense(lowrank.bias(pairs, weights)) - (ideal - dense(centre))) < 1e-12 * size


def test_nothing_forms_a_matrix_of_full_size() -> None:
    """4000 × 4000 would be 128 MB; four factors of rank 2 are 0.5 MB."""
    pairs = [draw((4000, 4000, 2), seed) for seed in range(2)]
    weights = np.array([0.5, 0.5])
    tracemalloc.start()
    lowrank.norm(lowrank.bias(pairs, weights))
    lowrank.spectrum(lowrank.subtract(*pairs))
    lowrank.recompress(lowrank.stack(pairs, weights), 2)
    lowrank.orthonormal_rows(lowrank.mean(pairs, weights).A)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


# ---- padding and noise


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_keeps_the_product_and_the_type(dtype: type) -> None:
    pair = draw((4, 5, 2), dtype=dtype)
    padded = lowrank.pad(pair, 3)
    assert padded.A.shape == (3, 5) and padded.B.shape == (4, 3) and padded.A.dtype == padded.B.dtype == dtype
    assert not padded.A[2:].any() and not padded.B[:, 2:].any()
    assert np.array_equal(dense(padded), dense(pair))
    assert all(np.array_equal(a, b) for a, b in zip(lowrank.pad(pair, 2), pair, strict=True))


@pytest.mark.parametrize("noisy", ["AB", "B", "A"])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_the_dense_one(shape: tuple[int, int, int], noisy: str) -> None:
    """‖BA − B°A°‖² and σ²(m‖A°‖² + n‖B°‖²) + σ⁴·m·n·r, or one term of it, from matrices of full size."""
    (m, n, r), variance = shape, 0.3
    quiet, drawn = draw(shape), draw(shape, seed=1)
    drawn = Pair(*(array if f in noisy else np.zeros_like(array) for f, array in zip("AB", drawn, strict=True)))
    pair = Pair(quiet.A + drawn.A, quiet.B + drawn.B)
    measured, expected = lowrank.noise(pair, drawn, variance)
    assert measured == pytest.approx(np.sum((dense(pair) - dense(quiet)) ** 2), rel=1e-9)
    in_B, in_A = variance * m * np.sum(quiet.A**2), variance * n * np.sum(quiet.B**2)
    formula = {"AB": in_A + in_B + variance**2 * m * n * r, "B": in_B, "A": in_A}[noisy]
    assert expected == pytest.approx(formula, rel=1e-12)


def test_noise_that_is_far_below_the_factors_does_not_drown_in_them() -> None:
    quiet, drawn = draw((6, 5, 2)), draw((6, 5, 2), seed=1)
    drawn = Pair(drawn.A * 1e-9, drawn.B * 1e-9)
    first_order = dense(Pair(quiet.A, drawn.B)) + dense(Pair(drawn.A, quiet.B))
    measured, _ = lowrank.noise(Pair(quiet.A + drawn.A, quiet.B + drawn.B), drawn, 1.0)
    assert measured == pytest.approx(np.sum(first_order**2), rel=1e-6)


@pytest.mark.parametrize("noisy", ["AB", "B", "A"])
def test_noise_is_on_average_what_is_foretold(noisy: str) -> None:
    quiet, sigma, draws = draw((7, 9, 3)), 0.6, 4000
    rng = np.random.default_rng(0)
    results = []
    for _ in range(draws):
        drawn = Pair(*(sigma * rng.standard_normal(a.shape) * (f in noisy) for f, a in zip("AB", quiet, strict=True)))
        results.append(lowrank.noise(Pair(quiet.A + drawn.A, quiet.B + drawn.B), drawn, sigma**2))
    measured, foretold = np.array(results).T
    assert np.ptp(foretold) < 1e-9 * foretold[0]  # it depends on the factors before noise only
    error = measured.std() / np.sqrt(draws)
    assert error < 0.02 * foretold[0]
    assert abs(measured.mean() - foretold[0]) < 4 * error
