"""`engine=ray`: clients on Ray workers, each a process with one resident base model.

A round's arrays go into the object store once, and each worker reads them from there once, however many clients it
plays. A cohort goes to whichever worker is free; where none is up, the driver plays. Where updates may be added up on
their way, a worker gets several cohorts at a time and sends back one sum. A worker that dies is replaced and
its clients are run again; since a client is a function of its message, its data and its own random streams, the numbers
do not change. With `engine.address` the workers are on the nodes of a cluster: those of a node that leaves are let go,
and those of one that joins are taken on.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlora import interrupt
from fedlora.config import Config
from fedlora.engines import cluster, cohort
from fedlora.engines.base import CLIENT_APP, OnReply
from fedlora.engines.local import WORKER_LOST, LocalGrid, adds, carrying
from fedlora.engines.pool import TICK, Pool, Seat, pool, start_ray

TURNS = 8  # times in a round that each worker gets cohorts whose updates are added up: few sums, and no long wait at the end

Unit = list[list[Message]]  # cohorts that a worker gets at a time


class RayGrid(LocalGrid):
    """Executes messages on the workers of a pool; where none of them is up, here, if they are for the project's own app.

    An app of somebody else's may end the process that it is in, so it waits for a worker, as do clients once one has died.
    """

    def __init__(
        self,
        clients: int,
        app: str,
        pool: Future[Pool],
        retries: int,
        cohort: int | None = 1,
        on_reply: OnReply = lambda count: None,
    ) -> None:
        super().__init__(clients, app, cohort, on_reply)
        self.starting, self.retries, self.ours = pool, retries, app == CLIENT_APP
        self.restarts = 0  # workers replaced so far

    def execute(self, messages: list[Message], timeout: float | None) -> Iterator[Message]:
        """Every unit of cohorts on the next free worker.

        Where its worker died `retries` + 1 times its clients are played one by one, as often, to find out whose fault it is;
        that one gets an error reply.
        """
        deadline = time.monotonic() + timeout if timeout is not None else math.inf
        waiting = deque((unit, self.retries) for unit in self._units(messages))
        references: dict[int, Any] = {}  # to the contents in the object store, by their id
        while waiting and time.monotonic() <= deadline:
            if self._up() or not self._may_play():
                yield from self._on_workers(self.starting.result(), waiting, references, deadline)
            else:
                (together, *others), retries = waiting.popleft()
                if others:
                    waiting.appendleft((others, retries))
                yield from self.play(together)

    def _units(self, messages: list[Message]) -> list[Unit]:
        """What goes to a worker at a time: a cohort, or several where their updates are added up there."""
        cohorts, size = self.cohorts(messages), 1
        if cohorts and adds(self.app, cohorts[0]):
            size = max(1, len(cohorts) // (TURNS * (self.starting.result().size if self.starting.done() else 1)))
        return [cohorts[start : start + size] for start in range(0, len(cohorts), size)]

    def _up(self) -> bool:
        """Whether a worker is free."""
        if self.starting.done():
            self.starting.result().admit()
        return self.starting.done() and bool(self.starting.result().idle)

    def _may_play(self) -> bool:
        """Whether clients may be played in this process."""
        return self.ours and not self.restarts

    def _on_workers(
        self, pool: Pool, waiting: deque[tuple[Unit, int]], references: dict[int, Any], deadline: float
    ) -> Iterator[Message]:
        """Until all are done, time is up, or no worker is left and the rest may be played here."""
        import ray

        # Messages of a round share one content object: each distinct one is stored once.
        for message in (message for unit, _ in waiting for together in unit for message in together):
            if id(message.content) not in references:
                references[id(message.content)] = ray.put(message.content)
        running: dict[Any, tuple[Seat, Unit, int]] = {}
        try:
            while waiting or running:
                pool.admit()
                while waiting and pool.idle:
                    seat, (unit, retries) = pool.idle.popleft(), waiting.popleft()
                    envelopes = [[carrying(message, RecordDict()) for message in together] for together in unit]
                    contents = [[references[id(message.content)] for message in together] for together in unit]
                    states = [self.states_of(together) for together in unit]
                    running[seat.worker.play.remote(envelopes, contents, states, self.clients)] = (seat, unit, retries)
                if waiting and not running and self._may_play():
                    return
                done = self._wait(pool, [*running, *(pool.warming if waiting else ())], deadline)
                if time.monotonic() > deadline and not done:
                    return  # those still running give no reply
                if not done or done[0] in pool.warming:
                    continue
                seat, unit, retries = running.pop(done[0])
                try:
                    replies = self.remember(*ray.get(done[0]))
                    pool.idle.append(seat)
                    yield from replies
                except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError) as error:
                    lost = pool.lost(seat, error)
                    pool.replace(seat, node_lost=lost)
                    if lost:
                        waiting.appendleft((unit, retries))
                        continue
                    self.restarts += 1
                    alone = [message for together in unit for message in together]
                    if retries:
                        waiting.appendleft((unit, retries - 1))
                    elif len(alone) > 1:
                        waiting.extendleft(([[message]], self.retries) for message in reversed(alone))
                    else:
                        times = self.retries + 1
                        reason = f"its worker died {times} time{'s'[: times - 1]} (out of memory?)"
                        yield Message(Error(WORKER_LOST, reason), reply_to=alone[0])
        finally:  # also when the run is stopped in mid-round: a busy worker is of no use to the next one
            for seat, _, _ in running.values():
                pool.replace(seat)

    @staticmethod
    def _wait(pool: Pool, watched: list[Any], deadline: float) -> list[Any]:
        """The first of these references that is ready, if one is before time is up or nodes may have joined."""
        import ray

        longest = min(deadline - time.monotonic(), math.inf if pool.kind.workers else TICK)
        if watched:
            return ray.wait(watched, num_returns=1, timeout=None if longest == math.inf else max(0.0, longest))[0]
        time.sleep(max(0.0, longest))
        return []


class RayEngine:
    """Starts Ray in the background, so that the driver can build its own part meanwhile."""

    def __init__(self, config: Config, app: str, on_reply: OnReply) -> None:
        self.config, self.app, self.on_reply = config, app, on_reply
        self.starting: Future[Pool] = Future()
        self.grid: RayGrid | None = None
        if config.engine.address is not None:
            start_ray(config.engine, app)  # now, so that a wrong address is said before any work
        self.sources = cluster.sources(config)
        threading.Thread(target=self._start, daemon=True, name="ray").start()

    def _start(self) -> None:
        try:
            start_ray(self.config.engine, self.app)
            started = pool(self.config, self.app)
            started.warm(self.config.to_json(), self.sources)
            self.starting.set_result(started)
        except BaseException as error:
            self.starting.set_exception(error)
        # Ray's processes ask the kernel to be killed when the *thread* that started them ends, so this one stays.
        threading.Event().wait()

    def run(self, drive: Callable[[Grid], object]) -> None:
        """Call `drive` with the grid; Ray may still be starting, and its workers may be warming."""
        retries = self.config.engine.retries
        self.grid = RayGrid(self.config.clients, self.app, self.starting, retries, cohort(self.config), self.on_reply)
        drive(self.grid)

    def close(self) -> None:
        """The pool stays for the next experiment of this process and ends with it; a Ray that is starting has started then.

        Not where the process is about to end, by a signal: that ends Ray too, however far it is.
        """
        if not interrupt.leaving():
            self.starting.exception()  # a quick run may be over before; another engine must not start a second one beside it


def make(config: Config, app: str, on_reply: OnReply) -> RayEngine:
    """An engine for `config.clients` clients on Ray workers; Ray begins to start at once."""
    return RayEngine(config, app, on_reply)
