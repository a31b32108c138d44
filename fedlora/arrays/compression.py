"""Fewer bytes a message: named arrays ⇄ encoded ones, and the error feedback of a sender. Pure functions of arrays.

    method    on the wire                                          an entry x becomes
    none      `<name>`, the array as it is                         x
    float16   `<name>|float16`, its shape                          x to within max(2⁻¹¹·|x|, 2⁻²⁵)
    int8      `<name>|int8`, bytes: shape, scales, codes           scale · code, |code| ≤ 127, to within half a scale
    int4      `<name>|int4`, bytes: shape, scales, nibbles         scale · code, |code| ≤ 7, to within half a scale
    top_k     `<name>|top_k`, bytes: shape, values, indices        x if it is among the largest by magnitude, else 0

Bytes are a flat uint8 array, little-endian: one array for each array, because each costs a header of 128 bytes. The shape is
uint32: the number of axes, then their lengths. Scales and values are float32. Indices count entries in C order, rise, and have
the smallest unsigned type that holds the size less one. A nibble holds code + 8; of two in a byte the low one is the first.

The scales are one for each rank direction of a factor: a row of A (r, n) and of R, a column of B (m, r), and codes follow
direction by direction. Of other arrays, a matrix has one scale a row and the rest one in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedlora.check import fraction, one_of
from fedlora.untrusted import Malformed

METHODS = ("none", "float16", "int8", "int4", "top_k")
LEVELS = {"int8": 127, "int4": 7}  # the largest code
LARGEST = 1e38  # leaves a scale that is rounded up room within float32
MARK = "|"  # stands in no name of a parameter

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int | None, ...]]  # of arrays by name; an axis None may have any length


def encode(arrays: Mapping[str, np.ndarray], method: str, share: float) -> Arrays:
    """The arrays as they go on the wire; `share` in (0, 1] is read by top_k only, which keeps round(share · size), or one.

    Guarantee, for float32 and float64 alike, but for the rounding of a decoded number to float32: int8 and int4 err by half a
    scale at most, where a scale is the largest magnitude of its direction over 127 or 7, rounded up to float32 (a direction of
    zeros has scale 0 and stays zero). Among equal magnitudes top_k takes those of lower index. Arrays of integers and arrays
    without entries stay plain.

    Raises ValueError naming the array for a NaN and for an entry too large to send (float16: above 65504; bytes: above 1e38).
    """
    one_of(METHODS, method=method)
    encoded: Arrays = {}
    for name, array in arrays.items():
        if MARK in name:
            raise ValueError(f"{name} holds '{MARK}', which marks an encoded array")
        if method == "none" or not _lossy(array):
            encoded[name] = array
            continue
        values = array.astype(np.float64)
        largest = float(np.finfo(np.float16).max) if method == "float16" else LARGEST
        if not np.abs(values).max() <= largest:  # NaN fails every comparison
            raise ValueError(f"{name} has an entry that is NaN or above {largest:g} in magnitude, too large for {method}")
        if method == "float16":
            wire = values.astype(np.float16)
        elif method == "top_k":
            wire = _largest_entries(values, share)
        else:
            wire = _quantised(name, values, method)
        encoded[f"{name}{MARK}{method}"] = wire
    return encoded


def decode(encoded: Mapping[str, np.ndarray], shapes: Shapes | None = None) -> Arrays:
    """The arrays by their own names, those that were encoded in float32, whatever dtype they had; plain arrays as they are.

    `shapes` are those that encoded arrays must have, by their own names. Without one that is whole the shape is the sender's
    word, and top_k is refused, whose few bytes may claim gigabytes; what the other methods give is at most eight times as long
    as its bytes.
    Raises Malformed, one sentence naming the array, for an unknown method, a wrong dtype or shape, bytes too few or too many,
    indices that are out of range or do not rise, numbers that are not finite, an array sent twice.
    """
    decoded: Arrays = {}
    for sent, array in encoded.items():
        name, marked, method = sent.partition(MARK)
        if name in decoded:
            raise Malformed(f"{name} was sent twice")
        decoded[name] = _decoded(name, array, method, shapes) if marked else array
    return decoded


def encode_with_feedback(
    arrays: Mapping[str, np.ndarray], residual: Mapping[str, np.ndarray], method: str, share: float
) -> tuple[Arrays, Arrays]:
    """What is sent, Q(x + e), and the residual to keep, e' = x + e − decoded(Q(x + e)), float32 (Karimireddy et al., 2019).

    All that was ever sent adds up to all that was meant less the last residual, which does not grow with the rounds: it is half
    a scale at most under int8 and int4, and ‖e‖ ≤ max ‖x‖ · √(1−δ) / (1−√(1−δ)) under top_k, δ the share kept. So x should be
    the change since the broadcast, for that is what adds up. An array without a residual has e = 0; the residual of an array
    that is not sent this time is kept. Raises ValueError as `encode` does, and where a residual's shape is not its array's.
    """
    wanted: Arrays = {}
    for name in arrays.keys() & residual.keys():
        if residual[name].shape != arrays[name].shape:
            raise ValueError(f"{name} has shape {arrays[name].shape} and its residual {residual[name].shape}")
        wanted[name] = arrays[name].astype(np.float64) + residual[name]
    encoded = encode({name: wanted.get(name, array).astype(array.dtype) for name, array in arrays.items()}, method, share)
    decoded = decode(encoded, {name: array.shape for name, array in arrays.items()})
    left = {
        name: (wanted.get(name, array) - decoded[name].astype(np.float64)).astype(np.float32)
        for name, array in arrays.items()
        if _lossy(array)
    }
    return encoded, dict(residual) | left


def carried(residual: np.ndarray, A_old: np.ndarray, A_new: np.ndarray) -> np.ndarray:
    """The residual of B (m, r_old), which stood beside A_old, for a B beside A_new (r_new, n): float32, (m, r_new).

    The least-squares solution of e' A_new = e A_old, e' = e (A_old A_newᵀ)(A_new A_newᵀ)⁺. The very same array where A did not
    change; exact where A changed within its row space (FedSVD); where A was drawn anew (FLoRA), what is left of the product is
    about √(r/n) of it, the part that a random row space can hold.
    """
    if np.array_equal(A_old, A_new):
        return residual
    # The pseudoinverse of A itself: its Gram matrix would square the condition. Directions below float32's rounding are noise.
    turn = A_old.astype(np.float64) @ np.linalg.pinv(A_new.astype(np.float64), rcond=1e-6)
    return (residual.astype(np.float64) @ turn).astype(np.float32)


def _lossy(array: np.ndarray) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating) and array.size)


def _quantised(name: str, values: np.ndarray, method: str) -> np.ndarray:
    lines = (values.T if _by_column(name, values.shape) else values).reshape(_grid(name, values.shape))
    peak, levels = np.abs(lines).max(axis=1), LEVELS[method]
    scales = (peak / levels).astype("<f4")
    # Rounded up, so that the largest entry has a code and half a scale holds even where a scale is subnormal.
    scales = np.where(scales.astype(np.float64) * levels < peak, np.nextafter(scales, np.float32(np.inf)), scales)
    steps = np.where(scales > 0, scales, 1).astype(np.float64)
    codes = np.rint(lines / steps[:, None]).astype(np.int8).ravel()
    if method == "int4":
        halves = (np.append(codes, 0) if codes.size % 2 else codes) + 8
        codes = halves[0::2].astype(np.uint8) | halves[1::2].astype(np.uint8) << 4
    return _buffer(values.shape, scales, codes)


def _largest_entries(values: np.ndarray, share: float) -> np.ndarray:
    flat = values.ravel()
    count = max(1, round(fraction(share=share) * flat.size))
    size = np.abs(flat)
    last = np.partition(size, flat.size - count)[flat.size - count]
    above, ties = np.flatnonzero(size > last), np.flatnonzero(size == last)
    indices = np.sort(np.concatenate([above, ties[: count - above.size]]))
    return _buffer(values.shape, flat[indices].astype("<f4"), indices.astype(_index_type(flat.size)))


def _decoded(name: str, array: np.ndarray, method: str, shapes: Shapes | None) -> np.ndarray:
    if method not in METHODS[1:]:
        raise Malformed(f"{name} is encoded by {method!r}, which is not known")
    if shapes is not None and name not in shapes:
        raise Malformed(f"{name} is unknown")
    if method == "float16":
        if array.dtype != np.float16:
            raise Malformed(f"{name} is encoded as {array.dtype} instead of float16")
        shape, content = array.shape, array
    else:
        shape, content = _content(name, array)
    asked = shape if shapes is None else shapes[name]
    if shape != asked and not _fits(shape, asked):
        raise Malformed(f"{name} has shape {shape} instead of {asked}")
    if method == "float16":
        return _finite(name, array.astype(np.float32))
    if method != "top_k":
        return _dequantised(name, shape, content, method)
    if shapes is None or shape != asked:
        raise Malformed(f"{name} is encoded by top_k, which only clients do")
    return _scattered(name, shape, content)


def _fits(shape: tuple[int, ...], asked: tuple[int | None, ...]) -> bool:
    return len(shape) == len(asked) and all(want in (None, have) for have, want in zip(shape, asked, strict=True))


def _dequantised(name: str, shape: tuple[int, ...], content: np.ndarray, method: str) -> np.ndarray:
    lines, length = _grid(name, shape)
    size = lines * length
    if content.size != 4 * lines + (size if method == "int8" else (size + 1) // 2):
        raise Malformed(f"{name} of shape {shape} has {content.size} bytes, which {method} cannot give")
    scales, codes = content[: 4 * lines].view("<f4"), content[4 * lines :].view(np.int8)
    if not np.all(scales >= 0):
        raise Malformed(f"{name} has a scale that is negative or NaN")
    if method == "int4":
        halves = codes.view(np.uint8)
        codes = np.stack([halves & 15, halves >> 4], axis=1).ravel()[:size].astype(np.int8) - np.int8(8)
    with np.errstate(over="ignore", invalid="ignore"):
        values = codes.reshape(lines, length) * scales[:, None]  # rounded once: a code and a scale fit float64 together
    values = _finite(name, values.astype(np.float32, copy=False))
    return np.ascontiguousarray(values.T) if _by_column(name, shape) else values.reshape(shape)


def _scattered(name: str, shape: tuple[int, ...], content: np.ndarray) -> np.ndarray:
    index_type = _index_type(math.prod(shape))
    count, over = divmod(content.size, 4 + index_type.itemsize)
    if over or not count:
        raise Malformed(f"{name} of shape {shape} has {content.size} bytes, which top_k cannot give")
    indices = content[4 * count :].view(index_type).astype(np.int64)
    if indices[-1] >= math.prod(shape) or np.any(np.diff(indices) <= 0):
        raise Malformed(f"{name} has indices that are out of range, repeated or out of order")
    values = np.zeros(math.prod(shape), np.float32)
    values[indices] = _finite(name, content[: 4 * count].view("<f4"))
    return values.reshape(shape)


def _buffer(shape: tuple[int, ...], *parts: np.ndarray) -> np.ndarray:
    head = np.array([len(shape), *shape], "<u4")
    return np.frombuffer(b"".join(part.tobytes() for part in (head, *parts)), np.uint8)


def _content(name: str, array: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """The shape that the bytes begin with, and the bytes after it."""
    if array.dtype != np.uint8 or array.ndim != 1:
        raise Malformed(f"{name} is encoded as {array.dtype} of shape {array.shape} instead of flat uint8")
    axes = int(array[:4].view("<u4")[0]) if array.size >= 4 else -1
    words = array[4 : 4 * (1 + axes)]
    if axes < 0 or words.size != 4 * axes:
        raise Malformed(f"{name} ends within its shape, after {array.size} bytes")
    shape = tuple(int(length) for length in words.view("<u4"))
    if axes > 32 or not 0 < math.prod(shape) < 2**32:
        raise Malformed(f"{name} has shape {shape}, which is empty or too large")
    return shape, array[4 * (1 + axes) :]


def _by_column(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".lora_B.weight")


def _grid(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Directions, each with a scale of its own, and entries of each."""
    if len(shape) != 2:
        return 1, math.prod(shape)
    return shape[::-1] if _by_column(name, shape) else shape


def _index_type(size: int) -> np.dtype:
    return np.min_scalar_type(size - 1).newbyteorder("<")


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise Malformed(f"{name} has numbers that are not finite")
    return values
