"""Replies that a hostile or broken client could send: an honest one, damaged at random. For tests and for longer fuzzing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

Rng = np.random.Generator
NUMBERS: list[Any] = [0, -1, 1, 2**62, -(2**62), 10**12, 0.5, 1e30, -1e300, float("nan"), float("inf"), [], [1, 2], [0.5]]
TEXTS = ["", "\x1b[2J\x1b]0;x\x07", "a\nb\rc", "\u202e", "x" * 10_000, "../../etc/x", "|top_k", "a.lora_A.weight", "\ud800"]
HEADERS = ["'<f4'", "'<f8'", "'|O'", "'<M8[s]'", "'<c8'", "True", "(", ")", "9", "-1", "0", ",", "99999999999", "é", " "]


def reply(honest: RecordDict, rng: Rng) -> RecordDict:
    """A copy of what an honest client sends, damaged once to three times."""
    content = copy.deepcopy(honest)
    for _ in range(rng.integers(1, 4)):
        DAMAGES[rng.integers(len(DAMAGES))](content, rng)
    return content


def error(message: Message, rng: Rng) -> Message:
    """An error in the place of a reply, with a reason of any kind or none."""
    return Message(Error(int(rng.integers(-5, 500)), (None, *TEXTS)[rng.integers(len(TEXTS) + 1)]), reply_to=message)


def data(sent: bytes, rng: Rng) -> bytes:
    """The bytes of an array with bits flipped, cut short, lengthened, emptied, or with a piece of the header put elsewhere."""
    kind, damaged = rng.integers(6), bytearray(sent)
    if kind == 0 and damaged:
        for place in rng.integers(0, min(len(damaged), 128) * 8, rng.integers(1, 9)):
            damaged[place // 8] ^= 1 << (place % 8)
    elif kind == 1 and damaged:
        for place in rng.integers(0, len(damaged) * 8, rng.integers(1, 64)):
            damaged[place // 8] ^= 1 << (place % 8)
    elif kind == 2:
        damaged = damaged[: rng.integers(len(damaged) + 1)]
    elif kind == 3:
        damaged += rng.bytes(rng.integers(1, 400))
    elif kind == 4:
        word, place = HEADERS[rng.integers(len(HEADERS))].encode(), int(rng.integers(10, 70))
        damaged[place : place + len(word)] = word
    else:
        damaged = bytearray(
            [b"", b"PK\x03\x04" + rng.bytes(20), b"\x80\x04.", sent[:6] + b"\x02\x00" + sent[8:]][rng.integers(4)]
        )
    return bytes(damaged)


def _one_array(content: RecordDict, rng: Rng) -> tuple[ArrayRecord, str] | None:
    records = [record for record in content.values() if isinstance(record, ArrayRecord) and len(record)]
    if not records:
        return None
    record = records[rng.integers(len(records))]
    return record, list(record)[rng.integers(len(record))]


def _bytes(content: RecordDict, rng: Rng) -> None:
    if found := _one_array(content, rng):
        record, name = found
        record[name] = Array(record[name].dtype, record[name].shape, record[name].stype, data(record[name].data, rng))


def _numbers(content: RecordDict, rng: Rng) -> None:
    """Other numbers behind an honest header: a few bits, random bytes, or the same number everywhere."""
    if found := _one_array(content, rng):
        record, name = found
        whole = record[name].data
        head, body = whole[:128], bytearray(whole[128:])
        kind = rng.integers(3)
        if kind == 0 and body:
            for place in rng.integers(0, len(body) * 8, rng.integers(1, 9)):
                body[place // 8] ^= 1 << (place % 8)
        else:
            body = bytearray(rng.bytes(len(body)) if kind == 1 else rng.bytes(8) * (len(body) // 8) + bytes(len(body) % 8))
        record[name] = Array(record[name].dtype, record[name].shape, record[name].stype, head + bytes(body))


def _array(content: RecordDict, rng: Rng) -> None:
    """Another array under a name: of another type or shape, or with numbers that are huge or none."""
    if found := _one_array(content, rng):
        record, name = found
        shape = tuple(int(axis) for axis in rng.integers(0, 5, rng.integers(0, 5)))
        value = [0.0, 1e30, -1e38, 1e300, np.nan, np.inf][rng.integers(6)]
        kind = ["<f4", "<f8", ">f4", "<f2", "<i8", "|u1", "|b1", "<c8", "<U3", "<M8[s]"][rng.integers(10)]
        with np.errstate(all="ignore"):
            filled = np.full(shape if rng.integers(2) else record[name].shape, value).astype("<f8")
            record[name] = Array(np.asarray(filled if kind[1] == "f" else np.nan_to_num(filled)).astype(kind))


def _stype(content: RecordDict, rng: Rng) -> None:
    if found := _one_array(content, rng):
        record, name = found
        stype = ["", "torch", "pickle", *TEXTS][rng.integers(3 + len(TEXTS))]
        record[name] = Array(record[name].dtype, record[name].shape, stype, record[name].data)


def _name(content: RecordDict, rng: Rng) -> None:
    """A name taken away, a new one, one twice, or an array said to be encoded."""
    if found := _one_array(content, rng):
        record, name = found
        method = ("float16", "int8", "int4", "top_k", "none", "")[rng.integers(6)]
        other = [*TEXTS, f"{name}|{method}", name.removesuffix(".weight"), f"high/{name}"][rng.integers(len(TEXTS) + 3)]
        record[other] = record[name]
        if rng.integers(2):
            del record[name]


def _encoded(content: RecordDict, rng: Rng) -> None:
    """Random bytes that are said to be encoded, with any shape before them."""
    if found := _one_array(content, rng):
        record, name = found
        axes = rng.integers(0, [4, 2**16, 2**32][rng.integers(3)], rng.integers(0, 4))
        claimed = np.array([len(axes), *axes], "<u4").tobytes() + rng.bytes(rng.integers(0, 40))
        method = ("int8", "int4", "top_k")[rng.integers(3)]
        del record[name]
        record[f"{name}|{method}"] = Array(np.frombuffer(claimed, np.uint8))


def _metric(content: RecordDict, rng: Rng) -> None:
    for record in content.values():
        if isinstance(record, MetricRecord):
            names = [*record, "client", "num-examples", "accuracy", *TEXTS]
            record[names[rng.integers(len(names))]] = NUMBERS[rng.integers(len(NUMBERS))]
            if rng.integers(4) == 0 and len(record):
                del record[list(record)[rng.integers(len(record))]]


def _record(content: RecordDict, rng: Rng) -> None:
    """A record taken away, renamed, of another kind, or one more."""
    kinds: list[Callable[[], Any]] = [ArrayRecord, lambda: MetricRecord({"x": 1}), lambda: ConfigRecord({"client": "0"})]
    name = ["arrays", "metrics", "config", "sum", *TEXTS][rng.integers(4 + len(TEXTS))]
    if len(content) and rng.integers(2):
        moved = content.pop(list(content)[rng.integers(len(content))])
        if rng.integers(2):
            content[name] = moved
    else:
        content[name] = kinds[rng.integers(3)]()


DAMAGES: list[Callable[[RecordDict, Rng], None]] = [
    _bytes, _numbers, _numbers, _numbers, _array, _stype, _name, _encoded, _metric, _metric, _record,
]  # fmt: skip
