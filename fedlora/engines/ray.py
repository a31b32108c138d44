"""`engine=ray`: clients on Ray workers, each a process with one resident base model.

A round's arrays go into the object store once, and each worker reads them from there once, however many clients it
plays. A cohort goes to whichever worker is free; until the first one is up, the driver plays. A worker that dies is
replaced and its clients are run again; since a client is a function of its message, its data and its own random streams,
the numbers do not change.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedlora.config import Config
from fedlora.engines import CLIENT_APP, OnReply, cohort, load_app, resources
from fedlora.engines.local import WORKER_LOST, LocalGrid, carrying, play


class Worker:
    """A Ray actor: a process that plays one cohort at a time."""

    def __init__(self, app: str) -> None:
        self.app = load_app(app)
        self.held: dict[Any, Any] = {}  # the contents of the newest messages, by reference

    def warm(self, experiment: str) -> int:
        """Build the workbench before the first client asks for it; returns the process id."""
        from fedlora import workbench

        bench = workbench.build_from(experiment)
        assert bench.rows is not None  # encodes the examples and tries them
        return os.getpid()

    def play(
        self, batch: list[Message], contents: list[Any], states: list[RecordDict | None], clients: int
    ) -> tuple[list[Message], list[RecordDict | None]]:
        """The ClientApp's replies, and what each client keeps.

        `contents` has a reference for each message; in a list, Ray does not take their values.
        """
        import ray

        self.held = {key: self.held[key] if key in self.held else ray.get(key) for key in dict.fromkeys(contents)}
        carried = [carrying(m, self.held[key]) for m, key in zip(batch, contents, strict=True)]
        return play(self.app, carried, states, clients)


class Pool:
    """The workers of this process, kept from one experiment of a sweep to the next."""

    def __init__(self, app: str, workers: int, gpus: float) -> None:
        import ray

        self.kind = (app, workers, gpus)
        self.actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Worker)
        self.idle = deque(self.actor.remote(app) for _ in range(workers))
        self.warming: dict[Any, Any] = {}  # reference to the end of it → worker

    def warm(self, experiment: str) -> None:
        """Let every worker build what the experiment needs; `admit` says when."""
        while self.idle:
            worker = self.idle.popleft()
            self.warming[worker.warm.remote(experiment)] = worker

    def admit(self, timeout: float | None = 0.0) -> None:
        """Workers that are warm become idle; waits for the first one, `timeout` seconds at most, where there is none."""
        import ray

        if self.warming:
            ready, _ = ray.wait(list(self.warming), num_returns=len(self.warming), timeout=0.0)
            if not ready and not self.idle and timeout != 0.0:
                ready, _ = ray.wait(list(self.warming), num_returns=1, timeout=timeout)
            self.idle.extend(self.warming.pop(reference) for reference in ready)

    def replace(self, dead: Any) -> Any:
        """A new worker in the place of one that died or hangs."""
        import ray

        ray.kill(dead)
        return self.actor.remote(self.kind[0])

    def stop(self) -> None:
        """End all workers."""
        import ray

        for worker in (*self.idle, *self.warming.values()):
            ray.kill(worker)
        self.idle.clear()
        self.warming.clear()


_pool: Pool | None = None


def pool(app: str, workers: int, gpus: float) -> Pool:
    """The pool of this process, made anew where another one is asked for."""
    global _pool
    if _pool is None or _pool.kind != (app, workers, gpus) or len(_pool.idle) + len(_pool.warming) < workers:
        if _pool is not None:
            _pool.stop()
        _pool = Pool(app, workers, gpus)
    return _pool


def shutdown() -> None:
    """End the workers of this process and its Ray, for an engine that wants the cores and starts a Ray of its own."""
    global _pool
    import ray

    if _pool is not None:
        _pool.stop()
        _pool = None
    ray.shutdown()


class RayGrid(LocalGrid):
    """Executes messages on the workers of a pool; until the first of them is up, here, if they are for the project's own app.

    An app of somebody else's may end the process that it is in, so it waits for one of its own.
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
        """Every cohort on the next free worker.

        Where its worker died `retries` + 1 times its clients are played one by one, as often, to find out whose fault it is;
        that one gets an error reply.
        """
        deadline = time.monotonic() + timeout if timeout is not None else math.inf
        waiting = deque((together, self.retries) for together in self.cohorts(messages))
        while waiting and self.ours and not self._up():
            yield from self.play(waiting.popleft()[0])
            if time.monotonic() > deadline:
                return
        if waiting:
            yield from self._on_workers(self.starting.result(), waiting, deadline)

    def _up(self) -> bool:
        """Whether a worker is free."""
        if self.starting.done():
            self.starting.result().admit()
        return self.starting.done() and bool(self.starting.result().idle)

    def _on_workers(self, pool: Pool, waiting: deque[tuple[list[Message], int]], deadline: float) -> Iterator[Message]:
        import ray

        # Messages of a round share one content object: each distinct one is stored once.
        stored = {id(message.content): message.content for together, _ in waiting for message in together}
        references = {key: ray.put(content) for key, content in stored.items()}
        running: dict[Any, tuple[Any, list[Message], int]] = {}

        def left() -> float | None:
            return None if deadline == math.inf else max(0.0, deadline - time.monotonic())

        try:
            while waiting or running:
                pool.admit(0.0 if running else left())
                while waiting and pool.idle:
                    worker, (together, retries) = pool.idle.popleft(), waiting.popleft()
                    envelopes = [carrying(message, RecordDict()) for message in together]
                    contents = [references[id(message.content)] for message in together]
                    reference = worker.play.remote(envelopes, contents, self.states_of(together), self.clients)
                    running[reference] = (worker, together, retries)
                watched = [*running, *(pool.warming if waiting else ())]
                done, _ = ray.wait(watched, num_returns=1, timeout=left())
                if not done:
                    return  # out of time: those still running give no reply
                if done[0] in pool.warming:
                    continue
                worker, together, retries = running.pop(done[0])
                try:
                    replies = self.remember(*ray.get(done[0]))
                    pool.idle.append(worker)
                    yield from replies
                except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                    pool.idle.append(pool.replace(worker))
                    self.restarts += 1
                    if retries:
                        waiting.appendleft((together, retries - 1))
                    elif len(together) > 1:
                        waiting.extendleft(([message], self.retries) for message in reversed(together))
                    else:
                        times = self.retries + 1
                        reason = f"its worker died {times} time{'s'[: times - 1]} (out of memory?)"
                        yield Message(Error(WORKER_LOST, reason), reply_to=together[0])
        finally:  # also when the run is stopped in mid-round: a busy worker is of no use to the next one
            for worker, _, _ in running.values():
                pool.idle.append(pool.replace(worker))


class RayEngine:
    """Starts Ray in the background, so that the driver can build its own part meanwhile."""

    def __init__(self, config: Config, app: str, on_reply: OnReply) -> None:
        self.config, self.app, self.on_reply = config, app, on_reply
        self.starting: Future[Pool] = Future()
        self.grid: RayGrid | None = None
        threading.Thread(target=self._start, daemon=True, name="ray").start()

    def _start(self) -> None:
        try:
            start_ray(self.config.engine.workers or 0)
            started = pool(self.app, *resources(self.config))
            started.warm(self.config.to_json())
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
        """The pool stays for the next experiment of this process and ends with it; a Ray that is starting has started then."""
        self.starting.exception()  # a quick run may be over before; another engine must not start a second one beside it


def start_ray(workers: int) -> None:
    """A Ray of this process's own with room for so many one-core workers; one that is up and too small is ended first."""
    import ray

    if ray.is_initialized() and ray.cluster_resources().get("CPU", 0) < workers:
        shutdown()
    if not ray.is_initialized():
        # Ray's agents outlive a process that is killed for as long as they hope for their server: 60 s by default.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
        cores = max(workers, os.cpu_count() or 1)
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        atexit.register(ray.shutdown)


def make(config: Config, app: str, on_reply: OnReply) -> RayEngine:
    """An engine for `config.clients` clients on Ray workers; Ray begins to start at once."""
    return RayEngine(config, app, on_reply)
