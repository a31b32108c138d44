"""What a client costs that does nothing: fedlora, Apple's pfl and Flower's `run_simulation`.

    python -m benchmarks.overhead [--clients 100] [--rounds 20] [--flower-rounds 4] [--repeats 3] [--profile 0]

The state has 25 KB: 6 adapted layers of 64 × 64 with r = 8, 12 arrays. A client reads them and sends them back
(`benchmarks.idle_client`); all clients take part in every round, and the server averages. fedlora is its FedAvg on the
inline grid, checks and metrics included; Flower is the same ClientApp under Flower's own FedAvg; pfl is its simulator
without local steps, where arrays never leave torch. Milliseconds a client and round, without the first round.
The seconds to the end of the first round have the roll call in them, one message to every node. `--profile 25` prints
where fedlora's time goes instead.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
import warnings
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import strategies
from benchmarks import sides
from fedlora import engines, seeds
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair
from fedlora.config import TrainConfig
from fedlora.engines.inline import InlineGrid

APP = "benchmarks.idle_client:app"


def main() -> None:
    """Print milliseconds a client of every side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"clients": 100, "rounds": 20, "flower-rounds": 4, "repeats": 3, "profile": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    clients, rounds = arguments.clients, arguments.rounds
    if arguments.profile:
        profiler = cProfile.Profile()
        profiler.runcall(fedlora, clients, rounds)
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("cumulative").print_stats(arguments.profile)
        return
    if arguments.side:
        with sides.answer() as given:
            began = time.perf_counter()
            ends = SIDES[arguments.side](clients, rounds)
            given["client"] = (ends[-1] - ends[0]) / (rounds - 1) / clients
            given["first"] = ends[0] - began
        return
    names = [name for name in SIDES if name != "pfl" or sides.has("pfl")]
    if "pfl" not in names:
        print(sides.PFL)
    sides.heading(f"a client that does nothing, 25 KB, {clients} a round", arguments.repeats, "flwr", "ray", "pfl")
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(arguments.repeats):
        for name, taken in measured.items():
            count = str(arguments.flower_rounds if name == "flower" else rounds)
            options = ("--side", name, "--clients", str(clients), "--rounds", count)
            taken.append(sides.in_process("benchmarks.overhead", *options))
    sides.table({name: [run["client"] for run in taken] for name, taken in measured.items()}, "ms a client", 1000, 3)
    print("seconds to the end of the first round, imports left out")
    sides.table({name: [run["first"] for run in taken] for name, taken in measured.items()}, "s")


def state() -> ArrayRecord:
    """12 arrays, 24.6 KB."""
    rng = seeds.stream(0, "benchmark")
    A, B = (rng.standard_normal(shape, dtype=np.float32) for shape in ((6, 8, 64), (6, 64, 8)))
    return messages.pack({f"block.{i}": Pair(A[i], B[i]) for i in range(6)}, {})


def fedlora(clients: int, rounds: int) -> list[float]:
    """Our strategy on our grid; the end of every round."""
    threadpool_limits(1)  # as the workbench of a run does
    strategy = strategies.make("fedavg", min_available_nodes=clients)
    ends: list[float] = []
    grid = InlineGrid(clients, APP)
    strategy.start(grid, state(), rounds, evaluate_fn=lambda round, arrays: ends.append(time.perf_counter()))
    return ends[1:]  # the first call is before round 1


def flower(clients: int, rounds: int) -> list[float]:
    """Flower's strategy in Flower's simulation."""
    from flwr.simulation import run_simulation

    ends: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=clients, min_train_nodes=clients)
        strategy.start(grid, state(), rounds, evaluate_fn=lambda round, arrays: ends.append(time.perf_counter()))

    warnings.simplefilter("ignore", DeprecationWarning)
    backend = {"init_args": {"include_dashboard": False, "log_to_driver": False}, "client_resources": {"num_cpus": 1}}
    run_simulation(server, engines.load_app(APP), clients, backend_config=backend)  # type: ignore[arg-type]
    return ends[1:]


def pfl(clients: int, rounds: int) -> list[float]:
    """pfl's simulator with clients that take no step."""
    import torch

    from benchmarks.pfl_side import Idle, train

    torch.set_num_threads(1)
    arrays = [torch.nn.Parameter(torch.from_numpy(array.numpy())) for array in state().values()]
    users = [{"x": torch.zeros(20, 1)} for _ in range(clients)]
    settings = TrainConfig(steps=1, batch_size=4)
    return train(torch.nn.ParameterList(arrays), arrays, users, settings, clients, rounds, Idle)


SIDES = {"fedlora": fedlora, "pfl": pfl, "flower": flower}

if __name__ == "__main__":
    main()
