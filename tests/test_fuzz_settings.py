"""No setting is ignored, and no command line ends in a traceback or leaves anything behind when it is refused.

`python -m tests.fuzz settings` tries many more commands, `tables` data files, and `models` model folders.
"""

import contextlib
import dataclasses
import sys
from collections import Counter
from unittest.mock import patch

import pytest

from fedlora import cli
from fedlora.check import ConfigError
from fedlora.config import GROUPS, Config, settings
from tests.conftest import ROOT
from tests.fuzz import checkpoints, commands, tables
from tests.fuzz import settings as fuzz
from tests.fuzz.searched import searched

CONFIGS = ROOT / "configs"
FILES = ["model=hf", "model.path=m", "dataset=files", "dataset.path=t.csv", "dataset.text=text"]
HUB = ["model=hf", "model.path=m", "dataset=hub", "dataset.path=d", "dataset.text=text"]
RECORD, USER = ["privacy=record", "privacy.noise_multiplier=1"], ["privacy=user", "privacy.epsilon=8"]
EDGE = ["deploy=local", "model=hf", "model.path=m", "dataset=files", "dataset.text=text", "dataset.classes=[a,b]"]
FEDAVG = ["strategy=fedavg"]

# Settings that a run of nothing but defaults does not read, or reads to no end: a value, and what reads it.
ONLY_WITH = {
    "model.path": ("m", FILES[:1]),
    "model.max_length": ("64", FILES),
    "model.dropout": ("true", FILES[:2]),
    "dataset.path": ("t.csv", [*FILES[:3], FILES[4]]),
    "dataset.test": ("t.csv", FILES),
    "dataset.columns": ("[text,label]", FILES),
    "dataset.classes": ("[no,yes]", FILES),
    "dataset.text": ("text", FILES[:4]),
    "dataset.image": ("file", FILES[:4]),
    "dataset.label": ("class", FILES),
    "dataset.group": ("author", [*FILES, "partition=natural"]),
    "dataset.subset": ("small", HUB),
    "dataset.train_split": ("validation", HUB),
    "partition.shards_per_client": ("3", ["partition=shards"]),
    "partition.sizes": ("[3,4]", EDGE),
    "min_online": ("2", EDGE),
    "patience": ("5", EDGE),
    "server.trim": ("0.2", ["server.mean=trimmed", *FEDAVG]),
    "server.norm_factor": ("2", ["server.mean=norm_filter", *FEDAVG]),
    "server.lr": ("0.5", ["server.optimizer=momentum", *FEDAVG]),
    "server.momentum": ("0.5", ["server.optimizer=momentum", *FEDAVG]),
    "server.beta2": ("0.5", ["server.optimizer=adam", *FEDAVG]),
    "server.tau": ("0.5", ["server.optimizer=adam", *FEDAVG]),
    "server.secure_bound": ("2", ["aggregation=secure", "strategy=ffa_lora"]),
    "compression.top_k": ("0.5", ["compression.up=top_k"]),
    "privacy.epsilon": ("1", RECORD[:1]),
    "privacy.noise_multiplier": ("1", RECORD[:1]),
    "privacy.delta": ("1e-6", RECORD),
    "privacy.clip": ("0.5", RECORD),
    "privacy.participation": ("worst", ["privacy=record", "privacy.epsilon=1"]),
    "privacy.adjacency": ("replace", RECORD),
    "privacy.accountant": ("rdp", RECORD),
    "privacy.sampling": ("fixed", USER),
    "engine.address": ("auto", ["engine=ray"]),
    "engine.workers": ("2", ["engine=ray"]),
    "engine.gpus_per_worker": ("0.5", ["engine=ray"]),
    "engine.retries": ("3", ["engine=ray"]),
    "engine.share": ("2", ["engine=ray"]),
}
# What is chosen, and a setting that then has no effect.
NOT_WITH = [
    (["partition=iid"], "partition.alpha=0.1"),
    (["partition=shards"], "partition.alpha=0.1"),
    (["partition=domains", "dataset.domains=[plain,blur]"], "partition.alpha=0.1"),
    (["clients_per_round=3"], "fraction=0.5"),
    (["train.epochs=1"], "train.steps=5"),
    (["checkpoint.every=0"], "checkpoint.keep=3"),
    (["server.mean=median", *FEDAVG], "server.trim=0.2"),
    (["server.mean=trimmed", *FEDAVG], "server.norm_factor=2"),
    (["server.optimizer=momentum", *FEDAVG], "server.beta2=0.5"),
    (["server.optimizer=momentum", *FEDAVG], "server.tau=0.5"),
    (["compression.up=int8"], "compression.top_k=0.5"),
    (RECORD, "privacy.sampling=fixed"),
    (RECORD, "privacy.participation=worst"),
    (USER, "privacy.participation=worst"),
    (USER, "privacy.accountant=rdp"),
    ([*FILES, "dataset.test=t.csv"], "dataset.test_fraction=0.3"),
    (FILES, "dataset.subset=x"),
    (FILES, "dataset.train_split=x"),
    (FILES, "dataset.group=author"),
    (HUB, "dataset.columns=[a,b]"),
    (["engine=flower"], "engine.share=2"),
    (["engine=flower"], "engine.retries=3"),
    (["engine=flower"], "engine.cohort=2"),
]
RUNS = [  # settings that are read where they should be
    ["server.mean=trimmed", "server.optimizer=adam", "compression.up=top_k", "partition=shards", *FEDAVG],
    ["server.mean=norm_filter", "strategy=ffa_lora"],
    ["aggregation=secure", "strategy=ffa_lora"],
    RECORD,
    [*USER, "clients=6"],
]


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
        patches.enter_context(patch.object(Config, "checked", aside(Config.checked)))
        yield read


def read_by(arguments: list[str]) -> set[str]:
    """The settings that a small run with these settings reads."""
    with reads() as read, patch("fedlora.experiment.report.draw", lambda *_: None, create=True):
        status, out, err = commands.run([*fuzz.SMALL, *arguments])
    assert status == 0, out + err
    return read


def composed(*arguments: str) -> Config:
    return cli.compose(CONFIGS, cli.expand(list(arguments), False)[0])


def test_a_plain_run_reads_every_setting_that_needs_no_other(tmp_path) -> None:
    """A new setting that it does not read belongs into ONLY_WITH, so that it is refused where nothing reads it."""
    with commands.standing_in(tmp_path):
        read = read_by([])
    assert {name for name, *_ in settings()} - {"strategy"} <= read | ONLY_WITH.keys()


def test_settings_are_read_with_what_reads_them(tmp_path) -> None:
    with commands.standing_in(tmp_path):
        read = {name for arguments in RUNS for name in read_by(arguments)}
    wanted = {name for name in ONLY_WITH if name.startswith(("server.", "compression.", "privacy.", "partition.shards"))}
    assert wanted <= read


@pytest.mark.parametrize("setting", ONLY_WITH)
def test_a_setting_that_nothing_reads_is_refused_or_chooses_what_reads_it(setting) -> None:
    value, needed = ONLY_WITH[setting]
    inline = [] if setting.startswith("engine.") else ["engine=ray"]
    assert composed(*needed, f"{setting}={value}") != composed(*needed)
    try:
        chosen = composed(*(["engine=inline"] if setting.startswith("engine.") else inline), f"{setting}={value}")
    except ConfigError as error:
        assert setting in str(error), error
    else:
        assert chosen.dataset.name != "digits" or chosen.model.name != "vit_digits", f"{setting}={value} is ignored"


@pytest.mark.parametrize(("chosen", "unread"), NOT_WITH, ids=lambda value: value if isinstance(value, str) else ",".join(value))
def test_a_setting_that_what_was_chosen_does_not_read_is_refused(chosen, unread) -> None:
    composed(*chosen)
    with pytest.raises(ConfigError, match=unread.partition("=")[0].replace(".", r"\.")):
        composed(*chosen, unread)


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
    assert came["refused"] > 20 and came["read"] > 20


def test_damaged_model_folders_are_read_or_refused_in_a_sentence(tmp_path) -> None:
    with checkpoints.part(tmp_path) as case:
        came = counted(case, 25)
    assert any(kind.startswith("refused") for kind in came) and any(kind.startswith("done") for kind in came)
