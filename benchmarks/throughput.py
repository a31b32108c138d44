"""Private client steps a second: cohorts that share their passes against a bare loop over the clients.

    python -m benchmarks.throughput [--clients 32] [--steps 5] [--repeats 5] [--threads 1] [--jobs vit-4 minilm-16x32]

The bare loop has one resident model with adapters, Opacus' hooks and DPOptimizer, and plays one client after the other:
`clients.train.perform`. The cohorts are `clients.cohort.train_together`, of the size that `engine.cohort=auto` measures.
Same clients, same Poisson batches, same noise; the largest difference of the factors that they come to is printed.
A job is vit-<batch> or minilm-<batch>x<tokens of an example>; LoRA r = 8 on query and value, A and B trained.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import jobs, sides
from fedlora.compute import workbench

JOBS = ["vit-4", "vit-16", "minilm-4x16", "minilm-16x16", "minilm-16x32"]


def main() -> None:
    """Print milliseconds a client step and the ratio for every job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"clients": 32, "steps": 5, "repeats": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--jobs", nargs="+", default=JOBS)
    arguments = parser.parse_args()
    sides.heading(f"private steps of {arguments.clients} clients, {arguments.threads} threads", arguments.repeats, "opacus")
    for job in arguments.jobs:
        with tempfile.TemporaryDirectory() as folder:
            steps = prepare(job, Path(folder), arguments.clients, arguments.steps, arguments.threads)
            size = min(steps.best_size(), arguments.clients)
            together, missed = steps.together(size), jobs.gap(steps.one_by_one(), steps.together(size)())
            pair = {f"{job}, cohorts of {size}": sides.seconds(together), f"{job}, bare loop": sides.seconds(steps.one_by_one)}
            sides.table(sides.in_turn(pair, arguments.repeats), "ms a client step", 1000 / steps.done)
            print(f"{'':32}the same factors to {missed:.0e} of the largest entry")


def prepare(job: str, folder: Path, clients: int, steps: int, threads: int) -> jobs.Steps:
    """The clients of a job, on a bench of their own."""
    model, _, size = job.partition("-")
    if model == "vit":
        config = jobs.vit(clients=min(clients, 40))
        config = replace(config, train=replace(config.train, batch_size=int(size)))
        config = replace(config, partition=replace(config.partition, name="iid"))
    else:
        batch, tokens = size.split("x")
        config = jobs.minilm(folder, int(batch), int(tokens), clients)
    return jobs.Steps(workbench.build(replace(config, threads=threads)), clients, steps)


if __name__ == "__main__":
    main()
