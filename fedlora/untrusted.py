"""What comes from outside is parsed here and nowhere else: arrays, numbers and text of a sender who may mean harm.

Guarantee: whatever a sender makes up, each function returns what its docstring says or raises `Malformed`. No memory is
taken beyond a small multiple of the bytes that are there, and nothing is unpickled.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord

MOST_ARRAYS, LONGEST_NAME = 2**16, 512  # of one record
LONGEST_HEADER, MOST_AXES, MOST_ENTRIES = 1024, 32, 2**48  # of one array; numpy itself cannot have many more
MAGIC = b"\x93NUMPY\x01\x00"  # of the .npy format, version 1.0; np.save takes another for structured types only
HEADER = re.compile(
    r"\{ *'descr': *'([<>|=]?[fiub][1248])', *'fortran_order': *(True|False), *'shape': *\(([0-9, ]*)\) *,? *\}[ \n]*"
)
KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}  # of numbers: float, integer, bool


class Malformed(ValueError):
    """What came is not what it has to be: one short sentence, which may hold words of the sender; `text` cleans it."""


class Layout(NamedTuple):
    """What the header of an array tells."""

    dtype: np.dtype
    fortran: bool  # whether the first axis varies fastest
    shape: tuple[int, ...]
    start: int  # of the numbers in the bytes


def arrays(record: ArrayRecord, most_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of a record by name, each a copy in C order that may be written to.

    Raises Malformed for more than `most_bytes` bytes in all or `MOST_ARRAYS` arrays, a name that is too long, and whatever
    `array` raises it for.
    """
    if len(record) > MOST_ARRAYS:
        raise Malformed(f"{len(record)} arrays are more than {MOST_ARRAYS}")
    if (held := sum(len(sent.data) for sent in record.values())) > most_bytes:
        raise Malformed(f"{held} bytes of arrays are more than {most_bytes}")
    if long := [name for name in record if len(name) > LONGEST_NAME]:
        raise Malformed(f"{long[0][:40]}… is a name of {len(long[0])} characters")
    return {name: array(name, sent) for name, sent in record.items()}


def array(name: str, sent: Array) -> np.ndarray:
    """The array that the bytes of `sent` hold, in the .npy format, version 1.0, of float, integer or bool numbers.

    What else the sender says of its type and shape is not read. Raises Malformed, naming the array, for another format or
    type, and for numbers of more or fewer bytes than the shape asks for; nothing of that shape is allocated before.
    """
    if sent.stype != "numpy.ndarray":
        raise Malformed(f"{name} is serialised as {sent.stype[:40]} instead of numpy.ndarray")
    layout = _layout(sent.data[: min(LONGEST_HEADER, 10 + int.from_bytes(sent.data[8:10], "little"))])
    if layout is None:
        raise Malformed(f"{name} has no header of the .npy format, version 1.0")
    dtype, fortran, shape, start = layout
    if math.prod(shape) * dtype.itemsize != len(sent.data) - start:
        raise Malformed(f"{name} of shape {shape} and type {dtype} cannot have {len(sent.data) - start} bytes")
    flat = np.frombuffer(sent.data, dtype, math.prod(shape), start)
    if dtype.kind == "b":
        flat = flat.view(np.uint8) != 0  # a byte of 2 would be a bool that is neither
    return flat.reshape(shape[::-1]).T.copy() if fortran else flat.reshape(shape).copy()


@lru_cache(maxsize=4096)
def _layout(header: bytes) -> Layout | None:
    """What a header tells; None where it is none. Kept, since the arrays of all clients have the same few."""
    if header[: len(MAGIC)] != MAGIC:
        return None
    start = 10 + int.from_bytes(header[8:10], "little")
    found = HEADER.fullmatch(header[10:].decode("latin-1")) if start == len(header) else None
    if found is None or found[1].lstrip("<>|=") not in KINDS:
        return None
    axes = found[3].replace(" ", "").removesuffix(",").split(",") if found[3].strip() else []
    if len(axes) > MOST_AXES or not all(0 < len(axis) < 19 for axis in axes):
        return None
    shape = tuple(map(int, axes))
    if math.prod(max(1, axis) for axis in shape) > MOST_ENTRIES:
        return None
    return Layout(np.dtype(found[1]), found[2] == "True", shape, start)


def number(value: object, low: float, high: float) -> float:
    """The one number, finite and in [low, high]; raises Malformed for another, a bool, a list and anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        raise Malformed(f"{_shown(value)}, which is not a number from {low:g} to {high:g}")
    return float(value)


def count(value: object, low: int, high: int) -> int:
    """The one whole number in [low, high], which may come as a float; raises Malformed as `number` does."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or int(value) != value:
        raise Malformed(f"{_shown(value)}, which is not a whole number from {low} to {high}")
    return int(value)


def text(value: object, most: int = 200) -> str:
    """The text on one line of printable characters, `most` of them and an ellipsis at most; others are shown as ' ' or '?'.

    A terminal then shows it as it is: no escape code, no change of direction, no new line. Raises Malformed for no text.
    """
    if not isinstance(value, str):
        raise Malformed(f"{_shown(value)}, which is no text")
    cut = value[:most] + "…" if len(value) > most else value
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in cut)


def _shown(value: object) -> str:
    """The value, or its beginning, for a sentence."""
    return text(repr(value[:5] if isinstance(value, list | str | bytes) else value), 60)
