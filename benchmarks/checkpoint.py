"""What a checkpoint costs: seconds to write one and its bytes, beside those of a round.

    python -m benchmarks.checkpoint rounds=10
    python -m benchmarks.checkpoint rounds=10 strategy=fedsa_lora evaluate.holdout=0.2

The arguments are those of run.py. Every round of the run has a checkpoint; the results go into a temporary folder.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fedlora import experiment
from fedlora.check import ConfigError
from fedlora.checkpoint import Checkpoint, Checkpoints
from fedlora.cli import compose


def main(overrides: list[str]) -> None:
    """Run the experiment and print the medians."""
    written: list[tuple[float, int]] = []
    save = Checkpoints.save

    def timed(self: Checkpoints, checkpoint: Checkpoint) -> None:
        began = time.perf_counter()
        save(self, checkpoint)
        size = next(self.folder.glob(f"round-{checkpoint.round:05d}*")).stat().st_size
        written.append((time.perf_counter() - began, size))

    logging.getLogger("flwr").setLevel(logging.ERROR)
    Checkpoints.save = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        config = compose(Path("configs"), [*overrides, f"results={folder}"])
        if not config.checkpoint.every:
            raise ConfigError("checkpoint.every=0 writes no checkpoints to measure; set it to 1")
        summary = experiment.run(config, time.perf_counter())
    seconds = [1000 * each for each, _ in written]
    a_round = (summary["seconds"] - summary["seconds_to_first_round"]) / summary["rounds"]
    print(
        f"checkpoint: {statistics.median(seconds):.2g} ms ({min(seconds):.2g} to {max(seconds):.2g}), "
        f"{written[-1][1]:,} bytes at the end; a round: {1000 * a_round:.0f} ms"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
