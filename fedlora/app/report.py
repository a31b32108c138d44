"""What the records of a run add up to: its summary and its picture. Reads rounds.jsonl and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.app.folder import ROUNDS
from fedlora.config import Config
from fedlora.privacy.claim import claim


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl, none if there is no such file yet; a last line that was cut off is left out."""
    rows: list[dict[str, Any]] = []
    if not (folder / ROUNDS).exists():
        return rows
    for line in (folder / ROUNDS).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def summarise(config: Config, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcome of a run from its rounds: the last central evaluation, totals of bytes, seconds since the start."""
    evaluated = [row for row in rows if "accuracy" in row]
    first, last = (evaluated[0], evaluated[-1]) if evaluated else ({}, {})
    clients: dict[str, Any] = next((row for row in reversed(rows) if "client_accuracy_mean" in row), {})
    epsilon = rows[-1].get("epsilon_max") if rows else None
    trained = rows[1:]  # round 0 is the evaluation before any training
    return {
        "strategy": config.strategy["name"],
        "clients": config.clients,
        "rounds": len(trained),
        "rounds_planned": config.rounds,
        "seed": config.seed,
        "accuracy": last.get("accuracy"),
        "loss": last.get("loss"),
        "macro_f1": last.get("macro_f1"),
        "client_accuracy": clients.get("client_accuracy_mean"),
        "client_accuracy_worst_decile": clients.get("client_accuracy_worst_decile"),
        "epsilon": epsilon,
        "privacy": claim(config, epsilon),
        "accuracy_before": first.get("accuracy"),
        "bytes_up": sum(row["bytes_up"] for row in trained),
        "bytes_down": sum(row["bytes_down"] for row in trained),
        "drops": sum(len(row["drops"]) for row in trained),
        "seconds": rows[-1]["seconds"] if rows else None,
        "seconds_to_first_round": trained[0]["started"] if trained else None,
    }


def draw_frontier(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    """A PNG at `path`: test accuracy against ε for each curve of `sweep.frontier`, with the band of its 95 % interval.

    ε is on a logarithmic axis; no privacy (ε = ∞) stands at its right end.
    """
    pyplot = _pyplot()
    finite = sorted({row["epsilon"] for curve in curves.values() for row in curve if np.isfinite(row["epsilon"])}) or [1.0]
    end = finite[-1] * 2.5
    figure, axis = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    for name, curve in curves.items():
        x = [min(row["epsilon"], end) for row in curve]
        mean = np.array([row["accuracy"] for row in curve])
        half = np.array([row["accuracy_ci95"] or 0.0 for row in curve])
        (line,) = axis.plot(x, mean, marker=".", label=name)
        axis.fill_between(x, mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    unbounded = any(np.isinf(row["epsilon"]) for curve in curves.values() for row in curve)
    axis.set_xticks([*finite, end] if unbounded else finite, [f"{e:g}" for e in finite] + (["∞"] if unbounded else []))
    axis.set_xticks([], minor=True)
    axis.set(xlabel="ε", ylabel="test accuracy")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def _pyplot() -> Any:
    """Matplotlib without a display; it is loaded here, after the training, since it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def tested(rows: list[dict[str, Any]]) -> str | None:
    """What was measured: the accuracy of the server's model, else that of the clients' own; None where nothing was."""
    return next((key for key in ("accuracy", "client_accuracy_mean") if any(key in row for row in rows)), None)


def draw_curves(path: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """A PNG at `path`: accuracy and loss by round, and accuracy by megabytes sent, of rows in which something was tested."""
    pyplot = _pyplot()
    megabytes = np.cumsum([row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in rows]) / 1e6
    measure = tested(rows) or "accuracy"
    central = measure == "accuracy"  # else each client has a model of its own
    evaluated = [(row, sent) for row, sent in zip(rows, megabytes, strict=True) if measure in row]
    rounds = [row["round"] for row, _ in evaluated]
    accuracy = [row[measure] for row, _ in evaluated]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    left.plot(rounds, accuracy, marker=".", color="tab:blue")
    left.set(xlabel="round", ylabel="test accuracy" if central else "clients' own test accuracy, mean")
    if central:
        loss = left.twinx()
        loss.plot(rounds, [row["loss"] for row, _ in evaluated], color="tab:orange", linewidth=1, alpha=0.8)
        loss.set_ylabel("test loss (nats)", color="tab:orange")
    right.plot([sent for _, sent in evaluated], accuracy, marker=".", color="tab:blue")
    right.set(xlabel="megabytes sent, both ways, all clients")
    if rounds[0] == 0:
        right.annotate("pretrained", (megabytes[-1], accuracy[0]), ha="right", va="bottom", color="grey", fontsize=8)
    for axis in (left, right):
        if rounds[0] == 0:
            axis.axhline(accuracy[0], color="grey", linestyle=":", linewidth=1)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{summary['strategy']}, {summary['clients']} clients, seed {summary['seed']}", fontsize=10)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
