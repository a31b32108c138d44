"""What every client has spent: {client: {(σ, q): steps}}, written ahead of use so that a crash never under-counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora.privacy.accounting import History, epsilon


class Ledger:
    """The steps of every client by noise multiplier and sampling rate; equal keys are merged."""

    def __init__(self) -> None:
        self._spent: dict[int, History] = {}

    def __iter__(self) -> Iterator[int]:
        """The clients that have spent anything, in order."""
        return iter(sorted(self._spent))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._spent == other._spent

    def history(self, client: int) -> History:
        """A copy of what a client has spent; empty for one that has not."""
        return dict(self._spent.get(client, {}))

    def spend(self, client: int, noise_multiplier: float, rate: float, steps: int) -> None:
        """Count `steps` steps of a client."""
        history = self._spent.setdefault(client, {})
        key = (float(noise_multiplier), float(rate))
        history[key] = history.get(key, 0) + steps

    def epsilon(self, client: int, delta: float, accountant: str = "prv") -> float:
        """The ε that a client has spent at δ; 0 for one that has spent nothing."""
        return epsilon(self.history(client), delta, accountant)

    def epsilons(self, delta: float, accountant: str = "prv") -> dict[int, float]:
        """Client → ε. Clients with the same history cost one evaluation, which the accountant remembers."""
        return {client: self.epsilon(client, delta, accountant) for client in self}

    def would_exceed(
        self,
        client: int,
        noise_multiplier: float,
        rate: float,
        steps: int,
        budget: float,
        delta: float,
        accountant: str = "prv",
    ) -> bool:
        """Whether these steps would bring a client above its budget ε. Nothing is counted."""
        ahead = Ledger()
        ahead._spent[client] = self.history(client)
        ahead.spend(client, noise_multiplier, rate, steps)
        return ahead.epsilon(client, delta, accountant) > budget

    def to_json(self) -> str:
        """The ledger as JSON; `from_json` gives back an equal one, to the last bit of every σ and q."""
        rows: dict[str, list[dict[str, Any]]] = {
            str(client): [
                {"noise_multiplier": sigma, "sampling_rate": rate, "steps": steps}
                for (sigma, rate), steps in sorted(self._spent[client].items())
            ]
            for client in self
        }
        return json.dumps(rows, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The inverse of `to_json`."""
        ledger = cls()
        for client, rows in json.loads(text).items():
            for row in rows:
                ledger.spend(int(client), row["noise_multiplier"], row["sampling_rate"], row["steps"])
        return ledger

    def save(self, path: Path) -> None:
        """Write the ledger to a file."""
        path.write_text(self.to_json() + "\n", encoding="utf-8")
