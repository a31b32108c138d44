"""`engine=flower`: the same strategy and ClientApp in Flower's own simulation runtime, for comparison."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora import interrupt
from fedlora.config import Config
from fedlora.engines import pool
from fedlora.engines.base import OnReply, load_app


class FlowerEngine:
    """Runs `drive` as the main function of a ServerApp under `run_simulation`.

    The runtime has a thread to itself, in which no Ctrl-C is ever raised: an exception in the middle of it would leave its
    threads behind, which crash with the Ray they still use. The server's thread looks for Ctrl-C at each of its polls.
    """

    def __init__(self, config: Config, app: str) -> None:
        self.config, self.app = config, app
        self.stopped = threading.Event()
        self.driving = threading.Lock()
        self.ended: Future[None] = Future()

    def run(self, drive: Callable[[Grid], object]) -> None:
        """Start Flower's runtime, drive it, and pass on an exception of either side, Ctrl-C included."""
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            with self.driving:
                try:
                    if not self.stopped.is_set():
                        drive(self._stoppable(grid))
                except KeyboardInterrupt:  # said by `run`, when the runtime has ended
                    self.stopped.set()
            if self.stopped.is_set() and interrupt.leaving():
                self._end()  # the process ends, and the runtime with it

        pool.shutdown()  # a pool from an earlier cell of a sweep would keep Flower's actors from ever starting
        threading.Thread(target=self._simulate, args=(server,), daemon=True, name="flower").start()
        try:
            self.ended.result()
        except KeyboardInterrupt:
            self.stopped.set()
            with self.driving:  # whoever saves what there is has it to himself
                pass
            if not interrupt.leaving():
                self.ended.result()
        if self.stopped.is_set():
            raise KeyboardInterrupt

    def _simulate(self, server: ServerApp) -> None:
        from flwr.simulation import run_simulation

        error = None
        try:
            workers, gpus = pool.resources(self.config)
            pool.start_own(workers)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                run_simulation(
                    server,
                    load_app(self.app),
                    num_supernodes=self.config.clients,
                    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": gpus}},
                )
            pool.shutdown()
        except BaseException as raised:
            error = raised
        self._end(error)

    def _end(self, error: BaseException | None = None) -> None:
        """Let `run` return, if nothing has yet."""
        with contextlib.suppress(InvalidStateError):
            self.ended.set_exception(error) if error else self.ended.set_result(None)

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
