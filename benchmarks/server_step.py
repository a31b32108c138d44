"""Seconds of a server step on thin factors against the same step on dense matrices: FedSVD and LoRA-FAIR.

    python -m benchmarks.server_step [--layers 48] [--size 1024] [--rank 8] [--clients 20] [--dense-layers 48] [--repeats 3]
    python -m benchmarks.server_step --layers 64 --size 4096 --rank 16 --dense-layers 2 --repeats 2

The defaults are RoBERTa-large with adapters on query and value. Both sides start from the same updates, in memory and in
float32:

* factors: `merge` of the strategy as a run calls it, for all layers (float64, QR of both factors and an SVD of an r × r
  core; LoRA-FAIR with both of its solvers);
* FedSVD dense: B̄ A as a size × size matrix, its full `numpy.linalg.svd` in float32, cut to rank r;
* LoRA-FAIR dense: Σ p_k B_k A_k and B̄ Ā as size × size matrices in float32, and ΔB from their difference in closed form,
  or, solver=sgd, by the same 100 steps of descent on their cosine, as in the paper.

One side after the other in every repetition, after one untimed merge. Of the dense side only the first `--dense-layers` are
run and their seconds scaled to all layers, since a dense SVD takes the same time for each. Both get the same number of BLAS
threads; one is the default, since more are slower on a machine that has other work. Not measured: messages, metrics and
the averaging of the head. The errors compare what the two sides return, layer by layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

import strategies
from benchmarks import sides
from fedlora import seeds
from fedlora.arrays import lowrank
from fedlora.arrays.lowrank import Adapters, Pair
from fedlora.arrays.messages import ServerState, Update
from fedlora.server.updates import shares
from strategies import LoRAStrategy
from strategies.lora_fair import LoRAFair


def main() -> None:
    """Measure, and print a table for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 48, "size": 1024, "rank": 8, "clients": 20, "dense-layers": 48, "repeats": 3, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    count, size, rank, clients, dense_count, repeats, threads = vars(parser.parse_args()).values()
    dense_count = min(dense_count, count)

    threadpool_limits(threads)
    sides.heading(f"{count} layers of {size} x {size}, r = {rank}, {clients} clients, {threads} threads", repeats, "numpy")
    if dense_count < count:
        print(f"dense: {dense_count} layers measured, their seconds times {count / dense_count:g}\n")
    for name, (strategy, dense_step) in SIDES.items():
        state, updates = a_round(count, size, rank, clients, strategy.trains)
        few = {layer: state.adapters[layer] for layer in list(state.adapters)[:dense_count]}
        thin, dense = partial(strategy.merge, state, updates, 1), partial(dense_step, few, updates)
        thin()
        measured = sides.in_turn({f"{name}, factors": sides.seconds(thin), f"{name}, dense": sides.seconds(dense)}, repeats)
        measured[f"{name}, dense"] = [count / dense_count * taken for taken in measured[f"{name}, dense"]]
        sides.table(measured, "s", places=3)
        ours, textbook = thin().adapters, dense()
        products, columns = zip(*(gaps(ours[layer], textbook[layer]) for layer in few), strict=True)
        print("relative difference of the two in Frobenius norm, largest over the layers: ", end="")
        print(f"product {max(products):.1e}, columns of B {max(columns):.1e}\n")


def a_round(count: int, size: int, rank: int, clients: int, trains: str) -> tuple[ServerState, list[Update]]:
    """A state with random A and what clients of unequal size send: a B of their own, and an A that they have moved a little
    where they train it."""
    rng = seeds.stream(0, "benchmark")

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    A = {f"layer{i}": draw(rank, size) for i in range(count)}
    moved, small = np.float32(0.3 if "A" in trains else 0.0), np.float32(1e-3)  # B is small beside A, as it is early in a run
    updates = [
        Update(
            client,
            100 + client,
            {n: Pair(A[n] + moved * draw(rank, size) if moved else A[n], small * draw(size, rank)) for n in A},
        )
        for client in range(clients)
    ]
    return ServerState({n: Pair(A[n], np.zeros((size, rank), np.float32)) for n in A}), updates


def dense_svd(adapters: Adapters, updates: list[Update]) -> Adapters:
    """FedSVD by the textbook, on these layers: average B, multiply out, decompose, cut."""
    p, merged = shares(updates), {}
    for name, own in adapters.items():
        B = lowrank.average([update.adapters[name].B for update in updates], p)
        U, values, Vt = np.linalg.svd(B @ own.A, full_matrices=False)
        merged[name] = Pair(Vt[: own.rank], U[:, : own.rank] * values[: own.rank])
    return merged


def dense_ridge(adapters: Adapters, updates: list[Update]) -> Adapters:
    """LoRA-FAIR's closed form by the textbook: ΔB = (ΔW − B̄Ā) Āᵀ (ĀĀᵀ + λI)⁻¹ with ΔW and B̄Ā multiplied out."""
    merged = {}
    for name, own in adapters.items():
        ideal, centre = multiplied_out(name, updates)
        missed, damped = ideal - centre.B @ centre.A, centre.A @ centre.A.T + LAMBDA * np.eye(own.rank, dtype=np.float32)
        merged[name] = Pair(centre.A, centre.B + np.linalg.solve(damped, centre.A @ missed.T).T)
    return merged


def dense_descent(adapters: Adapters, updates: list[Update]) -> Adapters:
    """LoRA-FAIR's gradient descent by the textbook, on ΔB: the cosine of ΔW and (B̄ + ΔB)Ā, both multiplied out."""
    merged, fair = {}, LoRAFair(solver="sgd")
    for name in adapters:
        ideal, centre = multiplied_out(name, updates)
        A, length, correction = centre.A, inner(ideal, ideal) ** 0.5, np.zeros_like(centre.B)
        step = np.float32(fair.lr / np.linalg.norm(A, 2) ** 2)
        for _ in range(fair.steps):
            product = (centre.B + correction) @ A
            size = inner(product, product) ** 0.5
            cosine = np.float32(inner(ideal, product) / (length * size))
            correction -= step * ((cosine * product - np.float32(size / length) * ideal) @ A.T)
            moved = np.linalg.norm(correction)
            correction *= np.float32(max(0.0, 1 - step * size**2 * fair.lam / moved))
        merged[name] = Pair(A, centre.B + correction)
    return merged


def inner(one: np.ndarray, other: np.ndarray) -> float:
    """⟨X, Y⟩ of float32 matrices; rows are summed in float64, since millions of terms would cost four digits."""
    return float(np.einsum("ij,ij->i", one, other).sum(dtype=np.float64))


def multiplied_out(name: str, updates: list[Update]) -> tuple[np.ndarray, Pair]:
    """Σ p_k B_k A_k of a layer as a dense matrix, float32, and its (Ā, B̄)."""
    p, pairs = shares(updates), [update.adapters[name] for update in updates]
    ideal = np.zeros((len(pairs[0].B), pairs[0].A.shape[1]), np.float32)
    for pair, weight in zip(pairs, p, strict=True):
        ideal += (np.float32(weight) * pair.B) @ pair.A
    return ideal, lowrank.mean(pairs, p)


LAMBDA = np.float32(0.01)  # LoRA-FAIR's default
SIDES: dict[str, tuple[LoRAStrategy, Callable[[Adapters, list[Update]], Adapters]]] = {
    "fedsvd": (strategies.make("fedsvd"), dense_svd),
    "lora_fair": (strategies.make("lora_fair"), dense_ridge),
    "lora_fair, solver=sgd": (strategies.make("lora_fair", solver="sgd"), dense_descent),
}


def gaps(thin: Pair, dense: Pair) -> tuple[float, float]:
    """‖difference‖ / ‖dense‖ of the products, and of the lengths of B's columns (FedSVD: the singular values)."""
    (A, B), (dense_A, dense_B) = (tuple(factor.astype(np.float64) for factor in pair) for pair in (thin, dense))
    goal, values = dense_B @ dense_A, np.linalg.norm(dense_B, axis=0)
    missed, missed_values = B @ A - goal, np.linalg.norm(B, axis=0) - values
    return tuple(float(np.linalg.norm(x) / np.linalg.norm(y)) for x, y in ((missed, goal), (missed_values, values)))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
