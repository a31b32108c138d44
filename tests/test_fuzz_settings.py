"""No setting is ignored, and no command line ends in a traceback or leaves anything behind when it is refused.

`python -m tests.fuzz settings` tries many more commands, `tables` data files, and `models` model folders.
"""

import contextlib
import dataclasses
import sys
from collections import Counter
from unittest.mock import patch

import pytest

import clients.cost
from fedlora import validate
from fedlora.app.reads import unread
from fedlora.compute import workbench
from fedlora.config import GROUPS, Config, declared
from fedlora.data import resident
from fedlora.tools import cli
from tests import tiny
from tests.conftest import ROOT
from tests.fuzz import checkpoints, commands, tables
from tests.fuzz import settings as fuzz
from tests.fuzz.searched import searched

FILES = ["model=hf", "model.path=model", "dataset=files", "dataset.path=t.csv", "dataset.text=text"]
RUNS = {  # that read, together, what a plain run does not; other engines and real devices have tests of their own
    "plain": [],
    "files": [*FILES, "dataset.group=label", "partition=natural", "clients=2"],
    "robust": ["server.mean=trimmed", "server.optimizer=adam", "compression.up=top_k", "partition=shards", "strategy=fedavg"],
    "filter": ["server.mean=norm_filter", "strategy=ffa_lora"],
    "secure": ["aggregation=secure", "strategy=ffa_lora"],
    "record": ["privacy=record", "privacy.epsilon=8"],
    "user": ["privacy=user", "privacy.epsilon=8", "clients=6"],
}


@contextlib.contextmanager
def reads():
    """Names of the settings that are read meanwhile to do something: not to check, copy or write down the settings."""
    read: set[str] = set()
    checking = 0

    def aside(function):
        def wrapped(*arguments, **keywords):
            nonlocal checking
            checking += 1
            try:
                return function(*arguments, **keywords)
            finally:
                checking -= 1

        return wrapped

    def watched(of: type, prefix: str):
        names = {field.name for field in dataclasses.fields(of)}

        def get(self, name):
            if name in names and not checking:
                reader = sys._getframe(1).f_globals.get("__name__", "")
                if reader.startswith(("fedlora.", "clients.", "strategies.")) and reader != "fedlora.identity":
                    read.add(prefix + name)
            return object.__getattribute__(self, name)

        return patch.object(of, "__getattribute__", get)

    with contextlib.ExitStack() as patches:
        for of, prefix in [(Config, ""), *((of, f"{group}.") for group, of in GROUPS.items())]:
            patches.enter_context(watched(of, prefix))
        patches.enter_context(patch.object(cli, "compose", aside(cli.compose)))
        patches.enter_context(patch.object(validate, "checked", aside(validate.checked)))
        yield read


def read_by(arguments: list[str]) -> set[str]:
    """The settings that a small run with these settings reads for something."""
    for module in (clients.cost, resident, workbench):  # what this process has read before
        for function in vars(module).values():
            getattr(function, "cache_clear", int)()
    with reads() as read, patch("fedlora.app.experiment.report.draw", lambda *_: None, create=True):
        status, out, err = commands.run([*fuzz.SMALL, *arguments])
    assert status == 0, out + err
    return read


@pytest.mark.parametrize("name", RUNS)
def test_a_run_reads_every_setting_that_it_is_said_to_read(name, tmp_path) -> None:
    """What it is not said to read is refused (tests/test_settings.py), so that nothing that is typed is ignored."""
    with commands.standing_in(tmp_path) as here:
        (here / "t.csv").write_text("text,label\n" + "a good film,yes\na bad film,no\n" * 8)
        (here / "model").mkdir()
        tiny.bert(here / "model", ["no", "yes"])
        read = read_by(RUNS[name])
        config = cli.compose(ROOT / "configs", [*fuzz.SMALL, *RUNS[name]])
    ignored = declared().keys() - unread(config).keys() - read - {"strategy"}
    assert not ignored


def counted(case, seeds: int) -> Counter[str]:
    return sum((case(seed) for seed in range(seeds)), Counter())


def test_command_lines_of_any_settings_end_in_a_sentence(tmp_path) -> None:
    with fuzz.place(tmp_path) as command:
        came = counted(searched(fuzz.PLANS, command), 2)
    assert came["refused"] > 20 and came["done"] > 2


def test_small_runs_of_any_settings_end_in_a_sentence(tmp_path) -> None:
    with fuzz.place(tmp_path) as command:
        came = counted(searched(fuzz.RUNS, command, each=8), 1)
    assert came["done"]


def test_odd_data_files_are_read_or_refused_in_a_sentence(tmp_path) -> None:
    with tables.part(tmp_path) as case:
        came = counted(case, 4)
    assert came["refused"] > 20 and came["read"] > 5


def test_damaged_model_folders_are_read_or_refused_in_a_sentence(tmp_path) -> None:
    with checkpoints.part(tmp_path) as case:
        came = counted(case, 25)
    assert any(kind.startswith("refused") for kind in came) and any(kind.startswith("done") for kind in came)
