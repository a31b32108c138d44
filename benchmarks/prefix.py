"""Adapters in the top 2 of MiniLM's 6 layers: the frozen prefix from the cache against the same without it.

    python -m benchmarks.prefix [--batch 16] [--tokens 32] [--clients 16] [--steps 4] [--repeats 5]

Private steps in cohorts (`clients.cohort.train_together`), of the size that `engine.cohort=auto` measures for each side.
The prefix of every example is computed before the clock starts, as in any round after an example's first; what that takes,
once, is printed too. Last, the largest difference of the factors that the two sides come to.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import jobs, sides
from fedlora.compute import workbench
from fedlora.config import EngineConfig


def main() -> None:
    """Print milliseconds a client step with the cache and without, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"batch": 16, "tokens": 32, "clients": 16, "steps": 4, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    job = f"MiniLM, adapters in the last 2 of 6 layers, {arguments.batch} x {arguments.tokens} tokens a step"
    sides.heading(f"{job}, {arguments.clients} clients", arguments.repeats, "transformers", "opacus")
    with tempfile.TemporaryDirectory() as folder:
        config = jobs.minilm(Path(folder), arguments.batch, arguments.tokens, arguments.clients)
        config = replace(config, adapter=replace(config.adapter, layers=[-2, -1]))
        work = {}
        for name, limit in (("prefix from the cache", 1.0), ("no cache", 0.0)):
            bench = workbench.build(replace(config, engine=EngineConfig("inline", prefix_cache=limit)))
            began = time.perf_counter()
            for start in range(0, len(bench.train), 64):
                bench.train.batch(range(start, min(start + 64, len(bench.train))), bench.model.device)  # type: ignore[arg-type]
            once = time.perf_counter() - began
            steps = jobs.Steps(bench, arguments.clients, arguments.steps)
            size = min(steps.best_size(), arguments.clients)
            work[f"{name}, cohorts of {size}"] = steps.together(size)
            print(f"{name}: {once:.1f} s to make the batches of {len(bench.train)} examples for the first time")
        measured = sides.in_turn({name: sides.seconds(train) for name, train in work.items()}, arguments.repeats)
        sides.table(measured, "ms a client step", 1000 / steps.done)
        one, other = (train() for train in work.values())
        print(f"the same factors to {jobs.gap(one, other):.0e} of the largest entry")


if __name__ == "__main__":
    main()
