"""Seconds of FedSVD's server step on thin factors against the same step on dense matrices.

    python -m benchmarks.server_step [--layers 48] [--size 1024] [--rank 8] [--clients 20] [--repeats 3] [--threads 1]

The defaults are RoBERTa-large with adapters on query and value. Both sides start from the same updates, in memory and in
float32, average B over the clients and give back (V_rᵀ, U_r S_r) for every layer:

* factors: `merge` of the strategy as a run calls it (float64 QR of both factors, SVD of an r × r core);
* dense: B̄ A as a size × size matrix, its full `numpy.linalg.svd` in float32, cut to rank r.

All layers are run on both sides, one side after the other in every repetition, after one untimed merge. Both get the same
number of BLAS threads; one is the default, since more are slower on a machine that has other work. Not measured: messages,
metrics and the averaging of the head. The errors compare what the two sides return, layer by layer.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits  # type: ignore[import-untyped]

import strategies
from fedlora import lowrank, seeds
from fedlora.lowrank import Adapters, Pair
from fedlora.messages import ServerState, Update
from strategies.updates import layers, shares


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {"layers": 48, "size": 1024, "rank": 8, "clients": 20, "repeats": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    count, size, rank, clients, repeats, threads = vars(parser.parse_args()).values()

    threadpool_limits(threads)
    state, updates = a_round(count, size, rank, clients)
    strategy = strategies.make("fedsvd")
    strategy.merge(state, updates, 1)
    seconds: dict[str, list[float]] = {"factors": [], "dense": []}
    for _ in range(repeats):
        begun = time.perf_counter()
        thin = strategy.merge(state, updates, 1).adapters
        halfway = time.perf_counter()
        dense = dense_step(state, updates, rank)
        seconds["factors"].append(halfway - begun)
        seconds["dense"].append(time.perf_counter() - halfway)
    ratios = [d / f for d, f in zip(seconds["dense"], seconds["factors"], strict=True)]
    products, values = zip(*(gaps(thin[name], dense[name]) for name in thin), strict=True)

    blas = ", ".join(sorted({f"{p['internal_api']} with {p['num_threads']} threads" for p in threadpool_info()}))
    print(f"{count} layers of {size} x {size}, r = {rank}, {clients} clients, float32, {repeats} repetitions")
    print(f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, {blas}\n")
    print(f"{'server step':<12}{'median':>12}{'lowest':>12}{'highest':>12}")
    for name, measured in seconds.items():
        print(f"{name:<12}" + "".join(f"{f(measured):>10.3f} s" for f in (statistics.median, min, max)))
    print(f"{'ratio':<12}" + "".join(f"{f(ratios):>11.0f}x" for f in (statistics.median, min, max)))
    print("\nrelative difference between the two in Frobenius norm, largest over the layers: ", end="")
    print(f"product {max(products):.1e}, singular values {max(values):.1e}")


def a_round(count: int, size: int, rank: int, clients: int) -> tuple[ServerState, list[Update]]:
    """A state with random A and what clients of unequal size send: the A of the broadcast and a B of their own."""
    rng = seeds.stream(0, "benchmark")
    A = {f"layer{i}": rng.standard_normal((rank, size), dtype=np.float32) for i in range(count)}
    updates = [
        Update(client, 100 + client, {n: Pair(A[n], rng.standard_normal((size, rank), dtype=np.float32)) for n in A})
        for client in range(clients)
    ]
    return ServerState({n: Pair(A[n], np.zeros((size, rank), np.float32)) for n in A}), updates


def dense_step(state: ServerState, updates: list[Update], rank: int) -> Adapters:
    """The textbook step: average B, multiply out, decompose, cut."""
    p, merged = shares(updates), {}
    for name, pairs in layers(updates).items():
        B = lowrank.average([pair.B for pair in pairs], p)
        U, values, Vt = np.linalg.svd(B @ state.adapters[name].A, full_matrices=False)
        merged[name] = Pair(Vt[:rank], U[:, :rank] * values[:rank])
    return merged


def gaps(thin: Pair, dense: Pair) -> tuple[float, float]:
    """‖difference‖ / ‖dense‖ of the products, and of the singular values, which are the lengths of B's columns."""
    (A, B), (dense_A, dense_B) = (tuple(factor.astype(np.float64) for factor in pair) for pair in (thin, dense))
    goal, values = dense_B @ dense_A, np.linalg.norm(dense_B, axis=0)
    missed, missed_values = B @ A - goal, np.linalg.norm(B, axis=0) - values
    return tuple(float(np.linalg.norm(x) / np.linalg.norm(y)) for x, y in ((missed, goal), (missed_values, values)))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
