"""The clients whose sum was once unmasked, which no other sum of the same vectors may be unmasked for.

Sums over S and over S without k differ by the vector of k. A client's vector is the same where it starts from the same
broadcast, since its data and batches are the same then; fresh masks hide none of that. So the first set of clients stays.

    a line of JSON for each sum: experiment, round, start, clients; on disk before anything that unmasks leaves
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from fedlora import disk
from fedlora.check import ConfigError, RunError


class Unmasked(NamedTuple):
    """One sum."""

    experiment: str
    round: int
    start: str  # a digest of what the clients started from
    clients: list[int]  # sorted

    @classmethod
    def read(cls, line: dict[str, Any]) -> Unmasked:
        """Raises ValueError, KeyError or TypeError for another line than `_asdict` makes."""
        clients = [int(client) for client in line["clients"]]
        return cls(str(line["experiment"]), int(line["round"]), str(line["start"]), clients)

    def repeats(self, experiment: str, round: int, start: str) -> bool:
        """Whether a sum is of the same round, or of clients that start from the same in any round."""
        return self.start == start or (self.experiment, self.round) == (experiment, round)


class Sets:
    """The sets of one server, or of one device, in a file."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. Raises ConfigError where that is damaged; a last line that was cut off never counted."""
        self.path = path
        try:
            content = path.read_bytes() if path.exists() else b""
            self._whole = content.rfind(b"\n") + 1
            self._sums = [Unmasked.read(json.loads(line)) for line in content[: self._whole].splitlines()]
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise ConfigError(
                f"{path} is damaged ({str(error)[:200]}), so which secure sums were unmasked is unknown; restore the file"
            ) from error

    def first(self, experiment: str, round: int, start: str) -> list[int] | None:
        """The clients of the sum of that round, or from that start in any round; None: there was none."""
        return next((list(sum.clients) for sum in self._sums if sum.repeats(experiment, round, start)), None)

    def note(self, experiment: str, round: int, start: str, clients: list[int]) -> None:
        """Put the set on disk; when this returns the sum may be unmasked.

        Raises RunError for another set than the first one, and where it cannot be written.
        """
        new = Unmasked(experiment, round, start, sorted(clients))
        for old in self._sums:
            if old.repeats(experiment, round, start) and old.clients != new.clients:
                raise RunError(
                    f"round {round}: the same changes were summed for clients {_names(old.clients)} before, and a sum for "
                    f"clients {_names(new.clients)} would lay those of single clients open; take it again with the first "
                    "clients, or begin anew with another seed"
                )
        if new not in self._sums:
            self._append(new)

    def _append(self, new: Unmasked) -> None:
        try:
            with open(self.path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.truncate(self._whole)  # of a line that was cut off
                file.write(json.dumps(new._asdict()).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                self._whole = file.tell()
            disk.flush_names(self.path.parent)
        except OSError as error:
            raise RunError(f"cannot write {self.path} ({error.strerror}), so no secure sum is unmasked") from error
        self._sums.append(new)


def _names(clients: list[int]) -> str:
    return ", ".join(map(str, clients))
