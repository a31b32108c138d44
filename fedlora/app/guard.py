"""What keeps the budget of a private run, and what its settings come to before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clients.task import local_steps, sampling_rate
from fedlora.compute.workbench import Workbench
from fedlora.server.participation import schedule
from strategies import LoRAStrategy

if TYPE_CHECKING:
    from typing import TypeAlias

    from fedlora.config import Config
    from fedlora.privacy.record_level import Guard
    from fedlora.server.dp_fedavg import UserGuard

    Keeper: TypeAlias = Guard | UserGuard

Derived = list[tuple[str, str, str]]  # name, value, reason


def make(bench: Workbench, save: Callable[[Any], None] = lambda ledger: None, before: Path | None = None) -> Keeper | None:
    """What keeps a private run's budget, its noise derived; None with privacy=none. `save` is given its ledger.

    `before` is the file of a ledger that stays counted, whatever of it is taken again; it may be missing.
    """
    config = bench.config
    if config.privacy.name == "none":
        return None
    if config.privacy.name == "user":
        from fedlora.server.dp_fedavg import UserGuard, UserLedger

        return UserGuard(config, bench.identity, save, UserLedger.load(before) if before and before.exists() else None)
    from fedlora.privacy.ledger import Ledger
    from fedlora.privacy.record_level import Client, Guard

    drawn = schedule(config.seed, config.rounds, config.clients, config.cohort_size)
    clients = [
        Client(sampling_rate(config.train.batch_size, n), local_steps(config.train, n), drawn[number])
        for number, n in enumerate(map(int, bench.counts))
    ]
    spent = Ledger.load(before) if before and before.exists() else None
    return Guard(config.privacy, clients, config.rounds, config.cohort_size / config.clients, save, spent)


def sensitivity(bench: Workbench, strategy: LoRAStrategy) -> Derived:
    """What a record adds to a private step, at most. Raises ConfigError where clipping would not bound it."""
    privacy = bench.config.privacy
    if privacy.name != "record":
        return []
    from clients.bounded import ensure  # Opacus takes a second to load

    for trains in sorted({strategy.trained(round) for round in (1, 2)}):
        ensure(bench, trains)
    why = "each trained layer sees records as rows, and gradients by record are right; tried on this model"
    if bench.config.deploy:
        why = "each device tries its own model before it trains"
    return [("a record adds", f"at most C = {privacy.clip:g}", why)]


def cautions(config: Config, counts: np.ndarray) -> Derived:
    """What a private run may do and seldom means to; `counts` are the training examples of each client."""
    rows, user = [], config.privacy.name == "user"
    protected, delta = config.clients if user else int(counts.sum()), config.privacy.delta
    if delta * protected >= 1:
        what = "clients" if user else "training examples"
        reason = f"not below 1/n of n = {protected} {what}: one of them may be laid open; set it well below {1 / protected:.2g}"
        rows.append(("warning", f"privacy.delta={delta:g}", reason))
    small = counts[counts < config.train.batch_size]
    if not user and len(small):
        reason = (
            f"larger than the data of {len(small)} of {len(counts)} clients (the smallest has {small.min()}): they take all "
            "their records in every step, q = 1, so that sampling amplifies nothing; lower it, or raise partition.min_examples"
        )
        rows.append(("warning", f"train.batch_size={config.train.batch_size}", reason))
    return rows
