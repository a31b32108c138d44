"""A tiny text encoder at 1000 clients: fedlora against Apple's pfl, Flower's `run_simulation`, and a bare loop.

    python -m benchmarks.tiny_text [--rounds 100] [--flower-rounds 10] [--repeats 3]

A BERT of 2 layers × 64, LoRA r = 8 on query and value, and its head; 10 of 1000 clients a round, each 5 steps of plain SGD
on batches of 4 × 16 tokens; plain averages. Same model, data and split, one thread a process. Seconds a round, from the end
of round 1 to the end of the last, without the central test, which comes once, at the end, and shows that all have learned.

* fedlora: `experiment.run`, records and all, but without checkpoints, which no other side writes either, in one process
  (engine=inline); a second row has engine=ray, a worker a core, and a third has the checkpoints, one after every round;
* bare loop: one resident model, the clients one after another (`clients.train.perform`), average, no messages: the same
  numbers as fedlora's, to the rounding of float32;
* pfl: its SimulatedBackend, PyTorchModel and FederatedAveraging in one process; its own sampling and order of examples;
* Flower: `benchmarks.flower_client` on one worker a core; fewer rounds, since every message builds a model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import jobs, sides
from clients import cost
from clients.task import Task
from clients.train import perform
from fedlora.app import experiment, report
from fedlora.app.records import Recorder
from fedlora.arrays.messages import ServerState, Update
from fedlora.compute import workbench
from fedlora.compute.evaluate import evaluate
from fedlora.compute.workbench import Workbench
from fedlora.config import CheckpointConfig, Config, EngineConfig, EvaluateConfig
from fedlora.engines import CLIENT_APP
from fedlora.server.participation import draw_cohort
from fedlora.validate import checked

CLIENTS = 1000


def main() -> None:
    """Print milliseconds a round of every side, and where each has come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rounds": 100, "flower-rounds": 10, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        with sides.answer() as given:
            given |= SIDES[arguments.side](jobs.tiny(arguments.folder, CLIENTS), arguments.rounds)
        return
    names = [name for name in SIDES if name != "warm" and (name != "pfl" or sides.has("pfl"))]
    if "pfl" not in names:
        print(sides.PFL)
    job = f"tiny text encoder, {CLIENTS} clients, 10 a round, {arguments.rounds} rounds, Flower {arguments.flower_rounds}"
    sides.heading(job, arguments.repeats, "flwr", "ray", "peft", "pfl")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with sides.cache(), tempfile.TemporaryDirectory() as folder:
        print(f"cohorts of {ask('warm', folder, 1)['cohort']}")
        for _ in range(arguments.repeats):
            for name, taken in runs.items():
                taken.append(ask(name, folder, arguments.flower_rounds if name == "Flower" else arguments.rounds))
    sides.table({name: [run["round"] for run in taken] for name, taken in runs.items()}, "ms a round", 1000)
    for name, taken in runs.items():
        print(f"{name:32}loss {taken[-1]['loss']:.5f}, accuracy {taken[-1]['accuracy']:.3f}")


def ask(side: str, folder: str, rounds: int) -> dict[str, Any]:
    """A side's answer, from a process of its own."""
    return sides.in_process("benchmarks.tiny_text", "--side", side, "--folder", folder, "--rounds", str(rounds))


def warm(config: Config, rounds: int) -> dict[str, Any]:
    """Measures the cohort size, before anything is timed."""
    bench = workbench.build(config)
    return {"cohort": cost.cohort_size(bench, "AB", config.cohort_size)}


def run(config: Config, rounds: int, engine: str, app: str = CLIENT_APP, checkpoints: int = 0) -> dict[str, Any]:
    """A whole run on an engine, with a checkpoint every so many rounds."""
    with tempfile.TemporaryDirectory() as results:
        config = replace(config, rounds=rounds, results=results, evaluate=EvaluateConfig(every=rounds))
        config = checked(replace(config, engine=EngineConfig(engine), checkpoint=CheckpointConfig(every=checkpoints)))
        summary = experiment.run(config, time.perf_counter(), app)
        rows = report.read_rounds(Recorder(config).folder)
    seconds = rows[-1]["seconds"] - rows[1]["seconds"] - rows[-1]["seconds_evaluate"]
    return {"round": seconds / (rounds - 1), "loss": summary["loss"], "accuracy": summary["accuracy"]}


def bare(config: Config, rounds: int) -> dict[str, Any]:
    """One resident model, one client after another, and the average."""
    bench = workbench.build(config)
    strategy = experiment.make_strategy(config)
    state = ServerState(bench.model.initial("kaiming", config.seed), bench.model.initial_head, scale=bench.model.scale)
    ends = []
    for round in range(1, rounds + 1):
        updates = []
        for client in draw_cohort(config.seed, round, list(range(CLIENTS)), config.cohort_size):
            bench.model.write(state.adapters, state.dense)
            indices = bench.shards[client]
            perform(Task(indices, config.train, "AB", (round, rounds), (config.seed, client, round)), bench.model, bench.train)
            updates.append(Update(client, len(indices), bench.model.adapters(), bench.model.dense()))
        state = strategy.merge(replace(state, dense=averaged(updates)), updates, round)
        ends.append(time.perf_counter())
    bench.model.write(state.adapters, state.dense)
    return {"round": (ends[-1] - ends[0]) / (rounds - 1)} | tested(bench)


def averaged(updates: list[Update]) -> dict[str, np.ndarray]:
    """The mean of the heads; all clients have equally many examples."""
    return {name: np.mean([update.dense[name] for update in updates], axis=0) for name in updates[0].dense}


def pfl(config: Config, rounds: int) -> dict[str, Any]:
    """The same in Apple's pfl."""
    from benchmarks.pfl_side import train

    bench = workbench.build(config)
    bench.model.write(bench.model.initial("kaiming", config.seed), bench.model.initial_head)
    parameters = bench.model.trainable("AB")
    bench.model.train_mode()
    users = [bench.train.batch(shard, bench.model.device) for shard in bench.shards]
    ends = train(bench.model.peft, parameters, users, config.train, config.cohort_size, rounds)
    return {"round": (ends[-1] - ends[0]) / (rounds - 1)} | tested(bench)


def tested(bench: Workbench) -> dict[str, Any]:
    """The resident model on the central test set."""
    return evaluate(bench.model, bench.test, np.arange(len(bench.test)), 256)


SIDES = {
    "warm": warm,
    "fedlora, one process": lambda config, rounds: run(config, rounds, "inline"),
    "fedlora, Ray workers": lambda config, rounds: run(config, rounds, "ray"),
    "fedlora, with checkpoints": lambda config, rounds: run(config, rounds, "inline", checkpoints=1),
    "bare loop": bare,
    "pfl": pfl,
    "Flower": lambda config, rounds: run(config, rounds, "flower", "benchmarks.flower_client:app"),
}


if __name__ == "__main__":
    main()
