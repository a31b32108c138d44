"""Large cohorts on Ray: updates added up on the workers against added up on the server.

    python -m benchmarks.sums [--clients 512] [--layers 48] [--size 1024] [--rank 8] [--rounds 5] [--repeats 3]

Clients that do nothing, so that nothing but the way of their updates is measured: FedAvg on `engine=ray` with two workers,
adapters of RoBERTa-large on query and value (3.1 MB a client). Seconds a round, without the first, and the driver's own
seconds of processor time, which bound how many workers it can serve. The two sides' final arrays must be the same bits.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import strategies
from benchmarks import sides
from fedlora import engines, seeds
from fedlora.arrays import messages
from fedlora.arrays.lowrank import Pair
from fedlora.config import Config, EngineConfig

SIDES = {"added on workers": "benchmarks.idle_client:adding", "added on the server": "benchmarks.idle_client:app"}


def main() -> None:
    """Print seconds a round of both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = {"clients": 512, "layers": 48, "size": 1024, "rank": 8, "rounds": 5, "repeats": 3}
    for name, default in settings.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=[*SIDES])
    arguments = parser.parse_args()
    if arguments.side:
        with sides.answer() as given:
            given |= side(SIDES[arguments.side], arguments)
        return
    sides.heading(f"{arguments.clients} updates a round, one sum", arguments.repeats, "flwr", "ray")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for _ in range(arguments.repeats):
        for name, taken in runs.items():
            options = [f"--{key}={getattr(arguments, key)}" for key in settings]
            taken.append(sides.in_process("benchmarks.sums", "--side", name, *options))
    if len({run["digest"] for taken in runs.values() for run in taken}) != 1:
        raise SystemExit("the sides come to different bits")
    sides.table({name: [run["round"] for run in taken] for name, taken in runs.items()}, "s a round")
    sides.table({name: [run["driver"] for run in taken] for name, taken in runs.items()}, "s of the driver's processor a round")


def side(app: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds a round, of the clock and of this process, and what the rounds came to."""
    import ray

    rng, clients, rounds = seeds.stream(0, "benchmark"), asked.clients, asked.rounds
    A, B = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((asked.layers, asked.rank, asked.size), (asked.layers, asked.size, asked.rank))
    )
    state = messages.pack({f"block.{i}": Pair(A[i], B[i]) for i in range(asked.layers)}, {})
    config = Config(clients=clients, device="cpu", engine=EngineConfig("ray", workers=2, cohort="1"))
    strategy, ends = strategies.make("fedavg", min_available_nodes=clients, derive=True), list[tuple[float, float]]()
    engine = engines.make(config, app)
    pool = engine.starting.result()  # type: ignore[attr-defined]
    ray.wait([*pool.warming], num_returns=len(pool.warming))

    def after(round: int, arrays: object) -> None:
        ends.append((time.perf_counter(), time.process_time()))

    engine.run(lambda grid: strategy.start(grid, state, rounds, evaluate_fn=after))
    assert strategy.state is not None
    digest = messages.digest(messages.named(strategy.state.adapters, {}))
    (began, work), (ended, done) = ends[1], ends[-1]  # the first call is before round 1
    return {"round": (ended - began) / (rounds - 1), "driver": (done - work) / (rounds - 1), "digest": digest}


if __name__ == "__main__":
    main()
