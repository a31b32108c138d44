"""Messages to a device, damaged: nothing but answers and fixed sentences, whatever a server sends.

What a ClientApp does with an admitted training is left out, so that the numbers are of what stands before it. Sketches and
secure sums are answered, of arrays as they would have been trained.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from clients.asked import SECURE
from clients.start import BEGUN, TRAINED
from fedlora.app import experiment
from fedlora.arrays import messages
from fedlora.arrays.sketch import COLUMNS
from fedlora.compute import workbench
from fedlora.config import Config, DatasetConfig, from_dict
from fedlora.deploy import preview
from fedlora.deploy.account import Account
from fedlora.deploy.device import Device
from fedlora.deploy.holdings import Holdings
from fedlora.deploy.limits import Limits
from fedlora.deploy.reasons import Reason
from fedlora.deploy.sums import SecureSums
from fedlora.secure import ACTIONS, Identity, Participant, Terms, crypto
from fedlora.validate import checked
from tests.conftest import write_digits
from tests.fuzz import damage, mutate

SAID = (True, -1, 0, 1, 2, 2**62, 0.5, 1e308, math.inf, math.nan, "", "x", "AB", "int8", b"", b"x" * 99, [], [1.5], [1.5, 1.5])
TYPES = ("train", "evaluate", "query", "train.sketch", "train.project", *(f"train.{action}" for action in ACTIONS),
    "train.default", "evaluate.x", "query.x", "train.train")  # fmt: skip
EACH = 100  # messages of a case: a ledger of very many different σ takes long to add up
KINDS = ("ValueError", "RunError", "ConfigError", "Malformed", "RuntimeError")  # of failures of further messages that are meant
LIMITS = replace(Limits(1e9, 0.9, 1e9, 10**6), seconds=60.0)
OPEN = replace(LIMITS, epsilon=math.inf)
PRIVATE: dict[str, Any] = {"privacy": {"name": "record", "noise_multiplier": 9.0}}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "private": PRIVATE,
    "tested": {"evaluate": {"holdout": 0.2}},
    "encoded": PRIVATE | {"compression": {"down": "int8", "up": "top_k"}, "strategy": {"name": "ffa_lora"}},
    "corrected": {"strategy": {"name": "fedex_lora"}, "compression": {"down": "int4"}},
    "sketched": PRIVATE | {"strategy": {"name": "fedask", "factors": "B"}},
    "summed": PRIVATE | {"strategy": {"name": "ffa_lora"}, "aggregation": "secure"},
}


class Server:
    """The messages of one experiment that a device would answer."""

    def __init__(self, config: Config) -> None:
        from tests.test_device import sent

        self.config, self.parts = config, dict[str, dict[str, np.ndarray]]()
        self._bytes = lru_cache(lambda kind: messages.to_bytes(sent(config, kind).content))
        bench = workbench.build(config)
        self.strategy = experiment.make_strategy(config)
        self.state = experiment.initial_state(bench, self.strategy)

    def sent(self, kind: str = "train") -> Message:
        """One of a kind, as it comes off the wire."""
        return Message(messages.from_bytes(self._bytes(kind)), 1, kind)

    def message(self, rng: random.Random) -> Message:
        """One of them."""
        if self.config.evaluate.holdout and rng.random() < 0.5:
            return self.sent("evaluate")
        asks = self._asks()
        if not asks or rng.random() < 0.3:
            return self.sent()
        action = rng.choice(list(asks))
        message = self.sent(f"train.{action}")
        message.content[messages.ARRAYS] = messages.record(asks[action])
        return message

    def _asks(self) -> dict[str, dict[str, np.ndarray]]:
        if self.strategy.two_phase:
            _, down = self.strategy.sent_further(self.state)
            columns = down.pop(COLUMNS)
            return {"sketch": {COLUMNS: columns}, "project": down}
        if not self.strategy.silent:
            return {}
        return self._sum

    @cached_property
    def _sum(self) -> dict[str, dict[str, np.ndarray]]:
        """What client 0 of three is sent in a secure sum; what it keeps before it answers goes into `parts`."""
        members, clients = [Participant.join(client) for client in range(3)], np.arange(3)
        challenge = np.frombuffer(crypto.public_key(bytes(range(16))), np.uint8)
        terms = {"terms": Terms(2, 8.0, 100).to_array(), "challenge": challenge}
        keys = np.stack([member.advertise(terms)["keys"] for member in members])
        self.parts["share"] = members[0].state
        dealt = [member.share({"clients": clients, "keys": keys}) for member in members]
        self.parts["mask"] = members[0].state
        mine = {"clients": clients} | {name: np.stack([of[name][0] for of in dealt]) for name in ("shares", "digests")}
        members[0].mask(mine, np.zeros(9), 1)
        self.parts["unmask"] = members[0].state
        share = {"clients": clients, "keys": keys, "signatures": np.zeros((3, 96), np.uint8)}
        return {"advertise": terms, "share": share, "mask": mine, "unmask": {"alive": clients, "dropped": np.arange(0)}}

    def keeps(self, state: RecordDict, kind: str) -> RecordDict:
        """A client's own state as it is when a message of that kind comes."""
        part = self.parts.get(kind.removeprefix("train."))
        return RecordDict(dict(state) | ({} if part is None else {SECURE: messages.record(part)}))

    def trained(self) -> RecordDict:
        """What a client of the strategy keeps."""
        arrays = messages.named(self.state.adapters, self.state.dense)
        if self.strategy.silent:
            sends = self.strategy.sent_up(self.state, 1)
            arrays = sends | {messages.EXAMPLES: np.array([20]), BEGUN: np.zeros(32, np.uint8)}
        return RecordDict({TRAINED: messages.record(arrays)})


def without_work(kept: RecordDict, message: Message, context: Context) -> Message:
    """In the place of what a ClientApp does."""
    context.state = RecordDict(dict(kept))
    records = {messages.ARRAYS: ArrayRecord(), messages.METRICS: MetricRecord({messages.CLIENT: 0, messages.EXAMPLES: 1})}
    return Message(RecordDict(records), reply_to=message)


def damaged(content: RecordDict, rng: random.Random) -> RecordDict | None:
    """The content once damaged, as Flower gives it to a device; None where it gives nothing."""
    how = rng.choice(("bytes", "bytes", "experiment", "experiment", "experiment", "job", "job", "array", "array", "any"))
    job = content[messages.CONFIG]
    assert isinstance(job, ConfigRecord)
    try:
        if how == "bytes":
            return messages.from_bytes(damage.damaged(messages.to_bytes(content), rng))
        if how == "experiment":
            job[messages.EXPERIMENT] = damage.damaged(str(job[messages.EXPERIMENT]).encode(), rng).decode("utf-8", "replace")
        elif how == "job":
            _job(job, rng)
        elif how == "array":
            content[messages.ARRAYS] = _arrays(content[messages.ARRAYS], rng)
        else:
            content = mutate.reply(content, np.random.default_rng(rng.getrandbits(32)))
        return messages.from_bytes(messages.to_bytes(content))
    except Exception:  # of Flower's reader, or of its writer where a server could not have sent it
        return None


def _job(job: ConfigRecord, rng: random.Random) -> None:
    name = rng.choice([*job, "else"])
    if rng.random() < 0.2 and name in job:
        del job[name]
    else:
        job[name] = rng.choice(SAID)


def _arrays(record: Any, rng: random.Random) -> ArrayRecord:
    arrays = dict(record)
    name = rng.choice(list(arrays))
    array = arrays.pop(name)
    if rng.random() < 0.3:
        name = rng.choice((name + "x", name + "|int8", name + "|top_k", "|", "", name[:-1], name.replace("lora_B", "base_A")))
    data = damage.damaged(array.data, rng) if rng.random() < 0.7 else array.data
    stype = rng.choice(("numpy.ndarray", "numpy.ndarray", "numpy.ndarray", "torch.tensor", ""))
    return ArrayRecord(arrays | {name: Array("float32", rng.choice((array.shape, (), (2**40,))), stype, data)})


class Fuzz:
    """Devices with empty books, and what they are sent."""

    def __init__(self, folder: Path, own: Holdings, servers: list[Server]) -> None:
        self.folder, self.own, self.servers, self.cases = folder, own, servers, 0
        key = generate_private_key(SECP384R1())
        self.identity = Identity(0, key, {0: key.public_key()})

    def case(self, seed: int) -> Counter[str]:
        """How often each answer came to the messages of one server. Raises AssertionError for a failure that is not meant."""
        rng, came = random.Random(seed), Counter[str]()
        server, self.cases = rng.choice(self.servers), self.cases + 1
        said: list[str] = []
        limits = LIMITS if server.config.privacy.name == "record" and rng.random() < 0.9 else OPEN
        account = Account(self.folder / str(self.cases), limits, said.append)
        device = Device(self.own, account, said.append, SecureSums(self.identity, account.folder))
        with contextlib.closing(account), patch("clients.app.train", partial(without_work, server.trained())):
            for _ in range(EACH):
                if account.in_force is None or rng.random() < 0.1:
                    device(server.sent(), place())
                device._answered.clear()
                message, kept = server.message(rng), device._state
                device._state = server.keeps(kept, message.metadata.message_type)
                came[answer(device, message, rng, said)] += 1
                device._state = kept
        return came


def answer(device: Device, message: Message, rng: random.Random, said: list[str]) -> str:
    """What a device makes of the message once damaged."""
    kind = rng.choice(TYPES) if rng.random() < 0.15 else message.metadata.message_type
    content = damaged(message.content, rng)
    if content is None:
        return "no message"
    before = len(device.account.rows)
    reply = device(Message(content, 1, kind), place())
    if not reply.has_error():
        return "answered"
    reason = Reason(reply.error.reason)
    line = said[-1].removeprefix("not done (failed): ")
    assert line.isprintable() and len(line) <= 600
    if reason is Reason.FAILED:
        further = kind.startswith("train.") and line.startswith(KINDS)
        assert further or len(device.account.rows) > before, (kind, line)
    return reason.name.lower().replace("_", " ")


def place() -> Context:
    return Context(1, 1, {}, RecordDict(), {})


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Callable[[int], Counter[str]]]:
    """The function from a seed to what came of its mutations."""
    write_digits(folder / "data", 1, each=20)
    data = DatasetConfig(name="files", path=str(folder / "data" / "device-0.jsonl"), image="image", test_fraction=0.0)
    with contextlib.redirect_stdout(None):
        own = preview.data(Holdings(0, 0, data, ("vit_digits", None), "cpu", 1.0))
    classes = [str(digit) for digit in range(10)]
    settings = {
        "clients": 3, "clients_per_round": 3, "rounds": 2, "deploy": "x", "device": "cpu", "train": {"steps": 2},
        "partition": {"name": "own", "sizes": [20, 20, 20]},
        "dataset": {"name": "files", "image": "image", "classes": classes},
    }  # fmt: skip
    servers = [Server(checked(from_dict(json.loads(json.dumps(settings | more))))) for more in EXPERIMENTS.values()]
    with patch("clients.app.evaluate", partial(without_work, RecordDict())):
        yield Fuzz(folder / "state", own, servers).case
