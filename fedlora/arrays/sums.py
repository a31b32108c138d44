"""Σ n_k X_k over clients' updates, as they come and in any order: on the server, or first where clients are played."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, Message

from fedlora.arrays import messages
from fedlora.untrusted import Malformed

HIGH, LOW = "high/", "low/"  # what names of a sum's arrays begin with
FEW = 4  # updates that take as many bytes as their sum, whose every coordinate is two float64


class Sum:
    """Σ n_k X_k and Σ n_k over arrays by name, each let go when added; the same bits in any order but for a tie in rounding.

    Two float64 a coordinate (Knuth's two-sum) carry what a float64 alone would round away, in an order that clients decide.
    """

    def __init__(self) -> None:
        self.examples: float = 0
        self._high: dict[str, np.ndarray] = {}
        self._low: dict[str, np.ndarray] = {}

    def add(self, arrays: Mapping[str, np.ndarray], examples: float) -> None:
        """Add the arrays that a client with so many examples sent; all must send the same ones."""
        for name, array in arrays.items():
            self._take(name, np.multiply(array, examples, dtype=np.float64), 0.0)
        self.examples += examples

    def join(self, sum: ArrayRecord, examples: float, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Add the sum that `record` made somewhere else; an empty one adds examples, whose arrays are in another.

        Raises Malformed where it holds anything but two finite float64 arrays of each of these names and shapes.
        """
        arrays = messages.arrays_of(sum)
        wanted = {prefix + name: shape for prefix in (HIGH, LOW) for name, shape in shapes.items()}
        if arrays and {name: array.shape for name, array in arrays.items()} != wanted:
            raise Malformed("a sum has other arrays than its clients were to send")
        if not all(array.dtype == np.float64 and np.isfinite(array).all() for array in arrays.values()):
            raise Malformed("a sum has numbers that are not finite or not float64")
        for name in shapes if arrays else ():
            self._take(name, arrays[HIGH + name], arrays[LOW + name])
        self.examples += examples

    def record(self) -> ArrayRecord:
        """The sum, for `join`."""
        parts = {HIGH: self._high, LOW: self._low}
        return messages.record({prefix + name: array for prefix, part in parts.items() for name, array in part.items()})

    def mean(self) -> dict[str, np.ndarray]:
        """The average, weighted by examples, in float64."""
        return {name: (high + self._low[name]) / self.examples for name, high in self._high.items()}

    def _take(self, name: str, x: np.ndarray, low: np.ndarray | float) -> None:
        """Adds x + low, into the memory of x and of the sum so far: new pages would cost more than the additions."""
        if name not in self._high:
            self._high[name], self._low[name] = np.zeros(x.shape), np.zeros(x.shape)
        high, lows = self._high[name], self._low[name]
        total = high + x
        part = total - high
        x -= part  # what the total has lost of x,
        high -= np.subtract(total, part, out=part)  # and of what there was
        lows += np.add(high, x, out=x)
        lows += low
        self._high[name] = total


def added(replies: list[Message]) -> list[Message]:
    """Replies to training, with one sum in the place of what each of them holds: the first has it, the others an empty one.

    A reply with an error, or with numbers that are not finite, stays what it is, for the server to name; so do all of them
    where there are too few for a sum to be any smaller.
    """
    total, taken = Sum(), list[Message]()
    for reply in replies if len(replies) > FEW else ():
        arrays = messages.arrays_of(reply.content.array_records[messages.ARRAYS]) if reply.has_content() else {}
        if arrays and all(np.isfinite(array).all() for array in arrays.values()):
            total.add(arrays, int(reply.content.metric_records[messages.METRICS][messages.EXAMPLES]))  # type: ignore[arg-type]
            taken.append(reply)
    for place, reply in enumerate(taken):
        del reply.content[messages.ARRAYS]
        reply.content[messages.SUM] = ArrayRecord() if place else total.record()
    return replies
