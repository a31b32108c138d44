"""Replies of clients: whose each one is, what it holds, and why one is not taken. Everything in them is untrusted."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fedlora import untrusted
from fedlora.arrays import messages
from fedlora.arrays.compression import Shapes
from fedlora.untrusted import Malformed

OUR_ERROR = re.compile(r"^(fedlora\.check\.)?(ConfigError|RunError): ")  # as a traceback ends
MOST_EXAMPLES = 10**9  # that a client may claim in a reply
MOST_METRICS, LONGEST_NAME, LARGEST = 100, 64, 1e30  # of the numbers that a client measures


def authored(replies: Iterable[Message], sent: Sequence[Message]) -> Iterator[tuple[int, Message]]:
    """(node that was asked, its reply) for the first reply to each message of `sent`, as they come; others are left out.

    The message that a reply answers says whose it is. Where a node was killed the SuperLink answers for it, so the source of
    a reply counts only on grids that give messages no ids.
    """
    waiting = {message.metadata.dst_node_id for message in sent}
    by_message = None
    for reply in replies:
        if by_message is None:  # a grid gives messages their ids when they leave, which may be as late as now
            ids = ((message.metadata.message_id, message.metadata.dst_node_id) for message in sent)
            by_message = {number: node for number, node in ids if number}
        answers = reply.metadata
        node = by_message.get(answers.reply_to_message_id) if by_message else answers.src_node_id
        if node in waiting:
            waiting.remove(node)
            yield node, reply


def error_of(reply: Message) -> str:
    """The last line of what a failed client says; of our own errors the sentence, without the class in front of it.

    Of a client that went away Flower writes its own message at length; here that is said in words.
    """
    if reply.error.code == ErrorCode.NODE_UNAVAILABLE:
        return "its device went away before it answered"
    said = str(reply.error.reason or "")[-4096:].strip()
    return OUR_ERROR.sub("", said.splitlines()[-1]) if said else "error"


def client_of(content: RecordDict) -> int | None:
    """The client that the content says it is from, if it says so; raises Malformed for what is no number of a client."""
    said = messages.first(content, MetricRecord)
    if said is None or messages.CLIENT not in said:
        return None
    try:
        return untrusted.count(said[messages.CLIENT], 0, 2**31)
    except Malformed as error:
        raise Malformed(f"it says that it is client {error}") from error


def examples_of(metrics: MetricRecord, key: str, most: int, least: int = 1) -> int:
    """The number of examples that a client claims under `key`; raises Malformed, naming the key, outside `least` to `most`."""
    try:
        return untrusted.count(metrics[key], least, most)
    except Malformed as error:
        raise Malformed(f"{key} is {error}") from error


def weight_of(metrics: MetricRecord, key: str, most: int) -> float:
    """What a client weighs: its examples, or under another key any number above 0; raises Malformed, naming the key."""
    if key == messages.EXAMPLES:
        return examples_of(metrics, key, most)
    try:
        weight = untrusted.number(metrics[key], 0, most)
    except Malformed as error:
        raise Malformed(f"{key} is {error}") from error
    if not weight:
        raise Malformed(f"{key} is 0, and a weight is above 0")
    return int(weight) if weight.is_integer() else weight


def metrics_of(metrics: MetricRecord) -> dict[str, float]:
    """What a client measured, by name, in the client's order: at most `MOST_METRICS` numbers of magnitude `LARGEST` at most.

    Left out are lists, numbers that are not finite or too large, and names that are long or hold what cannot be printed.
    """
    return {
        name: float(value)
        for name, value in itertools.islice(metrics.items(), MOST_METRICS)
        if isinstance(value, int | float) and abs(value) <= LARGEST and len(name) <= LONGEST_NAME and name.isprintable()
    }


def accuracy_of(content: RecordDict, key: str) -> float | None:
    """The accuracy of a client that tested, where it has examples to test on; None where it has none, or measures others.

    Raises Malformed for an accuracy outside [0, 1], and for examples that cannot be counted.
    """
    found = (record for record in content.values() if isinstance(record, MetricRecord))
    metrics = next((record for record in found if "accuracy" in record and key in record), None)
    if metrics is None or not examples_of(metrics, key, MOST_EXAMPLES, least=0):
        return None
    try:
        return untrusted.number(metrics["accuracy"], 0.0, 1.0)
    except Malformed as error:
        raise Malformed(f"its accuracy is {error}") from error


def read_answer(content: RecordDict, action: str, shapes: Shapes, most_bytes: int, dtype: np.dtype) -> dict[str, np.ndarray]:
    """The arrays of an answer to a message of type train.`action`, those of `shapes` of these shapes and finite, as `dtype`.

    Raises Malformed, naming the array, where they are not. One client's choice of a type would be everybody's, and none fits.
    """
    record = messages.first(content, ArrayRecord)
    if record is None:
        raise Malformed(f"its answer to {action} holds no arrays")
    arrays = messages.arrays_of(record, most_bytes)
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape == shape:
            with np.errstate(over="ignore"):
                arrays[name] = arrays[name].astype(dtype, copy=False)
            if np.isfinite(arrays[name]).all():
                continue
        raise Malformed(f"{name} in its answer to {action} is missing, not finite or of another shape")
    return arrays
