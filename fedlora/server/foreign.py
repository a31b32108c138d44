"""Clients that are not fedlora's: they load PEFT's arrays, train, and send PEFT's arrays back. Which strategies that suits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from flwr.app import MetricRecord, RecordDict

from fedlora.arrays import messages
from fedlora.arrays.messages import ServerState
from fedlora.check import ConfigError
from fedlora.server.replies import LARGEST, LONGEST_NAME, MOST_EXAMPLES, MOST_METRICS, weight_of
from fedlora.server.wire import Wire
from fedlora.untrusted import Malformed

Value = float | list[float]


def needs(strategy: Wire) -> str:
    """What clients must do for a strategy beyond loading, training and sending PEFT's arrays; nothing for most.

    Such a client would not fail. It would go on from another model than the server's, without a word.
    """
    if "R" in strategy.trains:
        return "train R, the array <layer>.lora_R.weight between the factors"
    if strategy.corrects:
        return "add scale · base_B · base_A, the arrays <layer>.base_A.weight and base_B.weight, to the frozen weights"
    if strategy.two_phase:
        return "keep the factors that they trained and answer further messages of the round"
    if strategy.personal:
        return f"keep their own lora_{strategy.personal} and head from round to round"
    if strategy.silent:
        return "answer the further messages of a secure sum"
    if strategy.encodes[:2] != ("none", "none"):
        return "send what they changed, encoded as the message says"
    return ""


def ensure_suits(strategy: Wire, state: ServerState) -> None:
    """Raises ConfigError, in one sentence, for initial arrays and clients that the strategy cannot work with."""
    for layer, (A, B) in state.adapters.items():
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            shapes = f"lora_A of shape {A.shape} and lora_B of shape {B.shape}"
            raise ConfigError(f"initial arrays: {layer} has {shapes}; strategies are for linear layers, (r, n) and (m, r)")
    if "R" in strategy.trains and (lacking := [x for x in state.adapters if messages.rotation(x) not in state.dense]):
        raise ConfigError(
            f"strategy={strategy.name} trains {messages.rotation(lacking[0])}, which the initial arrays lack; it needs "
            "fedlora's own clients (python run.py)"
        )
    if strategy.derive or strategy.beyond_peft:
        return
    if asked := needs(strategy):
        raise ConfigError(
            f"strategy={strategy.name} asks more of clients than PEFT's arrays: they must {asked}; use fedlora's own clients "
            "(python run.py), or pass beyond_peft=True if yours do this"
        )
    if strategy.init != "kaiming":
        raise ConfigError(
            f"init={strategy.init} is for python run.py; in your own ServerApp A is in the initial arrays: leave it out"
        )


def mean_metrics(contents: Sequence[RecordDict], weight_key: str) -> MetricRecord:
    """What clients measured, by its own name: means weighted by `weight_key`, over those that say it; lists entry by entry.

    Flower's own function wants the same names of all, and one client that says another would end the run. Left out: the
    weight, a client's number, numbers that are not finite, lists of unequal lengths.
    """
    totals: dict[str, tuple[float, list[float] | float]] = {}
    unequal = set[str]()
    for content in contents:
        record = next((r for r in content.values() if isinstance(r, MetricRecord) and weight_key in r), None)
        try:
            weight = weight_of(record, weight_key, MOST_EXAMPLES) if record is not None else 0
        except Malformed:  # it tested on no examples, say
            continue
        for name, value in _measured(record, weight_key) if record is not None else ():
            before, total = totals.get(name, (0.0, [0.0] * len(value) if isinstance(value, list) else 0.0))
            if isinstance(value, list) and isinstance(total, list) and len(value) == len(total):
                totals[name] = before + weight, [t + weight * v for t, v in zip(total, value, strict=True)]
            elif isinstance(value, list) or isinstance(total, list):
                unequal.add(name)
            else:
                totals[name] = before + weight, total + weight * value
    means: dict[str, Any] = {
        name: [t / weight for t in total] if isinstance(total, list) else total / weight
        for name, (weight, total) in totals.items()
        if name not in unequal
    }
    return MetricRecord(means)


def no_metrics(contents: Sequence[RecordDict], weight_key: str) -> MetricRecord:
    """Nothing, for fedlora's own runs: what they measure is in the round's report."""
    return MetricRecord()


def _measured(record: MetricRecord, weight_key: str) -> Iterator[tuple[str, Value]]:
    for name, value in itertools.islice(record.items(), MOST_METRICS):
        numbers = value if isinstance(value, list) else [value]
        usable = len(name) <= LONGEST_NAME and name.isprintable() and name not in (weight_key, messages.CLIENT)
        if usable and numbers and all(abs(number) <= LARGEST for number in numbers):  # which is false of NaN
            yield name, list(value) if isinstance(value, list) else value
