"""User-level privacy (DP-FedAvg; McMahan et al., 2018): whole clients are protected, by the server.

    Δ_k = what client k sent − what was broadcast
    released = (Σ_k Δ_k · min(1, S / ‖Δ_k‖) + N(0, (zS)² I)) / m,    m the expected cohort

Clip and noise act on exactly what the server receives, before `merge`, so every strategy composes with it: it merges the one
update that the release amounts to. A strategy that needs each client's factors (LoRA-FAIR) then has nothing to correct.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import seeds
from fedlora.check import ConfigError
from fedlora.config import PrivacyConfig
from fedlora.messages import ServerState, Update, norm, trained_arrays, update_of
from fedlora.privacy import ledger
from fedlora.privacy.user_level import user_epsilon, user_noise_multiplier


@dataclass
class UserLedger:
    """Everything that the ε of a user-level run depends on; the same for every client."""

    noise_multiplier: float  # z
    clients: int
    cohort: int  # expected size m
    sampling: str  # poisson, fixed or none
    rounds: int = 0  # released so far
    adjacency: str = "add_remove"

    def epsilon(self, delta: float) -> float:
        """ε spent at δ by every client, whether it was drawn or not."""
        arguments = (self.noise_multiplier, self.clients, self.cohort, self.rounds, delta, self.sampling)
        return user_epsilon(*arguments, self.adjacency)

    def save(self, path: Path) -> None:
        """Replace the file in one move; it never counts less than before, since a run that is continued takes rounds again."""
        counted = max(self.rounds, self.load(path).rounds if path.exists() else 0)
        ledger.write(path, json.dumps(asdict(self) | {"rounds": counted}, indent=1))

    @classmethod
    def load(cls, path: Path) -> UserLedger:
        """The ledger in the file; raises ConfigError if it cannot be read or holds anything else."""
        try:
            loaded = cls(**json.loads(ledger.read(path)))
            loaded.rounds = operator.index(loaded.rounds)
        except (ValueError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ledger.unknown(f"the privacy ledger {path} is damaged ({error!r})") from error
        return loaded


class UserGuard:
    """Releases each round's sum and keeps its ledger, written ahead.

    `save` is called with the ledger before anything of a round is sent.
    """

    noise_multipliers: list[float] = []  # clients add none; the server does

    def __init__(
        self, config: PrivacyConfig, clients: int, cohort: int, rounds: int, seed: int, save: Callable[[UserLedger], None]
    ) -> None:
        self.config, self.rounds, self.seed, self.save = config, rounds, seed, save
        z = config.noise_multiplier
        if z is None:
            assert config.epsilon is not None  # the configuration was checked
            counted = clients, cohort, rounds, config.delta, config.sampling, config.adjacency
            z = user_noise_multiplier(config.epsilon, *counted)
        self.ledger = UserLedger(z, clients, cohort, config.sampling, adjacency=config.adjacency)
        self.measured: dict[str, float] = {}  # of the newest round, for diagnosis; not private

    def admit(self, round: int, cohort: list[int]) -> list[int]:
        """The whole cohort; the round is in the ledger when this returns."""
        self.ledger.rounds += 1
        self.save(self.ledger)
        return cohort

    def release(self, state: ServerState, updates: list[Update], round: int, trains: str) -> list[Update]:
        """The noisy clipped sum over the expected cohort, as the one update that is merged.

        Guarantee: adding or removing one client moves the sum before noise by at most S in Euclidean norm, over all that a
        client sends together. No client at all (an empty Poisson cohort) is a release of noise alone.
        """
        start = trained_arrays(state.adapters, state.dense, trains)
        clip, z = self.config.clip, self.ledger.noise_multiplier
        sigma = z * clip if z else 0.0  # a clip without noise may be infinite
        total = {key: np.zeros_like(array) for key, array in start.items()}
        norms = []
        for update in updates:
            sent = trained_arrays(update.adapters, update.dense, trains)
            delta = {key: sent[key] - start[key] for key in start}
            norms.append(norm(delta))
            factor = min(1.0, clip / norms[-1]) if norms[-1] else 1.0
            for key, array in delta.items():
                total[key] += factor * array
        rng = seeds.stream(self.seed, "noise", round=round)
        dimensions = sum(array.size for array in total.values())
        self.measured = {
            "updates_clipped": float(np.mean([moved > clip for moved in norms])) if norms else 0.0,
            "update_norm_mean": float(np.mean(norms)) if norms else 0.0,
            "release_signal_to_noise": norm(total) / (sigma * np.sqrt(dimensions)) if sigma else float("inf"),
        }
        moved = {
            key: start[key] + (array + sigma * rng.standard_normal(array.shape)) / self.ledger.cohort
            for key, array in total.items()
        }
        return [update_of(state, moved, examples=1)]

    def memory(self) -> dict[str, Any]:
        """What `go_on` takes, as JSON has it."""
        return {"rounds": self.ledger.rounds}

    def go_on(self, memory: dict[str, Any]) -> None:
        """Be as the guard was whose memory this is."""
        self.ledger.rounds = memory["rounds"]

    def spent(self) -> dict[str, float]:
        """ε so far, the same for every client, and the newest round's diagnostics."""
        return {"epsilon_max": self.ledger.epsilon(self.config.delta)} | self.measured

    def derivation(self) -> tuple[str, str, str]:
        """How z came about, as (name, value, reason)."""
        counted, config = self.ledger, self.config
        drawn = f"{config.sampling} sampling of {counted.cohort} of {counted.clients} clients"
        how = f"{config.adjacency}, {drawn}, {self.rounds} rounds"
        if config.noise_multiplier is not None:
            return "z", f"{counted.noise_multiplier:.3g}", f"privacy.noise_multiplier, {how}"
        return "z", f"{counted.noise_multiplier:.3g}", f"ε = {config.epsilon:g}, δ = {config.delta:g}, user level, {how}"
