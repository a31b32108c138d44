"""`engine=flower`: the same strategy and ClientApp in Flower's own simulation runtime, for comparison."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.config import Config
from fedlora.engines import OnReply, load_app, pool, resources


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
            with contextlib.suppress(KeyboardInterrupt):  # said by `run`, when the runtime has ended
                drive(self._stoppable(grid))

        workers, gpus = resources(self.config)
        pool.shutdown()  # a pool from an earlier cell of a sweep would keep Flower's actors from ever starting
        with warnings.catch_warnings(), self._orderly_stop():
            warnings.simplefilter("ignore", DeprecationWarning)
            run_simulation(
                server,
                load_app(self.app),
                num_supernodes=self.config.clients,
                backend_config={
                    # "local": else it would join a cluster that this machine happens to be a node of, and fail.
                    "init_args": {"address": "local", "num_cpus": workers, "include_dashboard": False, "log_to_driver": False},
                    "client_resources": {"num_cpus": 1, "num_gpus": gpus},
                },
            )
        pool.shutdown()
        if self.stopped.is_set():
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _orderly_stop(self) -> Iterator[None]:
        """Ctrl-C ends the server's thread, and the runtime then ends by itself.

        An exception in the middle of Flower's runtime leaves its threads behind, which crash with the Ray they still use.
        """
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handler
            yield
            return
        before = signal.signal(signal.SIGINT, lambda number, frame: self.stopped.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

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
        grid.own_clients = True  # as of `LocalGrid`, so that numbers are the same
        return grid


def make(config: Config, app: str, on_reply: OnReply) -> FlowerEngine:
    """An engine for `config.clients` SuperNodes of Flower's simulation; it has no way to count replies as they come."""
    return FlowerEngine(config, app)
