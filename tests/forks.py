"""A process with everything loaded, which forks a child for each command line it reads: killing one costs no new start.

    → ["clients=4", …] and the file for what the child says      ← its process id, and when it has ended its status

Every training that a child begins is a line in the file $TRAINED: what has really been spent.
"""

import contextlib
import json
import os
import sys
import tempfile

import torch

import clients.train
from clients import private  # noqa: F401  # Opacus takes a second to load
from fedlora.tools import cli
from tests.conftest import ROOT

perform = clients.train.perform


def logged(task, *rest):
    with open(os.environ["TRAINED"], "a") as file:
        file.write(f"{task.streams[1]} {task.streams[2]}\n")
    return perform(task, *rest)


def load() -> None:
    """Run the smallest experiment, so that whatever is loaded late is there too, before anything is watched."""
    with tempfile.TemporaryDirectory() as results, contextlib.redirect_stdout(sys.stderr):
        small = ["engine=inline", "device=cpu", "clients=2", "fraction=null", "rounds=1", "train.steps=1", "engine.cohort=1"]
        assert cli.main(ROOT / "configs", [*small, f"results={results}"]) == 0
    assert len(os.listdir("/proc/self/task")) == 1, "no thread may be there when a process forks"


def main() -> None:
    torch.set_num_threads(1)
    load()
    clients.train.perform = logged
    for line in sys.stdin:
        arguments, output = json.loads(line)
        child = os.fork()
        if child == 0:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os._exit(cli.main(ROOT / "configs", arguments))
        print("process", child, flush=True)
        print("status", os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
