"""Settings shared by the tests: small experiments, and the command line in a process of its own."""

import dataclasses
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.config import Config, from_dict
from fedlora.validate import checked

ROOT = Path(__file__).parent.parent


# Files that mostly wait, for other processes or for Flower, so that three test processes keep two cores busy.
FIRST = ("test_edge.py", "test_checkpoint.py", "test_cluster.py", "test_engines.py", "test_sweep.py", "test_cli.py")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would leave its workers nothing beside the other test processes


def pytest_collection_modifyitems(items):
    """The longest files first, so that none of them is left to one process at the end."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """A cache of calibrations of the tests' own, so that they neither use nor change the user's."""
    os.environ["FEDLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def flower_log():
    """Commands quieten Flower's log in their process; here the next test wants to hear it."""
    logger = logging.getLogger("flwr")
    before = logger.level, logger.propagate
    yield
    logger.setLevel(before[0])
    logger.propagate = before[1]


@pytest.fixture
def one_thread():
    """As in every worker: in models as small as these, threads that wait for each other cost twenty times the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path):
    """A maker of small experiments on the embedded data, in a results folder of the test's own."""

    def make(**overrides) -> Config:
        values = dataclasses.asdict(Config())
        values |= {"clients": 6, "rounds": 2, "clients_per_round": 4, "results": str(tmp_path / "results"), "device": "cpu"}
        values["train"]["steps"] = 2
        values["engine"] |= {"name": "inline", "cohort": "1"}
        for key, value in overrides.items():
            group, _, setting = key.partition("__")
            if setting and group != "strategy":
                values[group][setting] = value
            elif setting:
                values[group] = values[group] | {setting: value}
            else:
                values[key] = value
        return checked(from_dict(values))

    return make


def write_digits(folder: Path, devices: int, each: int) -> None:
    """Digits as files of several devices, by the example of docs/edge.md."""
    runpy.run_path(str(ROOT / "examples" / "edge" / "digits.py"))["main"](folder, devices, each)


def run_py(*arguments: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess[str]:
    """`python run.py …` as a user types it."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | options.pop("env", {})
    timeout = options.pop("timeout", 180)
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, **options)
