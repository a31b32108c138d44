"""What bounds a fused step: the shares of torch's operators, and FLOP/s against matrix products of its own shapes.

    python -m benchmarks.bounds [--job vit-16] [--clients 8] [--steps 5] [--repeats 5] [--threads 1]

`clients.cohort.train_together` on one cohort of all the clients, private. FLOPs are those that torch's counter sees in
matrix products and attention, forward and backward. Against them stand, in the same run, a product of 1024 × 1024 matrices
and the MLP's product at the cohort's own shape. Shares are of the operators' own CPU time under torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import jobs, sides
from benchmarks.throughput import prepare

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn"),
    "attention": ("aten::_scaled_dot_product", "aten::_softmax"),
    "gelu": ("aten::gelu",),
    "layer norm": ("aten::native_layer_norm",),
    "sums, norms, elementwise": ("aten::add", "aten::mul", "aten::sum", "aten::div", "aten::linalg_vector_norm", "aten::sub"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::stack", "aten::fill_", "aten::zero_", "aten::clone"),
}


def main() -> None:
    """Print seconds, FLOP/s, and shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="vit-16")
    for name, default in {"clients": 8, "steps": 5, "repeats": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    repeats, clients = arguments.repeats, arguments.clients
    sides.heading(f"{arguments.job}, one cohort of {clients}, {arguments.threads} threads", repeats)
    with tempfile.TemporaryDirectory() as folder:
        steps = prepare(arguments.job, Path(folder), clients, arguments.steps, arguments.threads)
        train = steps.together(clients)
        train()
        with FlopCounterMode(display=False) as counter:
            train()
        work = counter.get_total_flops()
        config: Any = steps.bench.model.peft.config
        rows = clients * steps.bench.config.train.batch_size * positions(steps)
        hidden, inner = config.hidden_size, config.intermediate_size
        rates = {
            "the fused step": [work / taken for taken in sides.in_turn({"": sides.seconds(train)}, repeats)[""]],
            "1024 x 1024 x 1024": product(1024, 1024, 1024, repeats),
            f"{rows} x {hidden} x {inner}": product(rows, hidden, inner, repeats),
        }
        print(f"{work / steps.done / 1e6:.0f} MFLOP a client step")
        sides.table(rates, "GFLOP/s", 1e-9, 1)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train()
    shares(profiler.key_averages())


def positions(steps: jobs.Steps) -> int:
    """Positions of an example: its tokens, or the patches of its image and the class token."""
    lengths = steps.bench.train.lengths()
    if lengths is not None:
        return int(lengths.max())
    config: Any = steps.bench.model.peft.config
    return int((config.image_size // config.patch_size) ** 2 + 1)


def product(rows: int, inner: int, columns: int, repeats: int) -> list[float]:
    """FLOP/s of a product of these shapes: the median of 20, in each repetition."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    once = sides.seconds(lambda: left @ right)
    once()
    return [2 * rows * inner * columns / statistics.median(once() for _ in range(20)) for _ in range(repeats)]


def shares(operators: Any) -> None:
    """Print the share of each kind of operator, and the ten that take most."""
    own = {operator.key: operator.self_cpu_time_total for operator in operators}
    total, kinds = sum(own.values()), Counter[str]()
    for name, spent in own.items():
        kinds[next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "other, and Python between")] += spent
    print("\n" + ", ".join(f"{kind} {100 * spent / total:.0f} %" for kind, spent in kinds.most_common()))
    for name, spent in sorted(own.items(), key=lambda item: -item[1])[:15]:
        print(f"  {name[:70]:72}{100 * spent / total:5.1f} %")


if __name__ == "__main__":
    main()
