"""Peak memory with 10,000 clients against 100, the same examples and the same cohort; and the seconds to the first round.

    python -m benchmarks.memory [--clients 10000] [--fewer 100] [--rounds 3] [--repeats 3]

The tiny text encoder of `benchmarks.tiny_text`, two examples for each of the 10,000 clients, dealt out to all or to 100;
10 clients a round; a whole run in one process (engine=inline), and the peak of its resident set.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import jobs, sides
from fedlora.app import experiment
from fedlora.config import EngineConfig
from fedlora.validate import checked


def main() -> None:
    """Print both peaks and their ratio, and the time until the first messages are sent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"clients": 10_000, "fewer": 100, "rounds": 3, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", type=int)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        with sides.answer() as given, tempfile.TemporaryDirectory() as results:
            config = jobs.tiny(arguments.folder, arguments.clients, 2)
            config = replace(config, clients=arguments.side, rounds=arguments.rounds, results=results)
            summary = experiment.run(checked(replace(config, engine=EngineConfig("inline"))), sides.born())
            given["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            given["first"] = summary["seconds_to_first_round"]
        return
    sides.heading(f"10 of {arguments.fewer} and of {arguments.clients} clients a round", arguments.repeats, "flwr")
    runs: dict[str, list[dict[str, Any]]] = {f"{n} clients": [] for n in (arguments.fewer, arguments.clients)}
    with sides.cache(), tempfile.TemporaryDirectory() as folder:
        fixed = ["--folder", folder, "--clients", str(arguments.clients), "--rounds", str(arguments.rounds)]
        for _ in range(arguments.repeats):
            for name, taken in runs.items():
                taken.append(sides.in_process("benchmarks.memory", "--side", name.split()[0], *fixed))
    sides.table({name: [run["peak"] for run in taken] for name, taken in runs.items()}, "MB at most", 1e-6, 0)
    sides.table({name: [run["first"] for run in taken] for name, taken in runs.items()}, "s to the first round")


if __name__ == "__main__":
    main()
