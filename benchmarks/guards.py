"""What the guards cost: the generator of private noise, the reading of what comes from outside, the check of layers.

    python -m benchmarks.guards [--steps 100] [--batch 16] [--repeats 7]

* A private step on one client of the embedded model: Opacus' own noise from torch's generator (32 bits of a seed) against
  that of a ChaCha20 stream under a key of 256 bits, rounded to its grid. Everything else is the same on both sides.
* Reading one client's arrays: Flower's own `Array.numpy()` against `untrusted.arrays`, with the update of the embedded model
  (8 arrays) and one of RoBERTa-large's shape (48 arrays, 1.6 MB).
* The check that clipping bounds every layer (`clients.bounded`), once a process, against one private step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from flwr.app import ArrayRecord

from benchmarks import sides
from clients import bounded
from clients.private import DPOptimizer, Mechanism, NoisyOptimizer
from clients.train import train
from fedlora import untrusted
from fedlora.arrays import messages
from fedlora.compute import workbench
from fedlora.config import Config, TrainConfig

READS = 200


class TorchNoise(NoisyOptimizer):
    """Opacus' own noise."""

    def add_noise(self) -> None:
        """From torch's generator, as Opacus has it."""
        self.generator: torch.Generator = self.generator or torch.Generator().manual_seed(0)
        DPOptimizer.add_noise(self)


def main() -> None:
    """Print the three comparisons, median and range over the repetitions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {"steps": 100, "batch": 16, "repeats": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    bench = workbench.build(Config(clients=10, device="cpu"))
    indices, start = max(bench.shards, key=len), bench.model.initial("kaiming", 0)
    settings = TrainConfig(steps=arguments.steps, batch_size=arguments.batch, lr=0.1)

    def step(noisy: type[NoisyOptimizer]) -> Callable[[], object]:
        def run() -> None:
            import clients.private as private

            usual, private.NoisyOptimizer = private.NoisyOptimizer, noisy  # type: ignore[misc]
            try:
                bench.model.write(start, {})
                train(bench.model, bench.train, indices, settings, "B", (1, 1), (0, 0, 1), Mechanism(1.0, 1.0))
            finally:
                private.NoisyOptimizer = usual  # type: ignore[misc]

        run()  # the first pass warms caches
        return run

    sides.heading(f"a private step, batch {arguments.batch}", arguments.repeats, "opacus", "flwr")
    pair = {"torch's generator": sides.seconds(step(TorchNoise)), "ChaCha20, on a grid": sides.seconds(step(NoisyOptimizer))}
    steps = sides.in_turn(pair, arguments.repeats)
    sides.table(steps, "ms a step", 1000 / arguments.steps)

    shapes = {"the embedded model's update": (8, (64, 8)), "an update of RoBERTa-large's": (48, (1024, 8))}
    for name, (count, shape) in shapes.items():
        arrays = {f"layer.{k}.lora_B.weight": np.ones(shape, np.float32) for k in range(count)}
        record = messages.record(arrays)
        ways = {"Flower's Array.numpy": sides.seconds(partial(flower, record)), name: sides.seconds(partial(ours, record))}
        print()
        sides.table(sides.in_turn(ways, arguments.repeats), "µs", 1e6 / READS, 0)

    def ensured() -> None:
        bounded._ensured.clear()
        bounded.ensure(bench, "B")

    print()
    once = sides.in_turn(
        {"step": lambda: steps["ChaCha20, on a grid"][0] / arguments.steps, "check": sides.seconds(ensured)}, 3
    )
    sides.table({"a private step": once["step"], "the check of layers, once": once["check"]}, "ms", 1000)


def flower(record: ArrayRecord) -> None:
    """Read every array `READS` times, as Flower does."""
    for _ in range(READS):
        for array in record.values():
            array.numpy()


def ours(record: ArrayRecord) -> None:
    """The same through the checks."""
    for _ in range(READS):
        untrusted.arrays(record, 2**24)


if __name__ == "__main__":
    main()
