"""A process with everything loaded, which forks a child for each command line it reads: killing one costs no new start.

    → ["clients=4", …] and the file for what the child says      ← its process id, and when it has ended its status

Every training that a child begins is a line in the file $TRAINED: what has really been spent.
"""

import json
import os
import sys

import torch

import clients.train
from clients import private  # noqa: F401  # Opacus takes a second to load
from fedlora import cli, experiment  # noqa: F401
from tests.conftest import ROOT

perform = clients.train.perform


def logged(task, *rest):
    with open(os.environ["TRAINED"], "a") as file:
        file.write(f"{task.streams[1]} {task.streams[2]}\n")
    return perform(task, *rest)


def main() -> None:
    torch.set_num_threads(1)  # no thread may be there when a process forks
    clients.train.perform = logged
    for line in sys.stdin:
        arguments, output = json.loads(line)
        child = os.fork()
        if child == 0:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os._exit(cli.main(ROOT / "configs", arguments))
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


if __name__ == "__main__":
    main()
