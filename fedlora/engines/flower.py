"""`engine=flower`: the same strategy and ClientApp in Flower's own simulation runtime, for comparison."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import Config
from fedlora.engines import OnReply, load_app, ray, resources


class FlowerEngine:
    """Runs `drive` as the main function of a ServerApp under `run_simulation`."""

    def __init__(self, config: Config, app: str) -> None:
        self.config, self.app = config, app
        self.stopped = threading.Event()

    def run(self, drive: Callable[[Grid], object]) -> None:
        """Start Flower's runtime, drive it, and pass on an exception of either side, Ctrl-C included."""
        from flwr.simulation import run_simulation

        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            drive(self._stoppable(grid))

        workers, gpus = resources(self.config)
        ray.shutdown()  # a pool from an earlier cell of a sweep would keep Flower's actors from ever starting
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                run_simulation(
                    server,
                    load_app(self.app),
                    num_supernodes=self.config.clients,
                    backend_config={
                        "init_args": {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False},
                        "client_resources": {"num_cpus": 1, "num_gpus": gpus},
                    },
                )
            finally:
                self.stopped.set()
                ray.shutdown()

    def close(self) -> None:
        """Flower ends its own workers."""

    def _stoppable(self, grid: Any) -> Any:
        """The server thread of the runtime does not see Ctrl-C; it looks here at each of its polls instead."""
        pull = grid.pull_messages

        def pull_messages(message_ids: Any) -> Any:
            if self.stopped.is_set():
                raise KeyboardInterrupt
            return pull(message_ids)

        grid.pull_messages = pull_messages
        return grid


def make(config: Config, app: str, on_reply: OnReply) -> FlowerEngine:
    """An engine for `config.clients` SuperNodes of Flower's simulation; it has no way to count replies as they come."""
    return FlowerEngine(config, app)
