"""All strategies under label skew and feature skew, each at its own learning rate: the table of docs/noniid.md.

    python -m benchmarks.noniid [--results results/noniid] [--docs docs]

First every strategy runs with every learning rate of a grid on a seed of its own; then with the best of them on five other
seeds. Runs that are finished are not run again, so that a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import strategies
from fedlora.app import cells, report
from fedlora.app.sweep import interval
from fedlora.tools import cli

CONFIGS = Path(__file__).parent.parent / "configs"
RATES = (0.1, 0.3, 1.0, 3.0)
SKEWS = ("dirichlet", "domains")
TUNING, SEEDS = 100, (0, 1, 2, 3, 4)
VARIANTS: dict[str, dict[str, str]] = {name: {"strategy": name} for name in strategies.names()} | {
    "ffa_lora, orthonormal": {"strategy": "ffa_lora", "strategy.init": "orthonormal"}
}
MEASURES = ("accuracy", "client_accuracy", "client_accuracy_worst_decile", "bytes_up", "bytes_down", "aggregation_bias")


class Cell(NamedTuple):
    """One run: what it is of the study."""

    variant: str
    skew: str
    rate: float
    seed: int


def outcomes(wanted: Iterable[Cell], results: Path) -> dict[Cell, dict[str, Any]]:
    """The summaries of these runs, with the mean bias over rounds; those that failed are left out."""
    order = list(wanted)
    configs = [cli.compose(CONFIGS, [f"{name}={value}" for name, value in settings(cell, results).items()]) for cell in order]
    placed = dict(zip((config.to_json() for config in configs), order, strict=True))
    found = {}
    for config, summary in cells.run(configs):
        if summary["status"] == "finished":
            rows = report.read_rounds(results / cells.check_folders([config])[0].folder.name)[1:]
            bias = [row["aggregation_bias"] for row in rows if "aggregation_bias" in row]
            found[placed[config.to_json()]] = summary | {"aggregation_bias": sum(bias) / len(bias) if bias else 0.0}
    return found


def settings(cell: Cell, results: Path) -> dict[str, Any]:
    """What a run is asked for on the command line."""
    placed = {"partition": cell.skew, "train.lr": cell.rate, "seed": cell.seed, "results": results}
    return {"experiment": "noniid"} | VARIANTS[cell.variant] | placed


def score(summary: dict[str, Any]) -> float:
    """What a learning rate is chosen by: the server's model on the test set, or else the clients' own on theirs."""
    accuracy = summary["accuracy"]
    return float(summary["client_accuracy"] if accuracy is None else accuracy)


def best_rates(tuned: dict[Cell, dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(variant, skew) → the learning rate with the best score on the tuning seed."""
    keys = {(cell.variant, cell.skew) for cell in tuned}
    return {key: max((score(s), -c.rate) for c, s in tuned.items() if c[:2] == key)[1] * -1 for key in keys}


def main() -> None:
    """Run what is missing, and write noniid.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/noniid"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    tuned = outcomes((Cell(v, k, rate, TUNING) for v in VARIANTS for k in SKEWS for rate in RATES), arguments.results)
    rates = best_rates(tuned)
    final = outcomes((Cell(*key, rate, seed) for key, rate in sorted(rates.items()) for seed in SEEDS), arguments.results)
    rows = []
    for (variant, skew), rate in sorted(rates.items(), key=lambda item: (item[0][1], item[0][0])):
        group = [summary for cell, summary in final.items() if cell[:2] == (variant, skew)]
        row: dict[str, Any] = {"skew": skew, "strategy": variant, "lr": rate, "seeds": len(group)}
        for measure in MEASURES:
            if group and all(summary[measure] is not None for summary in group):
                row[measure], row[f"{measure}_ci95"] = interval([float(summary[measure]) for summary in group])
        rows.append(row)
        print(
            f"{skew:10} {variant:24} lr {rate:<5g} " + "  ".join(f"{m} {row[m]:.4g}" for m in MEASURES if m in row), flush=True
        )
    with open(arguments.docs / "noniid.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["skew", "strategy", "lr", "seeds", *(c for m in MEASURES for c in (m, f"{m}_ci95"))])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
