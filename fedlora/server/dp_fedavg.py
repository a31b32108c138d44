"""User-level privacy (DP-FedAvg; McMahan et al., 2018): whole clients are protected, by the server.

    Δ_k = what client k sent − what was broadcast
    released = (Σ_k Δ_k · min(1, S / ‖Δ_k‖) + N(0, (zS)² I)) / m,    m the expected cohort

Clip and noise act on exactly what the server receives, before `merge`, so every strategy composes with it: it merges the one
update that the release amounts to. A strategy that needs each client's factors (LoRA-FAIR) then has nothing to correct.

Noise and cohorts come from keys that no client knows (`key`). On devices they are the operating system's, new for every
release: a round that is taken again is another release, and is counted as one. In a simulation they follow from the seed and
from all settings, so that a run can be repeated, and so that no two runs of a sweep have the same noise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlora import disk, seeds
from fedlora.arrays.messages import ServerState, Update, norm, trained_arrays, update_of
from fedlora.check import ConfigError, RunError
from fedlora.config import Config
from fedlora.privacy import ledger
from fedlora.privacy.user_level import user_epsilon, user_noise_multiplier
from fedlora.server import participation


@dataclass
class UserLedger:
    """Everything that the ε of a user-level run depends on; the same for every client."""

    noise_multiplier: float  # z
    clients: int
    cohort: int  # expected size m
    sampling: str  # poisson, fixed or none
    rounds: int = 0  # released so far, each as often as it was taken with other noise
    adjacency: str = "add_remove"

    def epsilon(self, delta: float) -> float:
        """ε spent at δ by every client, whether it was drawn or not."""
        arguments = (self.noise_multiplier, self.clients, self.cohort, self.rounds, delta, self.sampling)
        return user_epsilon(*arguments, self.adjacency)

    def at_least(self, other: UserLedger) -> UserLedger:
        """This one with the larger count of the two. Raises ConfigError where the other is not of the same mechanism."""
        larger = UserLedger(**asdict(self) | {"rounds": max(self.rounds, other.rounds)})
        if asdict(larger) != asdict(other) | {"rounds": larger.rounds}:
            raise ledger.unknown("the privacy ledger counts rounds with other noise or other cohorts than this run has")
        return larger

    def save(self, path: Path) -> None:
        """Replace the file in one move; it never counts less than before, since a run that is continued takes rounds again."""
        counted = self.at_least(UserLedger.load(path)) if path.exists() else self
        ledger.write(path, disk.sealed(asdict(counted)))

    @classmethod
    def load(cls, path: Path) -> UserLedger:
        """The ledger in the file; raises ConfigError if it cannot be read or is not as it was written."""
        try:
            return cls(**disk.unsealed(ledger.read(path)))
        except (ValueError, TypeError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ledger.unknown(f"the privacy ledger {path} is damaged ({error})") from error


class UserGuard:
    """Draws each round's cohort, releases its sum, and keeps the ledger, written ahead.

    `save` is called with the ledger before anything of a round is sent. What `before` has counted stays counted: releases
    with noise that rounds taken again do not have again. `identity` is the digest of the run's settings: it keys the draws of a
    simulation.
    """

    noise_multipliers: list[float] = []  # clients add none; the server does

    def __init__(
        self, config: Config, identity: str, save: Callable[[UserLedger], None], before: UserLedger | None = None
    ) -> None:
        self.config, self.run, self.identity, self.save = config.privacy, config, identity, save
        arguments = (
            config.clients, config.cohort_size, config.rounds, self.config.delta, self.config.sampling, self.config.adjacency
        )  # fmt: skip
        z = self.config.noise_multiplier
        if z is None:
            assert self.config.epsilon is not None  # the configuration was checked
            z = user_noise_multiplier(self.config.epsilon, *arguments)
        self.ledger = UserLedger(z, config.clients, config.cohort_size, self.config.sampling, adjacency=self.config.adjacency)
        if before is not None:
            self.ledger = self.ledger.at_least(before)
        self.measured: dict[str, float] = {}  # of the newest round, for diagnosis; not private

    def draw(self, round: int, clients: list[int], size: int) -> list[int]:
        """The round's cohort, which nobody but the server knows before the messages are sent."""
        return participation.draw_secretly(self.key("cohort", round), clients, size, self.config.sampling == "poisson")

    def admit(self, round: int, cohort: list[int]) -> list[int]:
        """The whole cohort; the round is in the ledger when this returns. Raises RunError where the budget is spent."""
        if self.config.epsilon is not None and self.ledger.rounds >= self.run.rounds:
            raise RunError(
                f"round {round}: privacy.epsilon={self.config.epsilon:g} is spent: z was derived for rounds="
                f"{self.run.rounds} releases, and a round that is repeated counts again; the run ends here"
            )
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
        noise = seeds.Stream(self.key("release", round, z, clip))
        dimensions = sum(array.size for array in total.values())
        self.measured = {
            "updates_clipped": float(np.mean([moved > clip for moved in norms])) if norms else 0.0,
            "update_norm_mean": float(np.mean(norms)) if norms else 0.0,
            "release_signal_to_noise": norm(total) / (sigma * np.sqrt(dimensions)) if sigma else float("inf"),
        }
        moved = {
            key: start[key] + (array + sigma * noise.standard_normal(array.shape)) / self.ledger.cohort
            for key, array in total.items()
        }
        return [update_of(state, moved, examples=1)]

    def key(self, purpose: str, round: int, *more: float) -> bytes:
        """The key of one draw, of 32 bytes: on devices never the same, in a simulation one for each run and round."""
        if self.run.deploy:
            return os.urandom(32)
        return seeds.private_key(purpose, self.run.seed, round, self.identity, *more)

    def memory(self) -> dict[str, Any]:
        """What `go_on` takes, as JSON has it."""
        return {"rounds": self.ledger.rounds}

    def go_on(self, memory: dict[str, Any]) -> None:
        """Be as the guard was whose memory this is; what was counted before this one began stays counted."""
        self.ledger.rounds = max(self.ledger.rounds, int(memory["rounds"]))

    def spent(self) -> dict[str, float]:
        """ε so far, the same for every client, and the newest round's diagnostics."""
        return {"epsilon_max": self.ledger.epsilon(self.config.delta)} | self.measured

    def derivation(self) -> tuple[str, str, str]:
        """How z came about, as (name, value, reason)."""
        counted, config = self.ledger, self.config
        drawn = f"{config.sampling} sampling of {counted.cohort} of {counted.clients} clients"
        how = f"{config.adjacency}, {drawn}, {self.run.rounds} rounds"
        if config.noise_multiplier is not None:
            return "z", f"{counted.noise_multiplier:.3g}", f"privacy.noise_multiplier, {how}"
        return "z", f"{counted.noise_multiplier:.3g}", f"ε = {config.epsilon:g}, δ = {config.delta:g}, user level, {how}"
