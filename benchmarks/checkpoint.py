"""What a checkpoint costs: seconds to write one and its bytes, beside those of a round.

    python -m benchmarks.checkpoint rounds=10
    python -m benchmarks.checkpoint rounds=10 strategy=fedsa_lora evaluate.holdout=0.2
    python -m benchmarks.checkpoint --states 1000

The arguments are those of run.py. Every round of the run has a checkpoint; the results go into a temporary folder. With
--states nothing is trained: so many clients keep 24 kB each, and 10 of them have changed since the last checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.app import RecordDict

from fedlora.app import experiment
from fedlora.app.checkpoint import Checkpoint, Checkpoints
from fedlora.arrays import messages
from fedlora.arrays.messages import ServerState
from fedlora.check import ConfigError
from fedlora.config import CheckpointConfig
from fedlora.tools.cli import compose

written: list[tuple[float, int]] = []  # seconds and bytes
save = Checkpoints.save


def timed(self: Checkpoints, checkpoint: Checkpoint) -> None:
    """`Checkpoints.save`, measured."""
    began = time.perf_counter()
    save(self, checkpoint)
    seconds = time.perf_counter() - began
    written.append((seconds, (self.folder / f"round-{checkpoint.round:05d}.safetensors").stat().st_size))


def of_a_run(overrides: list[str], folder: str) -> str:
    """Run the experiment; what a round of it takes."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    config = compose(Path("configs"), [*overrides, f"results={folder}"])
    if not config.checkpoint.every:
        raise ConfigError("checkpoint.every=0 writes no checkpoints to measure; set it to 1")
    summary = experiment.run(config, time.perf_counter())
    a_round = (summary["seconds"] - summary["seconds_to_first_round"]) / summary["rounds"]
    return f"a round: {1000 * a_round:.0f} ms"


def of_states(number: int, folder: str) -> str:
    """Twenty checkpoints after the one with every state; how long that one takes."""
    rng = np.random.default_rng(0)

    def state() -> RecordDict:
        layers = [rng.standard_normal((64, 8)).astype(np.float32) for _ in range(12)]
        return RecordDict({"personal": messages.record({f"{k}.lora_B.weight": layer for k, layer in enumerate(layers)})})

    checkpoints, clients = Checkpoints(Path(folder) / "checkpoints", CheckpointConfig()), {k: state() for k in range(number)}
    for round in range(21):
        checkpoints.save(Checkpoint(round, {}, ServerState({}), clients, {}, (0, "")))
        clients |= {int(client): state() for client in rng.integers(number, size=10)}
    return f"the first, with all {number} states: {1000 * written.pop(0)[0]:.0f} ms"


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="setting=value", help="settings of run.py")
    parser.add_argument("--states", type=int, metavar="N", help="train nothing; N clients keep 24 kB each")
    arguments = parser.parse_args()
    Checkpoints.save = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        beside = of_a_run(arguments.overrides, folder) if arguments.states is None else of_states(arguments.states, folder)
    seconds = [1000 * each for each, _ in written]
    spread = f"{statistics.median(seconds):.2g} ms ({min(seconds):.2g} to {max(seconds):.2g})"
    print(f"checkpoint: {spread}, {written[-1][1]:,} bytes at the end; {beside}")


if __name__ == "__main__":
    main()
