"""Messages to a device, damaged at random: nothing but answers and fixed sentences, whatever a server sends.

    python -m tests.fuzz_device 100000 [seed]

What a ClientApp does with an admitted message is left out, so that the numbers are of what stands before it.
"""

from __future__ import annotations

import json
import logging
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from clients import app
from fedlora import messages
from fedlora.deploy.account import Account
from fedlora.deploy.device import Device
from fedlora.deploy.holdings import Holdings
from fedlora.deploy.limits import Limits
from fedlora.deploy.reasons import Reason

STRANGE = (
    None, True, False, -1, 0, 1, 2, 0.5, 10**30, 10**400, 1e308, math.inf, math.nan, "", "x", "record", "AB", "9" * 5000,
    [], {}, [1], {"a": 1}, [[]],
)  # fmt: skip
SAID = (True, -1, 0, 1, 2, 2**62, 0.5, 1e308, math.inf, math.nan, "", "x", "AB", "int8", b"", b"x" * 99, [], [1.5], [1.5, 1.5])
TYPES = ("train", "evaluate", "query", "train.sketch", "train.project", "train.advertise", "train.share", "train.mask",
    "train.unmask", "train.default", "evaluate.x", "query.x", "train.train")  # fmt: skip


class Fuzz:
    """A device, and damaged copies of a message that it would answer."""

    def __init__(self, folder: Path, own: Holdings, message: Message, seed: int) -> None:
        self.folder, self.own, self.rng, self.content = folder, own, random.Random(seed), message.content
        self.said: list[str] = []

    def _start(self, number: int) -> None:
        """A device with empty books: a ledger of very many different σ takes long to add up."""
        limits = replace(Limits(1e9, 0.9, 1e9, 10**6), seconds=60.0)
        self.account = Account(self.folder / str(number), limits, lambda line: None)
        self.device = Device(self.own, self.account, self.said.append)

    def run(self, count: int) -> Counter[str]:
        """How often each answer came. Raises AssertionError where a message failed before it was admitted."""
        answers: Counter[str] = Counter()
        for number in range(count):
            if number % 500 == 0:
                self._start(number)
            content, kind = self._damaged()
            if content is None:
                answers["no message"] += 1
                continue
            before = len(self.account.rows)
            reply = self.device(Message(content, 1, kind), Context(1, 1, {}, RecordDict(), {}))
            reason = Reason(reply.error.reason) if reply.has_error() else None
            assert reason is not Reason.FAILED or len(self.account.rows) > before, (kind, self.said[-1])
            answers["answered" if reason is None else reason.name] += 1
        return answers

    def _damaged(self) -> tuple[RecordDict | None, str]:
        rng = self.rng
        kind = rng.choice(TYPES) if rng.random() < 0.2 else "train"
        content = recorddict_from_proto(recorddict_to_proto(self.content))
        how = rng.choice(
            ("bytes", "bytes", "experiment", "experiment", "experiment", "job", "job", "array", "array", "records")
        )
        if how == "bytes":
            return _parsed(_flipped(recorddict_to_proto(content).SerializeToString(), rng)), kind
        job = content[messages.CONFIG]
        assert isinstance(job, ConfigRecord)
        if how == "experiment":
            job[messages.EXPERIMENT] = _text(str(job[messages.EXPERIMENT]), rng)
        elif how == "job":
            name = rng.choice([*job, "else"])
            if rng.random() < 0.2 and name in job:
                del job[name]
            else:
                job[name] = rng.choice(SAID)
        elif how == "array":
            content[messages.ARRAYS] = _arrays(content[messages.ARRAYS], rng)
        else:
            name = rng.choice([*content, "else"])
            if rng.random() < 0.5 and name in content:
                del content[name]
            else:
                content[name] = rng.choice((ArrayRecord(), ConfigRecord({"x": 1}), MetricRecord({"x": 1})))
        return content, kind


def _text(text: str, rng: random.Random) -> str:
    """JSON with one value replaced or removed, or the text itself with a part damaged."""
    if rng.random() < 0.2:
        return _flipped(text.encode(), rng).decode("utf-8", "replace")
    whole = json.loads(text)
    holder, key = rng.choice(list(_places(whole)))
    if rng.random() < 0.1:
        del holder[key]
    else:
        holder[key] = rng.choice(STRANGE)
    return json.dumps(whole)


def _arrays(record: Any, rng: random.Random) -> ArrayRecord:
    arrays = dict(record)
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    if rng.random() < 0.3:
        name = rng.choice((name + "x", name + "|int8", name + "|top_k", "|", "", name[:-1], name.replace("lora_B", "base_A")))
    data = _flipped(array.data, rng) if rng.random() < 0.7 else array.data
    stype = rng.choice(("numpy.ndarray", "numpy.ndarray", "numpy.ndarray", "torch.tensor", ""))
    return ArrayRecord(arrays | {name: Array("float32", rng.choice((array.shape, (), (2**40,))), stype, data)})


def _flipped(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    kind = rng.choice(("flip", "flip", "flip", "cut", "grow", "empty"))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    return {"cut": content[:place], "grow": content[:place] + rng.randbytes(9) + content[place:], "empty": b""}[kind]


def _parsed(content: bytes) -> RecordDict | None:
    """What Flower makes of bytes before a device is given them; None where it makes nothing."""
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(content))
    except Exception:
        return None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def without_work(message: Message, *_: object) -> Message:
    """In the place of what a ClientApp does."""
    records = {messages.ARRAYS: ArrayRecord(), messages.METRICS: MetricRecord({messages.CLIENT: 0, messages.EXAMPLES: 1})}
    return Message(RecordDict(records), reply_to=message)


def main(count: int, seed: int) -> None:
    """Prints how often each answer came."""
    from fedlora.config import DatasetConfig, from_dict
    from fedlora.deploy import preview
    from tests.conftest import write_digits
    from tests.test_device import DIGITS, sent

    logging.getLogger("flwr").setLevel(logging.ERROR)
    app.train = app.evaluate = without_work  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_digits(folder / "data", 1, each=20)
        data = DatasetConfig(name="files", path=str(folder / "data" / "device-0.jsonl"), image="image", test_fraction=0.0)
        own = preview.data(Holdings(0, 0, data, ("vit_digits", None), "cpu", 1.0))
        config = from_dict({
            "clients": 2, "clients_per_round": 2, "rounds": 2, "deploy": "x", "device": "cpu", "train": {"steps": 2},
            "partition": {"name": "own", "sizes": [20, 20]}, "privacy": {"name": "record", "noise_multiplier": 9.0},
            "dataset": {"name": "files", "image": "image", "classes": DIGITS},
        }).checked()  # fmt: skip
        for answer, times in Fuzz(folder / "state", own, sent(config), seed).run(count).most_common():
            print(f"{times:8,}  {answer.lower().replace('_', ' ')}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
