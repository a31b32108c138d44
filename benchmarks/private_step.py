"""What a private step costs: DP-SGD under Opacus against plain SGD, as a ratio taken in one run.

    python -m benchmarks.private_step [--steps 200] [--batch 16] [--repeats 5]

Both sides are `clients.train.train` on one client of the embedded model and data, with the same Poisson batches (σ = 1,
C = 1 on the private side), in turn in every repetition. Setting up a client (optimiser, hooks) is part of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from benchmarks import sides
from clients.private import Mechanism
from clients.train import train
from fedlora.compute import workbench
from fedlora.config import Config, TrainConfig


def main() -> None:
    """Print milliseconds a step and the ratio, median and range over the repetitions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {"steps": 200, "batch": 16, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    bench = workbench.build(Config(clients=10, device="cpu"))
    indices = max(bench.shards, key=len)
    settings = TrainConfig(steps=arguments.steps, batch_size=arguments.batch, sampling="poisson", lr=0.1)
    start = bench.model.initial("kaiming", 0)

    def step(mechanism: Mechanism | None) -> Callable[[], object]:
        def run() -> None:
            bench.model.write(start, {})
            train(bench.model, bench.train, np.asarray(indices), settings, "B", (1, 1), (0, 0, 1), mechanism)

        run()  # the first pass warms caches
        return run

    sides.heading(f"one client, batch {arguments.batch}", arguments.repeats, "opacus")
    pair = {"plain": sides.seconds(step(None)), "private": sides.seconds(step(Mechanism(1.0, 1.0)))}
    sides.table(sides.in_turn(pair, arguments.repeats), "ms a step", 1000 / arguments.steps)


if __name__ == "__main__":
    main()
