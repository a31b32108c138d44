"""The ledger: what every client has spent, as counts of noisy steps, from which ε follows for any δ.

Write ahead: `spend` and `save` come before the result of a step is used, so that a crash can count a step that nobody has
seen, and never miss one that somebody has.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedlora import check, disk
from fedlora.check import ConfigError, RunError
from fedlora.privacy import accounting
from fedlora.privacy.accounting import History


class Ledger:
    """client → {(noise multiplier σ, sampling rate q): steps}."""

    def __init__(self, spent: Mapping[int, History] | None = None):
        self._spent: dict[int, History] = {}
        for client, history in (spent or {}).items():
            for (sigma, rate), steps in history.items():
                self.spend(client, sigma, rate, steps)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._spent == other._spent

    def __repr__(self) -> str:
        return f"Ledger({self._spent})"

    def __iter__(self) -> Iterator[int]:
        """The clients that have spent something, in rising order."""
        return iter(sorted(self._spent))

    def spend(self, client: int, noise_multiplier: float, rate: float, steps: int) -> None:
        """Add `steps` steps of `client`; equal (σ, q) are counted together. Nothing is kept of 0 steps or σ = inf."""
        check.not_negative(**{"privacy.noise_multiplier": noise_multiplier})
        check.fraction(**{"sampling rate": rate})
        check.between(0, accounting.MOST_STEPS, steps=operator.index(steps))
        if steps and noise_multiplier < math.inf:
            history = self._spent.setdefault(operator.index(client), {})
            key = float(noise_multiplier), float(rate)
            history[key] = history.get(key, 0) + operator.index(steps)

    def history(self, client: int) -> History:
        """A copy of what `client` has spent; empty for a client that has not trained."""
        return dict(self._spent.get(client, {}))

    def epsilon(self, client: int, delta: float, accountant: str = "prv", adjacency: str = "add_remove") -> float:
        """The ε that `client` has spent at `delta`: 0 if it has not trained, inf after a step without noise."""
        return accounting.epsilon(self.history(client), delta, accountant, adjacency)

    def epsilons(self, delta: float, accountant: str = "prv", adjacency: str = "add_remove") -> dict[int, float]:
        """client → ε spent, for every client that has spent something; equal histories are evaluated once."""
        return {client: self.epsilon(client, delta, accountant, adjacency) for client in self}

    def after(self, client: int, noise_multiplier: float, rate: float, steps: int) -> Ledger:
        """The ledger of `client` alone, after `steps` more steps."""
        planned = Ledger({client: self.history(client)})
        planned.spend(client, noise_multiplier, rate, steps)
        return planned

    def would_exceed(
        self,
        client: int,
        noise_multiplier: float,
        rate: float,
        steps: int,
        budget: float,
        delta: float,
        accountant: str = "prv",
        adjacency: str = "add_remove",
    ) -> bool:
        """Whether `client` would be above the ε of `budget` after `steps` more steps.

        RDP, which is quick for a (σ, q) seen before, settles most cases: what is far enough below it is below PRV too. It
        bounds no replacing of records.
        """
        planned = self.after(client, noise_multiplier, rate, steps)
        if adjacency == "add_remove" and planned.epsilon(client, delta, "rdp") <= budget - 2 * accounting.PRV_ERROR:
            return False
        return planned.epsilon(client, delta, accountant, adjacency) > budget

    def merge(self, other: Ledger) -> None:
        """Add what `other` holds; merging the same ledger twice counts it twice."""
        for client, history in other._spent.items():
            for (sigma, rate), steps in history.items():
                self.spend(client, sigma, rate, steps)

    def to_json(self) -> str:
        """JSON by client, every float with all its digits."""
        rows = {
            client: [
                {"noise_multiplier": sigma, "sampling_rate": rate, "steps": steps}
                for (sigma, rate), steps in sorted(self._spent[client].items())
            ]
            for client in self
        }
        return json.dumps(rows, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The inverse of `to_json`; raises ConfigError for anything else, since a wrong ledger would understate ε."""
        ledger = cls()
        try:
            for client, rows in json.loads(text).items():
                for row in rows:
                    ledger.spend(int(client), row["noise_multiplier"], row["sampling_rate"], row["steps"])
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            raise unknown(f"the privacy ledger is damaged ({repr(error)[:200]})") from error
        return ledger

    def at_least(self, other: Ledger) -> Ledger:
        """The larger count of the two, for each client and (σ, q): both count the same run, one of them further."""
        larger = Ledger(self._spent)
        for client, history in other._spent.items():
            for (sigma, rate), steps in history.items():
                larger.spend(client, sigma, rate, max(0, steps - self._spent.get(client, {}).get((sigma, rate), 0)))
        return larger

    def save(self, path: str | os.PathLike[str]) -> None:
        """Replace the file in one move; when this returns, the new one is on disk.

        It never counts less than before: a run that is continued takes rounds again that are in the file already.
        """
        path = Path(path)
        counted = self.at_least(Ledger.load(path)) if path.exists() else self
        write(path, counted.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Ledger:
        """The ledger in the file; raises ConfigError if it cannot be read, for an absent ledger is not an empty one."""
        return cls.from_json(read(Path(path)))


def write(path: Path, text: str) -> None:
    """Put a ledger on disk in one move; raises RunError where that cannot be done."""
    try:
        disk.write(path, (text + "\n").encode())
    except OSError as error:
        reason = f"cannot write the privacy ledger {path} ({error.strerror})"
        raise RunError(f"{reason}; the run stops before it spends more than is written down") from error


def read(path: Path) -> str:
    """The text of a ledger; raises ConfigError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unknown(f"cannot read the privacy ledger {path} ({getattr(error, 'strerror', error)})") from error


def unknown(what: str) -> ConfigError:
    """The error for a ledger that does not say what was spent."""
    return ConfigError(f"{what}, so what was spent is unknown; restore the file or start a new run")
