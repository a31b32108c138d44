"""What a private step costs: DP-SGD under Opacus against plain SGD, as a ratio taken in one run.

    python -m benchmarks.private_step [--steps 200] [--batch 16] [--repeats 5]

Both sides are `clients.train.train` on one client of the embedded model and data, with the same Poisson batches (σ = 1,
C = 1 on the private side), in turn in every repetition. Setting up a client (optimiser, hooks) is part of both.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import numpy as np

from clients.private import Mechanism
from clients.train import train
from fedlora import workbench
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

    def seconds(mechanism: Mechanism | None) -> float:
        bench.model.write(start, {})
        began = time.perf_counter()
        train(bench.model, bench.train, np.asarray(indices), settings, "B", (1, 1), (0, 0, 1), mechanism)
        return (time.perf_counter() - began) / arguments.steps

    seconds(None), seconds(Mechanism(1.0, 1.0))  # the first pass of each warms caches
    pairs = [(seconds(None), seconds(Mechanism(1.0, 1.0))) for _ in range(arguments.repeats)]
    ratios = [private / plain for plain, private in pairs]
    print(f"{platform.machine()}, {os.cpu_count()} cores, batch {arguments.batch}, {arguments.repeats} repetitions")
    for side, name in enumerate(("plain", "private")):
        print(f"{name:8}{1000 * statistics.median(pair[side] for pair in pairs):8.2f} ms a step")
    print(f"ratio   {statistics.median(ratios):8.2f}      ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
