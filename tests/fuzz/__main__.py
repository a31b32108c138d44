"""Damages what comes from outside, and looks at what comes out: named drops and fixed sentences, or else a fault.

A case is a few mutations that follow from one seed. A fault is printed with the seed of its case, and is had again by
`python -m tests.fuzz <part> --seed <that seed> --mutations 1`.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from flwr.supercore.task_identity import TaskIdentity

from tests.fuzz import checkpoints, files, messages, replies, settings, tables

PARTS = {
    "messages": messages.part,
    "replies": replies.part,
    "files": files.part,
    "settings": settings.part,
    "tables": tables.part,
    "models": checkpoints.part,
}
MEMORY = 2**35  # bytes of addresses: a command that asks for more is a fault, and does not end the machine
EVERY = 5.0  # seconds from one line of progress to the next


def main() -> int:
    """The exit status: 1 where anything came out that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"], help="of what comes from outside")
    parser.add_argument("--mutations", type=int, default=100_000, help="in all, the same number in each part")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; those after it count on")
    arguments = parser.parse_args()
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # else no Message can be made
    chosen = list(PARTS) if arguments.part == "all" else [arguments.part]
    lines, faults = zip(*(fuzz(name, -(-arguments.mutations // len(chosen)), arguments.seed) for name in chosen), strict=True)
    print(*lines, sep="\n")
    return int(any(faults))


def fuzz(name: str, mutations: int, seed: int) -> tuple[str, int]:
    """The closing line of a part, and its faults."""
    came: Counter[str] = Counter()
    began = said = time.monotonic()
    faults = 0
    with tempfile.TemporaryDirectory() as place, PARTS[name](Path(place)) as case:
        while came.total() < mutations:
            try:
                came += case(seed)
            except Exception:
                faults += 1
                came["FAULTS"] += 1
                print(f"fault: python -m tests.fuzz {name} --mutations 1 --seed {seed}\n{traceback.format_exc()}", flush=True)
            seed += 1
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                line = f"{name}: {came.total():,} mutations in {said - began:.0f} s, {faults} faults, before seed {seed}"
                print(line, file=sys.stderr, flush=True)
    kinds = ", ".join(f"{times:,} {kind}" for kind, times in came.most_common())
    return f"{name}: {came.total():,} mutations, {time.monotonic() - began:.0f} s: {kinds}", faults


if __name__ == "__main__":
    sys.exit(main())
