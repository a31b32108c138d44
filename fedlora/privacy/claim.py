"""What a run promises, to whom, and what leaves a client beside it: the `privacy` block of summary.json."""

from __future__ import annotations

from typing import Any

from fedlora.config import Config

NEIGHBOURS = {
    ("record", "add_remove"): "one record of one client is there or adds nothing",
    ("record", "replace"): "one record of one client is there or another one in its place",
    ("user", "add_remove"): "one client sends its updates or nothing",
    ("user", "replace"): "one client sends its updates or another's in their place",
}
AGAINST = {
    "record": "everybody who sees all messages of that client",
    "user": "everybody who sees what the server releases, but not the server",
}


def claim(config: Config, epsilon: float | None) -> dict[str, Any] | None:
    """What a run with these settings promises after it has spent `epsilon` (None: no bound); None without privacy."""
    privacy = config.privacy
    if privacy.name == "none":
        return None
    neighbours = NEIGHBOURS[privacy.name, privacy.adjacency]
    bound = "no bound, since steps without noise" if epsilon is None else f"({epsilon:.4g}, {privacy.delta:g})-DP"
    return {
        "level": privacy.name,
        "adjacency": privacy.adjacency,
        "epsilon": epsilon,
        "delta": privacy.delta,
        "accountant": privacy.accountant if privacy.name == "record" else "prv",
        "guarantee": f"{bound} against {AGAINST[privacy.name]}; neighbours: {neighbours}",
        "also_leaves": also_leaves(config),
    }


def also_leaves(config: Config) -> list[str]:
    """What such a run lets out of its clients that no ε covers."""
    leaves = [
        "examples: how many each client has",
        "steps and seconds of each training",
    ]
    if config.evaluate.holdout:
        leaves.append("client_accuracy*: the accuracy on examples that clients hold back")
    if config.privacy.name == "user":
        leaves.append("each client's update, to the server; its norm in update_norm_mean and updates_clipped")
        drawn = "cohort: who was drawn in each round"
        if config.privacy.sampling != "none":
            drawn += f"; ε of privacy.sampling={config.privacy.sampling} holds against those who do not know it"
        leaves.append(drawn)
    else:
        leaves.append("cohort: the rounds in which each client takes part")
    if not (config.deploy and config.privacy.name == "record"):
        leaves.append("client_loss and the other diagnostics of a simulation (docs/metrics.md)")
    return leaves
