"""Several experiments that belong together: what they say over seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.app import naming
from fedlora.check import RunError
from fedlora.config import Config
from fedlora.identity import identifies

Cell = tuple[Config, dict[str, Any]]  # settings, and the summary of the run
COLUMNS = ("accuracy", "client_accuracy", "loss", "bytes_up", "bytes_down", "seconds")


def over_seeds(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each setting of everything but the seed: mean and half-width of the 95 % interval over its seeds.

    `run` names what tells a setting from the others. The interval is Student's, mean ± t(0.975, n − 1) · s / √n; with one
    seed it is not known and left empty. Runs that did not finish count in `failed` and in nothing else.
    """
    settings = [replace(config, seed=0) for config, _ in cells]
    groups: dict[str, list[Cell]] = {}
    for config, cell in zip(settings, cells, strict=True):
        groups.setdefault(naming.run_name(config), []).append(cell)
    labels = dict(zip(map(naming.run_name, settings), labelled(settings), strict=True))
    rows = []
    for name, group in groups.items():
        finished = [summary for _, summary in group if summary["status"] == "finished"]
        row: dict[str, Any] = {"run": labels[name], "seeds": len(finished), "failed": len(group) - len(finished)}
        for column in COLUMNS if finished else ():
            if all(summary.get(column) is not None for summary in finished):
                row[column], row[f"{column}_ci95"] = interval([float(summary[column]) for summary in finished])
        rows.append(row)
    return rows


def labelled(settings: Sequence[Config]) -> list[str]:
    """A name for each of these: the strategy, and what is not at its default in some of them only."""
    parts = []
    for config in settings:
        changed = {name: value for name, value in naming.changed(config).items() if identifies(name)}
        parts.append([f"{name.removesuffix('.name')}={value}" for name, value in changed.items()])
    shared = set.intersection(*map(set, parts))
    return [
        ",".join([str(config.strategy["name"]), *(part for part in own if part not in shared)])
        for config, own in zip(settings, parts, strict=True)
    ]


def frontier(cells: Sequence[Cell]) -> dict[str, list[dict[str, Any]]]:
    """Curves of accuracy against ε: name of everything but seed and budget → its rows of `over_seeds`, ε rising.

    Empty where no two budgets were run.
    """
    if len({config.privacy.epsilon for config, _ in cells}) < 2:
        return {}
    curves: dict[str, dict[float, list[Cell]]] = {}
    budgets = [(config.privacy.epsilon, (config, summary)) for config, summary in cells if config.privacy.epsilon is not None]
    rest = [replace(config, seed=0, privacy=replace(config.privacy, epsilon=None)) for _, (config, _) in budgets]
    for name, (epsilon, cell) in zip(labelled(rest), budgets, strict=True):
        curves.setdefault(name, {}).setdefault(epsilon, []).append(cell)
    rows = {
        name: [row | {"epsilon": epsilon} for epsilon in sorted(curve) for row in over_seeds(curve[epsilon])]
        for name, curve in curves.items()
    }
    return {name: [row for row in curve if "accuracy" in row] for name, curve in rows.items()}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of the 95 % interval of the mean; None for the width of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    from scipy.stats import t

    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, float(t.ppf(0.975, len(values) - 1)) * math.sqrt(variance / len(values))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as CSV, in place only when it is whole."""
    columns = ["run", "seeds", "failed", *(name for column in COLUMNS for name in (column, f"{column}_ci95"))]
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}); every cell's own results are safe") from error
