"""Record-level privacy of a whole run: which noise each client needs, what it has spent, and when it stops.

Neighbours differ in one record of one client, by `privacy.adjacency`: it adds nothing (`add_remove`), or is another one
(`replace`). The server and everybody on the wire see every message. A client's ε
composes over the steps that it takes itself. The sizes of clients and the schedule of participation count as public.
Aggregation is post-processing and costs nothing; choosing settings or a round by looking at private data is not covered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.check import RunError
from fedlora.config import PrivacyConfig
from fedlora.privacy.calibration import calibrate
from fedlora.privacy.ledger import Ledger


@dataclass(frozen=True)
class Client:
    """What the privacy of one client depends on, all of it public."""

    rate: float  # q, the probability with which a step takes each record
    steps: int  # in each round that it takes part in
    rounds: int  # in which the schedule draws it


class Guard:
    """Keeps the ledger of a simulated run, written ahead of every round, and lets nobody past its budget.

    `save` is called with the ledger whenever it has changed, before anything is sent. `before` is what is spent already, for
    good: noise that rounds taken again do not have again. What they spend twice then goes off the rounds to come.
    """

    release = None  # what a client sends is private already
    draw = None  # the seed does, in public

    def __init__(
        self,
        config: PrivacyConfig,
        clients: list[Client],
        rounds: int,
        fraction: float,
        save: Callable[[Ledger], None],
        before: Ledger | None = None,
    ) -> None:
        self.config, self.clients, self.save = config, clients, save
        self.before = before or Ledger()
        self.ledger = Ledger().at_least(self.before)
        self.noise_multipliers = noise_multipliers(config, clients, rounds, fraction)
        # σ that was derived from the schedule meets the budget by itself; a σ that was given, or a round taken twice, may not.
        twice = self.before != Ledger() and config.participation != "expected"
        self.limit = config.epsilon if config.noise_multiplier is not None or twice else None
        self.stops: dict[int, str] = {}  # of the newest round: client → why it takes part no more
        self.stopped: set[int] = set()
        self._epsilons = np.zeros(len(clients))  # spent, but by the clients of `_outdated`
        self._outdated = set(self.ledger)

    def admit(self, round: int, cohort: list[int]) -> list[int]:
        """The clients of the cohort whose budget allows this round; their steps are in the ledger when this returns.

        Raises RunError where there are none.
        """
        self.stops = {
            client: self._why(client) for client in cohort if client not in self.stopped and self._would_exceed(client)
        }
        self.stopped |= self.stops.keys()
        allowed = [client for client in cohort if client not in self.stopped]
        for client in allowed:
            self.ledger.spend(client, self.noise_multipliers[client], self.clients[client].rate, self.clients[client].steps)
        self._outdated |= set(allowed)
        self.save(self.ledger)
        if not allowed:
            new = "".join(f"; client {client} {why}" for client, why in list(self.stops.items())[:3])
            raise RunError(
                f"round {round}: no drawn client may take part any more{new}; raise privacy.epsilon or "
                "privacy.noise_multiplier, or take fewer rounds"
            )
        return allowed

    def memory(self) -> dict[str, Any]:
        """What `go_on` takes, as JSON has it."""
        return {"ledger": self.ledger.to_json(), "stopped": sorted(self.stopped)}

    def go_on(self, memory: dict[str, Any]) -> None:
        """Be as the guard was whose memory this is."""
        self.ledger = Ledger.from_json(memory["ledger"]).at_least(self.before)
        self.stopped = set(memory["stopped"])
        self._outdated = set(self.ledger)

    def spent(self) -> dict[str, Any]:
        """ε spent so far over all clients, those that never took part at 0: largest, quartiles; and who stopped."""
        for client in self._outdated:
            self._epsilons[client] = self._epsilon(client)
        self._outdated.clear()
        quartiles = np.quantile(self._epsilons, [0.25, 0.5, 0.75], method="inverted_cdf")
        names = ("epsilon_lower_quartile", "epsilon_median", "epsilon_upper_quartile")
        measured = {name: float(value) for name, value in zip(names, quartiles, strict=True)}
        stops = {"clients_stopped": len(self.stopped), "stops": self.stops}
        return {"epsilon_max": float(self._epsilons.max())} | measured | stops

    def derivation(self) -> tuple[str, str, str]:
        """How σ came about, as (name, value, reason): «σ: 1.21  (ε = 3, δ = 1e-05, add_remove, q = 0.2, …)»."""
        config = self.config
        active = [i for i, client in enumerate(self.clients) if client.rounds]
        q = _span([self.clients[i].rate for i in active])
        sigma = _span([self.noise_multipliers[i] for i in active])
        if config.noise_multiplier is not None:
            stop = f", clients stop at ε = {config.epsilon:g}" if config.epsilon is not None else ""
            return "σ", sigma, f"privacy.noise_multiplier, {config.adjacency}, q = {q}{stop}"
        steps = _span([self.clients[i].steps * self.clients[i].rounds for i in active])
        label = {
            "schedule": f"{steps} steps by the schedule",
            "worst": "as if drawn in every round",
            "expected": f"for the expected participation; NOT A GUARANTEE: {steps} steps are really taken",
        }[config.participation]
        claim = f"ε = {config.epsilon:g}, δ = {config.delta:g}, {config.adjacency}"
        reason = f"{claim}, q = {q}, {label}, {config.accountant.upper()}"
        return "σ", sigma, reason

    def _would_exceed(self, client: int) -> bool:
        if self.limit is None:
            return False
        which = self.clients[client]
        arguments = (client, self.noise_multipliers[client], which.rate, which.steps, self.limit, self.config.delta)
        return self.ledger.would_exceed(*arguments, self.config.accountant, self.config.adjacency)

    def _epsilon(self, client: int) -> float:
        return self.ledger.epsilon(client, self.config.delta, self.config.accountant, self.config.adjacency)

    def _why(self, client: int) -> str:
        steps = self.clients[client].steps
        spent = f"has spent ε = {self._epsilon(client):.4g}"
        return f"{spent}, and {steps} more steps would take it above privacy.epsilon={self.limit:g}"


def noise_multipliers(config: PrivacyConfig, clients: list[Client], rounds: int, fraction: float) -> list[float]:
    """σ of every client: the one that is set, or the one that spends `config.epsilon` over the client's steps.

    | participation | steps that σ is derived for                                                            |
    |---------------|----------------------------------------------------------------------------------------|
    | schedule      | those of the rounds that the seed draws the client in: exact                            |
    | worst         | those of all rounds                                                                    |
    | expected      | those of rounds · fraction, as published code has it: who is drawn more often overspends |

    A client that is never drawn sends nothing; its σ is that of a single round.
    """
    if config.noise_multiplier is not None:
        return [config.noise_multiplier] * len(clients)
    assert config.epsilon is not None  # the configuration was checked
    jobs = {
        number: (client.rate, client.steps * rounds_counted(config.participation, client.rounds, rounds, fraction))
        for number, client in enumerate(clients)
    }
    sigmas = calibrate(config.epsilon, config.delta, jobs, config.accountant, config.adjacency)
    return [sigmas[number] for number in range(len(clients))]


def rounds_counted(participation: str, drawn: int, rounds: int, fraction: float) -> int:
    """The rounds that σ is derived for, of a client that the schedule draws in `drawn` of them; see `noise_multipliers`."""
    return max(1, {"worst": rounds, "expected": round(rounds * fraction)}.get(participation, drawn))


def _span(values: list[float] | list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if math.isclose(low, high, rel_tol=5e-4) else f"{low:.3g} to {high:.3g}"
