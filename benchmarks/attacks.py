"""What each `server.mean` holds against: 6 of 20 clients send a wrong update in every round; the table of docs/around.md.

    python -m benchmarks.attacks [--steps 3] [--rounds 5] [--seeds 3]
    python -m benchmarks.attacks --honest

FedAvg on the embedded digits, `partition=iid`, all clients in every round. An attacker trains as the others do and sends
X − k·(X_k − X) instead of its X_k (flip × k, X being what it was given), or X + Z with a normal Z of 10 times the norm of
X_k − X (noise). `--honest` attacks nothing: it prints how long the longest update of a round is against the median one, which
`server.max_update` bounds, over several settings.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, RecordDict

from benchmarks import sides
from fedlora import seeds
from fedlora.app import experiment, report
from fedlora.app.records import Recorder
from fedlora.arrays import messages
from fedlora.check import RunError
from fedlora.config import Config
from fedlora.engines import CLIENT_APP, cohort
from fedlora.engines.inline import InlineEngine, InlineGrid
from fedlora.engines.local import carrying
from fedlora.tools import cli

CLIENTS, ATTACKERS = 20, 6
USUAL = f"strategy=fedavg clients={CLIENTS} fraction=1 engine=inline engine.cohort=10 checkpoint.every=0"
Arrays = dict[str, np.ndarray]
Attack = Callable[[Arrays, np.random.Generator], Arrays]  # what is sent as one's change, from the one that was trained
MEANS = {
    "weighted": "server.mean=weighted",
    "median": "server.mean=median",
    "trimmed, 0.1": "server.mean=trimmed",
    "trimmed, 0.35": "server.mean=trimmed server.trim=0.35",
    "norm_filter": "server.mean=norm_filter",
}
HONEST = (
    "", "partition.alpha=0.1", "partition=quantity", "partition=quantity partition.alpha=0.1",
    "train=adamw train.lr=0.002", "partition.alpha=0.1 train=adamw train.lr=0.002",
)  # fmt: skip


def flip(times: float) -> Attack:
    """The change turned round, so many times as long."""
    return lambda change, rng: {name: -times * array for name, array in change.items()}


def noise(change: Arrays, rng: np.random.Generator) -> Arrays:
    """Normal numbers of 10 times the norm of the change."""
    drawn = {name: rng.standard_normal(array.shape) for name, array in change.items()}
    return {name: array * (10 * messages.norm(change) / messages.norm(drawn)) for name, array in drawn.items()}


ATTACKS: dict[str, Attack | None] = {
    "none": None, "flip": flip(1), "flip × 10": flip(10), "flip × 100": flip(100), "noise": noise,
}  # fmt: skip


class Attacked(InlineGrid):
    """The first `ATTACKERS` nodes send what `attack` makes of their change; `ratios` has longest over median of each round."""

    def __init__(self, config: Config, attack: Attack | None) -> None:
        super().__init__(config.clients, CLIENT_APP, cohort(config))
        self.attack, self.rng = attack, seeds.stream(config.seed, "attack")
        self.ratios: list[float] = []

    def execute(self, batch: list[Message], timeout: float | None) -> Iterator[Message]:
        """See `InlineGrid`."""
        if not batch or batch[0].metadata.message_type != MessageType.TRAIN:
            yield from super().execute(batch, timeout)
            return
        given, norms = messages.arrays_of(batch[0].content.array_records[messages.ARRAYS]), []
        for reply in super().execute(batch, timeout):
            sent = messages.arrays_of(reply.content.array_records[messages.ARRAYS])
            change = {name: array.astype(np.float64) - given[name] for name, array in sent.items()}
            norms.append(messages.norm(change))
            if self.attack and reply.metadata.src_node_id <= ATTACKERS:
                wrong = self.attack(change, self.rng)
                arrays = {name: (given[name] + wrong[name]).astype(np.float32) for name in sent}
                reply = carrying(reply, RecordDict(dict(reply.content) | {messages.ARRAYS: messages.record(arrays)}))
            yield reply
        self.ratios.append(max(norms) / sorted(norms)[(len(norms) - 1) // 2])


def run(settings: str, attack: Attack | None = None) -> tuple[dict[str, Any], list[float]]:
    """The summary of a run, with `dropped`, clients a round; and the ratios of its rounds."""
    with tempfile.TemporaryDirectory() as results:
        config = cli.compose(sides.ROOT / "configs", [*USUAL.split(), *settings.split(), f"results={results}"])
        recorder = Recorder(config)
        grid = Attacked(config, attack)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), recorder.claim(), suppress(RunError):
            experiment.play(recorder, time.perf_counter(), engine=InlineEngine(grid))  # of an error its summary says so
        rows = report.read_rounds(recorder.folder)[1:]
        return recorder.summary() | {"dropped": sum(len(row["drops"]) for row in rows) / max(1, len(rows))}, grid.ratios


def table(options: argparse.Namespace) -> None:
    """Print accuracy and drops of every attack and mean, as rows of Markdown."""
    usual = f"partition=iid train.lr=0.3 train.steps={options.steps} rounds={options.rounds} evaluate.every={options.rounds}"
    found: dict[tuple[str, str], list[dict[str, Any]]] = {(attack, mean): [] for attack in ATTACKS for mean in MEANS}
    for seed in range(options.seeds):
        for attack, mean in found:
            found[attack, mean].append(run(f"{usual} seed={seed} {MEANS[mean]}", ATTACKS[attack])[0])
    before = [summary["accuracy_before"] for summary in found["none", "weighted"]]
    print(f"before training {cell(before)} %\n\n| | {' | '.join(MEANS)} |\n|---|{'---|' * len(MEANS)}")
    for attack in ATTACKS:
        cells = [cell([one["accuracy"] for one in found[attack, mean]]) for mean in MEANS]
        print(f"| {attack} | {' | '.join(cells)} |")
    print("\nclients dropped a round, and runs that stopped")
    for attack in ATTACKS:
        groups = [found[attack, mean] for mean in MEANS]
        dropped = [f"{statistics.mean(one['dropped'] for one in group):.1f}" for group in groups]
        stopped = [sum(one["status"] != "finished" for one in group) for group in groups]
        print(f"  {attack:12}{'  '.join(f'{a} ({b})' for a, b in zip(dropped, stopped, strict=True))}")


def cell(accuracies: list[float]) -> str:
    """Mean (lowest to highest), in percent."""
    low, middle, high = (100 * f(accuracies) for f in (min, statistics.mean, max))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def honest(options: argparse.Namespace) -> None:
    """Print the largest ratio of every setting: of all rounds of all seeds."""
    for settings in (f"strategy={strategy} {other}".strip() for strategy in ("fedsvd", "fedavg") for other in HONEST):
        runs = (run(f"rounds={options.rounds} evaluate.every=100 seed={seed} {settings}") for seed in range(options.seeds))
        ratios = [ratio for _, found in runs for ratio in found]
        print(f"{settings:56}longest update of a round / median: {max(ratios):.2f} at most")


def main() -> None:
    """Print the table, or the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 3, "rounds": 5, "seeds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--honest", action="store_true")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    sides.heading("honest clients" if options.honest else f"{ATTACKERS} attackers of {CLIENTS} clients", options.seeds, "flwr")
    (honest if options.honest else table)(options)


if __name__ == "__main__":
    main()
