"""Files of a results folder and of a device's state folder, damaged: what they say is used as it is, or named in a sentence."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedlora.app import experiment, terminal
from fedlora.check import ConfigError, RunError
from fedlora.config import Config, from_dict
from fedlora.deploy.account import TRAIN, Account, Work
from fedlora.deploy.limits import Limits
from fedlora.deploy.memory import Memory
from fedlora.secure import Sets
from fedlora.validate import checked
from tests.fuzz import damage
from tests.test_checkpoint import broken_off

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "user": {"privacy": {"name": "user", "noise_multiplier": 1.0, "sampling": "fixed"}},
    "record": {"privacy": {"name": "record", "noise_multiplier": 1.0}},
}
LIMITS = Limits(epsilon=1e9, delta=1e-5, clip=1.0, steps=100)


class Folder:
    """A whole folder, a damaged copy of it, and whoever reads it."""

    def __init__(self, whole: Path, read: Callable[[Path], str]) -> None:
        self.whole, self.read, self.place = whole, read, whole
        self.whole = whole.rename(whole.with_name(f"{whole.name}.whole"))

    def case(self, rng: random.Random) -> str:
        """What comes of one damage: what `read` says, or the kind of its sentence."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.whole, self.place)
        damage.file(rng.choice(damage.files(self.place)), rng)
        try:
            return self.read(self.place)
        except (ConfigError, RunError) as error:
            assert str(error).isprintable() and len(str(error)) < 800, error
            return f"a {type(error).__name__}"


def run(config: Config) -> Callable[[Path], str]:
    """Reads a results folder as a run does that begins in it, up to its first round."""

    def read(place: Path) -> str:
        if summary := experiment.run(config, 0.0):
            terminal.conclude(config, summary)
        return "used as it is"

    return read


def device(place: Path) -> str:
    """Reads a state folder as a device does that starts, and is asked for a training, an evaluation and a sum."""
    said: list[str] = []
    with contextlib.closing(Account(place, LIMITS, said.append)) as account:
        assert account.spent >= 0
        account.after(1.0, 0.1, 3)
        sets, memory = Sets(place / "sums.jsonl"), Memory(place, said.append)
        sets.first("a", 3, "s")
        sets.note("a", 9, "t", [0, 1])
        memory.newest("an experiment", 9)
        account.admit(Work(TRAIN, "an experiment", 9), 9.0, 0.1, 3)
        memory.keep("an experiment", 9, kept(), 0)
    assert all(line.isprintable() for line in said)
    return "said in the log" if said else "used as it is"


def kept() -> RecordDict:
    """What a client may keep of a round."""
    import numpy as np
    from flwr.app import Array

    arrays = ArrayRecord({"x.lora_B.weight": Array(np.ones((4, 2), np.float32))})
    return RecordDict({"personal": arrays, "left": MetricRecord({"x": 1})})


def state(place: Path) -> Path:
    """A device's state folder with something in every file."""
    with contextlib.closing(Account(place, LIMITS, lambda line: None)) as account:
        memory, sets = Memory(place), Sets(place / "sums.jsonl")
        for round in range(1, 4):
            account.admit(Work(TRAIN, "an experiment", round, {"run": 7}), 1.0 + round, 0.1, 3)
            memory.keep("an experiment", round, kept(), 0)
            sets.note("a", round, f"s{round}", [0, 1, 2])
    return place


def result(config: Config, finished: bool) -> Path:
    """The results folder of a run that has finished, or was broken off after its second round."""
    if not finished:
        with pytest.MonkeyPatch.context() as patched:
            return broken_off(config, patched, 2)
    experiment.run(config, 0.0)
    return Path(config.results) / str(config.name)


def configured(folder: Path, name: str, **more: Any) -> Config:
    """The smallest experiment."""
    return checked(from_dict({
        "name": name, "results": str(folder), "clients": 4, "clients_per_round": 2, "rounds": 3, "device": "cpu",
        "train": {"steps": 1}, "evaluate": {"every": 3}, "engine": {"name": "inline", "cohort": "1"}, **more,
    }))  # fmt: skip


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Callable[[int], Counter[str]]]:
    """The function from a seed to what came of its mutation."""
    folders = {"device": Folder(state(folder / "state"), device)}
    with patch("fedlora.app.experiment.report.tested", lambda rows: False), \
         patch("fedlora.app.terminal.say", lambda line: None), \
         patch("fedlora.app.terminal.console.quiet", True):  # fmt: skip
        for name, more in RUNS.items():
            for finished in (False, True):
                config = configured(folder, f"{name}-{finished}", **more)
                folders[config.name] = Folder(result(config, finished), run(config))
        weights = [8 if name == "device" else 4 if name.endswith("True") else 1 for name in folders]

        def case(seed: int) -> Counter[str]:
            rng = random.Random(seed)
            (name,) = rng.choices(list(folders), weights)
            return Counter({f"{folders[name].case(rng)} ({name.partition('-')[0]})": 1})

        with patch("fedlora.app.experiment.Course.drive", lambda self, grid: None), \
             patch("fedlora.app.experiment.conclude", lambda *_: {}), \
             patch("fedlora.app.records.environment", dict):  # fmt: skip
            yield case
