"""Encoded arrays: by hand, their error bounds, malformed bytes, and what error feedback adds up to."""

from __future__ import annotations

from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from fedlora.arrays import compression
from fedlora.arrays.compression import LEVELS, METHODS, carried, encode, encode_with_feedback
from fedlora.arrays.messages import array_bytes
from fedlora.check import ConfigError
from fedlora.untrusted import Malformed

LOSSY = METHODS[1:]
A, B, R = (f"layer.lora_{factor}.weight" for factor in "ABR")
SHAPES = [(), (1,), (7,), (1, 1), (3, 5), (5, 3), (8, 64), (2, 3, 4), (1, 9), (9, 1), (257,)]


class Believed(dict):
    """Shapes of a receiver that believes every sender."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Any:
        return ANY


def decode(encoded: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return compression.decode(encoded, Believed())


def draw(shape: tuple[int, ...], seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Rows of very different magnitude."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.integers(-6, 6, shape[:1] + (1,) * (len(shape) - 1)) if shape else 1.0
    return np.asarray(rng.standard_normal(shape) * size, dtype=dtype)


def round_trip(array: np.ndarray, method: str, share: float = 0.3, name: str = A) -> np.ndarray:
    (decoded,) = decode(encode({name: array}, method, share)).values()
    return decoded


def words(*numbers: int) -> bytes:
    return np.array(numbers, "<u4").tobytes()


def floats(*numbers: float) -> bytes:
    return np.array(numbers, "<f4").tobytes()


def flat(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


# ---- by hand


def test_int8_by_hand() -> None:
    """Row (127, −1.4, 0.6) has scale 1, row (0, 254, −3.2) has scale 2 and −3.2 / 2 = −1.6 is nearest to −2."""
    array = np.array([[127, -1.4, 0.6], [0, 254, -3.2]], np.float32)
    sent = encode({A: array}, "int8", 1)
    assert list(sent) == [f"{A}|int8"]
    assert sent[f"{A}|int8"].tobytes() == words(2, 2, 3) + floats(1, 2) + bytes([127, 255, 1, 0, 127, 254])
    assert np.array_equal(decode(sent)[A], [[127, -1, 1], [0, 254, -4]])


def test_int4_by_hand_with_an_odd_number_of_codes() -> None:
    """Codes 7, −7, 2 are half bytes 15, 1, 10, and 8 (a zero) fills the last byte: 1·16 + 15, 8·16 + 10."""
    sent = encode({"head": np.array([3.5, -3.5, 0.9])}, "int4", 1)
    assert sent["head|int4"].tobytes() == words(1, 3) + floats(0.5) + bytes([31, 138])
    assert np.array_equal(decode(sent)["head"], [3.5, -3.5, 1])


def test_float16_by_hand() -> None:
    sent = encode({A: np.array([[1 + 2**-11, 65504, 2**-26]])}, "float16", 1)
    assert sent[f"{A}|float16"].dtype == np.float16
    assert np.array_equal(decode(sent)[A], [[1, 65504, 0]])


def test_top_k_by_hand() -> None:
    """A third of six entries is two: −4 and, of the three of magnitude 3, the first."""
    array = np.array([[3, 1, -3], [-4, 3, 0]], np.float32)
    sent = encode({A: array}, "top_k", 1 / 3)
    assert sent[f"{A}|top_k"].tobytes() == words(2, 2, 3) + floats(3, -4) + bytes([0, 3])
    assert np.array_equal(decode(sent)[A], [[3, 0, 0], [-4, 0, 0]])


@pytest.mark.parametrize(("name", "shape", "scales"), [(A, (2, 5), 2), (B, (5, 2), 2), (R, (2, 2), 2), ("head", (3, 5), 3)])
def test_one_scale_for_each_direction(name: str, shape: tuple[int, int], scales: int) -> None:
    """A direction a thousand times smaller than the other keeps its own precision; a transposed factor has the same bytes."""
    array = draw(shape, dtype=np.float64)
    (sent,) = encode({name: array}, "int8", 1).values()
    assert sent.size == 12 + 4 * scales + array.size
    if name == B:
        (turned,) = encode({A: array.T}, "int8", 1).values()
        assert np.array_equal(sent[12:], turned[12:])


# ---- round trips and error bounds


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS)
def test_shape_and_dtype_of_a_round_trip(method: str, dtype: type) -> None:
    for shape in SHAPES:
        for name in (A, B, "head"):
            decoded = round_trip(np.ones(shape, dtype), method, 1, name)
            assert decoded.shape == shape
            assert decoded.dtype == (dtype if method == "none" else np.float32)
            assert np.allclose(decoded, 1, rtol=2e-7)  # a scale is rounded up


@pytest.mark.parametrize("method", LEVELS)
@pytest.mark.parametrize("name", [A, B, "head"])
def test_codes_err_by_half_a_scale_at_most(method: str, name: str) -> None:
    for seed in range(30):
        for shape in SHAPES:
            array = draw(shape, seed, np.float64)
            axis = None if len(shape) != 2 else 0 if name == B else 1
            peak = np.abs(array).max(axis=axis, keepdims=True)
            error = np.abs(round_trip(array, method, name=name) - array)
            assert np.all(error <= peak / LEVELS[method] / 2 * (1 + 1e-4))


@pytest.mark.parametrize("method", LEVELS)
@pytest.mark.parametrize("peak", [1e-45, 3e-44, 1e-38, 1e38, 1e-300])
def test_half_a_scale_holds_at_the_ends_of_float32(method: str, peak: float) -> None:
    array = np.linspace(-peak, peak, 11)
    (sent,) = encode({"head": array}, method, 1).values()
    scale = float(sent[8:12].view("<f4")[0])
    error = np.abs(decode({f"head|{method}": sent})["head"] - array).max()
    assert error <= scale * (0.5 + 1e-5)
    assert scale <= max(2**-149, peak / LEVELS[method] * (1 + 1e-6) + 2**-149)


def test_float16_errs_by_its_rounding_at_most() -> None:
    for seed in range(30):
        array = draw((8, 64), seed, np.float64) / 1e3
        error = np.abs(round_trip(array, "float16") - array)
        assert np.all(error <= np.maximum(np.abs(array) * 2**-11, 2**-25))


def test_top_k_keeps_the_largest_and_nothing_else() -> None:
    for seed in range(30):
        for shape in SHAPES:
            array = np.abs(draw(shape, seed))
            kept = round_trip(array, "top_k", 0.3)
            count = max(1, round(0.3 * array.size))
            assert np.array_equal(np.sort(kept, axis=None)[-count:], np.sort(array, axis=None)[-count:])
            assert np.count_nonzero(kept) == count
            assert np.array_equal(kept[kept > 0], array[kept > 0])


def test_top_k_settles_ties_by_the_lower_index() -> None:
    array = np.where(np.arange(1000) % 2, 1, -1).astype(np.float32)
    assert np.array_equal(np.flatnonzero(round_trip(array, "top_k", 0.01)), np.arange(10))


@pytest.mark.parametrize(("size", "width"), [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_indices_have_the_smallest_type(size: int, width: int) -> None:
    array = np.arange(size, dtype=np.float32)
    (sent,) = encode({"head": array}, "top_k", 1 / size).values()
    assert sent.size == 8 + 4 + width
    assert decode({"head|top_k": sent})["head"][-1] == size - 1


@pytest.mark.parametrize("method", METHODS)
def test_zero_arrays_stay_zero(method: str) -> None:
    one_row = np.zeros((3, 5), np.float32)
    one_row[1] = 7
    with np.errstate(divide="raise", invalid="raise"):
        assert not round_trip(np.zeros((3, 5)), method).any()
        assert np.allclose(round_trip(one_row, method, 1), one_row, rtol=2e-7, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_integers_and_empty_arrays_stay_plain(method: str) -> None:
    arrays = {"count": np.array([300]), "empty": np.zeros((0, 4))}
    sent = encode(arrays, method, 0.5)
    assert all(sent[name] is array for name, array in arrays.items())
    assert all(decode(sent)[name] is array for name, array in arrays.items())


def test_arrays_of_many_names_keep_their_order() -> None:
    arrays = {name: draw((4, 4)) for name in (B, "head", A)}
    assert list(decode(encode(arrays, "int4", 1))) == list(arrays)


def test_inputs_are_not_changed() -> None:
    array = draw((4, 4))
    before = array.copy()
    for method in METHODS:
        encode_with_feedback({B: array}, {B: array}, method, 0.5)
    assert np.array_equal(array, before)


@pytest.mark.parametrize(
    ("method", "each"), zip(METHODS, [32768, 16384, 12 + 32 + 8192, 12 + 32 + 4096, 12 + 82 * 6], strict=True)
)
def test_bytes_of_roberta_large(method: str, each: int) -> None:
    """24 layers, query and value, r = 8: 48 pairs of (8, 1024) and (1024, 8), each array with 128 bytes of header."""
    arrays = {f"{layer}.lora_{f}.weight": np.ones((8, 1024), np.float32) for layer in range(48) for f in "A"}
    arrays |= {name.replace("_A", "_B"): array.T for name, array in arrays.items()}
    assert sent_bytes(encode(arrays, method, 0.01)) == 96 * (128 + each)


def sent_bytes(arrays: dict[str, np.ndarray]) -> int:
    record = ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})
    return array_bytes(RecordDict({"arrays": record}))


# ---- refusals


@pytest.mark.parametrize("method", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_what_cannot_be_sent_is_refused_by_name(method: str, bad: float) -> None:
    with pytest.raises(ValueError, match=f"^{A} has an entry that is NaN or above"):
        encode({A: np.array([[1.0, bad]])}, method, 0.5)


def test_float16_refuses_what_it_would_overflow() -> None:
    assert round_trip(np.array([-65504.0]), "float16") == -65504
    with pytest.raises(ValueError, match="65504 in magnitude, too large for float16"):
        encode({A: np.array([65505.0])}, "float16", 0.5)


def test_none_sends_whatever_there_is() -> None:
    array = np.array([np.nan])
    assert encode({A: array}, "none", 0.5)[A] is array


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="did you mean int8"):
        encode({}, "int9", 0.5)
    for share in (0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="share="):
            encode({A: np.ones(3)}, "top_k", share)
    with pytest.raises(ValueError, match="marks an encoded array"):
        encode({"a|int8": np.ones(3)}, "none", 0.5)


SHAPE = words(2, 1, 3)
MALFORMED = {
    "unknown method": ("int9", flat(SHAPE), "'int9'"),
    "no method": ("", flat(SHAPE), "''"),
    "none marked": ("none", flat(SHAPE), "'none'"),
    "float16 in float32": ("float16", np.ones(3, np.float32), "float32 instead of float16"),
    "float16 not finite": ("float16", np.array([np.inf], np.float16), "not finite"),
    "int8 in int8": ("int8", flat(SHAPE).view(np.int8), "instead of flat uint8"),
    "two axes": ("int8", flat(SHAPE + floats(1) + bytes(4)).reshape(2, -1), "instead of flat uint8"),
    "no bytes": ("int8", flat(b""), "within its shape"),
    "within the number of axes": ("int4", flat(b"\2\0\0"), "within its shape"),
    "within the axes": ("top_k", flat(words(2, 1)), "within its shape"),
    "axes beyond memory": ("int8", flat(words(2**32 - 1, 1)), "within its shape"),
    "too many axes": ("int8", flat(words(70, *[1] * 70) + floats(1) + b"\1"), "too large"),
    "empty shape": ("top_k", flat(words(1, 0) + floats(1) + b"\0"), "empty or too large"),
    "huge shape": ("top_k", flat(words(2, 2**31, 2**31) + floats(1) + bytes(8)), "empty or too large"),
    "int8 short": ("int8", flat(SHAPE + floats(1) + bytes(2)), "has 6 bytes, which int8 cannot give"),
    "int8 long": ("int8", flat(SHAPE + floats(1) + bytes(4)), "has 8 bytes"),
    "int8 without scales": ("int8", flat(SHAPE), "has 0 bytes"),
    "int4 short": ("int4", flat(SHAPE + floats(1) + bytes(1)), "has 5 bytes, which int4 cannot give"),
    "int4 long": ("int4", flat(SHAPE + floats(1) + bytes(3)), "has 7 bytes"),
    "scale NaN": ("int8", flat(SHAPE + floats(np.nan) + bytes(3)), "scale that is negative or NaN"),
    "scale negative": ("int4", flat(SHAPE + floats(-1) + bytes(2)), "scale that is negative or NaN"),
    "scale infinite": ("int8", flat(SHAPE + floats(np.inf) + bytes(3)), "not finite"),
    "scale overflows": ("int8", flat(SHAPE + floats(3e38) + b"\2\0\0"), "not finite"),
    "top_k short": ("top_k", flat(SHAPE + floats(1)), "has 4 bytes, which top_k cannot give"),
    "top_k long": ("top_k", flat(SHAPE + floats(1) + b"\0\1"), "has 6 bytes, which top_k cannot give"),
    "top_k of nothing": ("top_k", flat(SHAPE), "has 0 bytes"),
    "index out of range": ("top_k", flat(SHAPE + floats(1) + b"\3"), "out of range, repeated or out of order"),
    "index repeated": ("top_k", flat(SHAPE + floats(1, 2) + b"\1\1"), "out of range, repeated or out of order"),
    "indices fall": ("top_k", flat(SHAPE + floats(1, 2) + b"\2\1"), "out of range, repeated or out of order"),
    "more than all": ("top_k", flat(SHAPE + floats(*range(4)) + b"\0\1\2\3"), "out of range, repeated or out of order"),
    "value NaN": ("top_k", flat(SHAPE + floats(np.nan) + b"\1"), "not finite"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_bytes_are_refused_by_name(case: str) -> None:
    method, array, reason = MALFORMED[case]
    with pytest.raises(ValueError, match=f"^{A} .*{reason}"):
        decode({f"{A}|{method}": array})


def test_a_shape_is_held_against_the_one_expected_before_anything_of_it_is_made() -> None:
    """Ten bytes may claim 16 GB."""
    claim = {f"{A}|top_k": flat(words(2, 2**16, 2**16 - 1) + floats(1) + words(7))}
    for shapes, reason in (({A: (3, 5)}, "has shape (65536, 65535) instead of (3, 5)"), ({}, "is unknown"), (None, "top_k")):
        with pytest.raises(Malformed) as error:
            compression.decode(claim, shapes)
        assert reason in str(error.value)
    array = draw((3, 5))
    for method in LOSSY:
        sent = encode({A: array}, method, 0.3)
        assert np.array_equal(compression.decode(sent, {A: (3, 5)})[A], decode(sent)[A])
        with pytest.raises(Malformed, match=r"has shape \(3, 5\) instead of \(5, 3\)"):
            compression.decode(sent, {A: (5, 3)})


def test_an_axis_that_is_left_open_may_have_any_length_and_no_other_may() -> None:
    """As the rank of a base correction, which grows with the rounds; a few bytes of top_k would make it any size."""
    sent = encode({A: draw((3, 5))}, "int8", 1.0)
    assert compression.decode(sent, {A: (None, 5)})[A].shape == (3, 5)
    for shape in ((None, 4), (None,), (None, 5, 1)):
        with pytest.raises(Malformed, match="has shape"):
            compression.decode(sent, {A: shape})
    with pytest.raises(Malformed, match="top_k, which only clients do"):
        compression.decode(encode({A: draw((3, 5))}, "top_k", 0.5), {A: (None, 5)})


def test_an_array_sent_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=f"^{A} was sent twice"):
        decode({A: np.ones((1, 3))} | encode({A: np.ones((1, 3))}, "int8", 1))


@pytest.mark.parametrize("method", ["int8", "int4", "top_k"])
def test_no_damage_to_the_bytes_gives_another_error(method: str) -> None:
    """Cut short, lengthened or with bytes changed, an array decodes to finite numbers or is refused by name."""
    (sent,) = encode({A: draw((3, 5))}, method, 0.4).values()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = np.frombuffer(sent.tobytes()[: rng.integers(sent.nbytes + 1)] + rng.bytes(rng.integers(3)), np.uint8).copy()
        damaged[rng.integers(12, 60) :][:1] = rng.integers(256)  # the shape is in the bytes before
        try:
            decoded = decode({f"{A}|{method}": damaged})[A]
        except ValueError as error:
            assert str(error).startswith(A)
        else:
            assert np.isfinite(decoded).all()


# ---- error feedback


def rounds(method: str, name: str, count: int, share: float = 0.1, shape: tuple[int, int] = (4, 32)) -> list[float]:
    """After each round, the norm of (all that was meant − all that was sent), for a steady change and noise on it."""
    rng = np.random.default_rng(1)
    steady, residual = rng.standard_normal(shape), {}
    missing, errors = np.zeros(shape), []
    for _ in range(count):
        x = (steady + 0.3 * rng.standard_normal(shape)).astype(np.float32)
        sent, residual = encode_with_feedback({name: x}, residual, method, share)
        missing += x - decode(sent)[name].astype(np.float64)
        errors.append(float(np.abs(missing).max() if method in LEVELS else np.linalg.norm(missing)))
    assert residual[name].dtype == np.float32
    assert np.allclose(residual[name], missing, atol=1e-4)
    return errors


@pytest.mark.parametrize(("method", "bound"), [("int8", 4 / 127 / 2), ("int4", 4 / 6.5 / 2)])
@pytest.mark.parametrize("name", [A, B])
def test_what_codes_missed_stays_within_half_a_step(method: str, bound: float, name: str) -> None:
    """|x| < 4 here. With |e| ≤ s/2 the scale is s ≤ (4 + s/2)/7 under int4, so s ≤ 4/6.5, in every round alike."""
    errors = rounds(method, name, 400)
    assert max(errors) <= bound
    assert max(errors[200:]) < 2 * max(errors[:200])


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_what_top_k_missed_stays_bounded(share: float) -> None:
    shape = (4, 32)
    left = np.sqrt(1 - max(1, round(share * 128)) / 128)
    largest = 16.0  # of ‖x‖: 128 entries, of variance 1.09
    errors = rounds("top_k", A, 600, share, shape)
    assert max(errors) <= largest * left / (1 - left)
    assert max(errors[300:]) < 1.2 * max(errors[:300])


@pytest.mark.parametrize("method", ["int4", "top_k"])
def test_the_average_of_what_was_sent_tends_to_the_mean_only_with_feedback(method: str) -> None:
    x, residual, total = {A: draw((4, 32), 3)}, {}, np.zeros((4, 32))
    for _ in range(500):
        sent, residual = encode_with_feedback(x, residual, method, 0.05)
        total += decode(sent)[A]
    alone = np.linalg.norm(round_trip(x[A], method, 0.05) - x[A])
    assert np.linalg.norm(total / 500 - x[A]) < 0.1 * alone


def test_without_loss_nothing_is_left() -> None:
    x = {A: draw((3, 5)), "count": np.array([3])}
    for method, share in (("none", 1), ("top_k", 1)):
        sent, residual = encode_with_feedback(x, {}, method, share)
        assert list(residual) == [A] and not residual[A].any()
        assert np.array_equal(decode(sent)[A], x[A])


def test_none_with_a_residual_sends_it_in_the_dtype_of_the_array() -> None:
    sent, residual = encode_with_feedback({A: np.ones(2, np.float32)}, {A: np.full(2, 0.5, np.float32)}, "none", 1)
    assert sent[A].dtype == np.float32 and np.array_equal(sent[A], [1.5, 1.5])
    assert not residual[A].any()


def test_the_residual_of_what_is_not_sent_is_kept() -> None:
    kept = np.full(3, 0.25, np.float32)
    _, residual = encode_with_feedback({A: np.ones(3)}, {B: kept}, "int8", 1)
    assert residual.keys() == {A, B} and residual[B] is kept


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=f"^{A} has shape"):
        encode_with_feedback({A: np.ones((2, 3))}, {A: np.ones((1, 3))}, "int8", 1)


# ---- carrying the residual of B to another A


def test_carried_by_hand() -> None:
    """e A_old = 6·(1, 0); beside A_new = (1, 1) the nearest multiple is 3·(1, 1)."""
    assert carried(np.array([[3.0]]), np.array([[2.0, 0.0]]), np.array([[1.0, 1.0]])) == pytest.approx(3)


def test_carried_is_the_very_residual_where_A_is_the_same() -> None:
    residual, old = draw((6, 3)), draw((3, 8), 1)
    assert carried(residual, old, old.copy()) is residual


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_carried_keeps_the_product_where_A_was_turned(dtype: type) -> None:
    rng = np.random.default_rng(2)
    residual, old = rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((3, 20))
    new = np.linalg.qr(rng.standard_normal((3, 3)))[0] @ old
    turned = carried(residual, old.astype(dtype), new.astype(dtype))
    assert turned.dtype == np.float32
    assert np.allclose(turned @ new, residual @ old, atol=1e-5)
    assert not np.allclose(turned, residual, atol=0.1)


def test_carried_leaves_little_where_A_was_drawn_anew() -> None:
    """Of a product in a random r-dimensional row space, the share that another one holds is √(r/n) = 1/16 in norm."""
    rng = np.random.default_rng(3)
    residual, old, new = rng.standard_normal((64, 4)), rng.standard_normal((4, 1024)), rng.standard_normal((4, 1024))
    left = carried(residual, old, new) @ new
    assert 0.5 / 16 < np.linalg.norm(left) / np.linalg.norm(residual @ old) < 2 / 16
    assert np.allclose((left - residual @ old) @ new.T, 0, atol=1e-2)  # least squares: the rest is orthogonal to the new rows


def test_carried_to_another_rank_and_to_repeated_rows() -> None:
    """A_new spans the old rows with one to spare: nothing is lost, and no direction is divided by nothing."""
    residual, old = draw((6, 2), 4), np.random.default_rng(5).standard_normal((2, 8)).astype(np.float32)
    new = np.concatenate([old, old[:1]])
    turned = carried(residual, old, new)
    assert turned.shape == (6, 3)
    assert np.allclose(turned @ new, residual @ old, rtol=1e-4)
