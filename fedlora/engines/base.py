"""What an engine offers, and the ClientApp that it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from flwr.serverapp import Grid

CLIENT_APP = "clients.app:app"
OnReply = Callable[[int], None]  # called with the number of replies of the running round, where the engine can tell


class Engine(Protocol):
    """What an engine must offer."""

    def run(self, drive: Callable[[Grid], object]) -> None:
        """Call `drive` with a grid on which every client of the federation is a node."""

    def close(self) -> None:
        """Give back what is not worth keeping for another run in this process."""


def load_app(app: str) -> Any:
    """The ClientApp at `module:name`. It must be in an importable module: one in __main__ is unknown to a worker."""
    module, _, name = app.partition(":")
    return getattr(importlib.import_module(module), name)
