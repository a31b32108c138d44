"""What ε costs: every client's σ, the first time and the second from the cache folder, and what a round reports.

    python -m benchmarks.calibration [--clients 50] [--repeats 5]

No two clients have equally many examples, so no two share a σ: sizes from 20 to 2,000, batches of 16, ten steps a round, a
fifth of the clients drawn in each of 30 rounds, δ = 1e-5. Every repetition has a cache folder of its own ($FEDLORA_CACHE),
and both calibrations run in a new process, once its libraries are loaded, which any run needs. After the second one all
rounds are played without training: ε of those drawn, by PRV, and its quartiles over all clients.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from benchmarks import sides
from fedlora.server.participation import draw_cohort, schedule

ROUNDS = 30
Seconds = tuple[float, float]  # by the wall clock, of CPU


def main() -> None:
    """Print seconds by the wall clock and of CPU, median and range over the repetitions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {"clients": 50, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sides.heading(f"{arguments.clients} clients, {ROUNDS} rounds", arguments.repeats, "dp-accounting", "opacus")
    for epsilon in (3.0, 20.0):
        taken: dict[str, list[Seconds]] = {
            "first calibration": [],
            "second calibration": [],
            "mean round": [],
            "longest round": [],
        }
        for _ in range(arguments.repeats):
            with tempfile.TemporaryDirectory() as cache:
                first, _ = in_new_process(epsilon, arguments.clients, cache)
                second, rounds = in_new_process(epsilon, arguments.clients, cache)
            mean = statistics.mean(wall for wall, _ in rounds), statistics.mean(cpu for _, cpu in rounds)
            for seconds, row in zip(taken.values(), (first, second, mean, max(rounds)), strict=True):
                seconds.append(row)
        for name, seconds in taken.items():
            for unit, times in zip(("wall", "CPU"), zip(*seconds, strict=True), strict=True):
                print(f"ε = {epsilon:<4g} {name:20}{unit:5}{sides.spread(list(times), 4)} s")


def in_new_process(epsilon: float, clients: int, cache: str) -> tuple[Seconds, list[Seconds]]:
    """`measure` in a process that remembers nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, epsilon, clients, cache).result()


def measure(epsilon: float, clients: int, cache: str) -> tuple[Seconds, list[Seconds]]:
    """Seconds to derive every client's σ with this cache folder, and to report each round's ε."""
    import opacus.accountants  # noqa: F401

    from fedlora.config import PrivacyConfig
    from fedlora.privacy.record_level import Client, Guard

    os.environ["FEDLORA_CACHE"] = cache
    sizes = np.random.default_rng(0).choice(np.arange(20, 2001), clients, replace=False)
    drawn = schedule(0, ROUNDS, clients, cohort := max(1, clients // 5))
    known = [Client(min(1.0, 16 / int(n)), 10, drawn[client]) for client, n in enumerate(sizes)]
    config, made, rounds = PrivacyConfig("record", epsilon=epsilon), [], []
    calibrated = clock(lambda: made.append(Guard(config, known, ROUNDS, cohort / clients, lambda ledger: None)))
    for round in range(1, ROUNDS + 1):
        made[0].admit(round, draw_cohort(0, round, list(range(clients)), cohort))
        rounds.append(clock(made[0].spent))
    return calibrated, rounds


def clock(work: Callable[[], object]) -> Seconds:
    """Seconds that a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
