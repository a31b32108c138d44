"""What happened in a round."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

QUIET = ("refused", "client_accuracy", "untested")  # in a line only where there is something to say


@dataclass
class RoundReport:
    """What happened in one round, as the server saw it."""

    round: int
    cohort: list[int]  # clients drawn
    drops: dict[int, str] = field(default_factory=dict)  # client → why its update was not used
    refused: dict[int, str] = field(default_factory=dict)  # node that is no client → why
    bytes_up: int = 0
    bytes_down: int = 0
    seconds_train: float = 0.0  # from handing the messages to the grid to having the replies
    seconds_merge: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    client_accuracy: dict[int, float] = field(default_factory=dict)  # of the clients that tested the model in this round
    untested: dict[int, str] = field(default_factory=dict)  # client → why its test of the model was not taken
    sent_at: float = 0.0  # time.perf_counter() when the messages were handed to the grid

    def as_row(self, started: float) -> dict[str, Any]:
        """The round as a line of rounds.jsonl; `started` is the run's own time.perf_counter()."""
        row = {name: value for name, value in asdict(self).items() if value or name not in QUIET}
        metrics, sent_at = row.pop("metrics"), row.pop("sent_at")
        return row | metrics | {"started": sent_at - started}
