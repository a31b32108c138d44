"""The workers of `engine=ray`: processes with one resident base model each, on this machine or on the nodes of a cluster."""

from __future__ import annotations

import atexit
import math
import os
import time
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from flwr.app import Message, RecordDict

from fedlora import interrupt
from fedlora.check import ConfigError, RunError, reason
from fedlora.config import Config, EngineConfig
from fedlora.engines import cluster
from fedlora.engines.base import CLIENT_APP, load_app
from fedlora.engines.local import adds, carrying, play
from fedlora.validate import from_json

TICK = 1.0  # seconds between looks for nodes that have joined


class Worker:
    """A Ray actor: a process that plays one cohort after another."""

    def __init__(self, app: str, driver: cluster.Driver) -> None:
        self.processor = driver.settle()
        self.app = load_app(app)
        self.held: dict[Any, Any] = {}  # the contents of the newest messages, by reference

    def warm(self, experiment: str, sources: dict[str, str] | None = None) -> tuple[str, str]:
        """Build the workbench before the first client asks for it; returns the ids of the node, and its processor.

        Raises RunError where data or model are not there, or are others than those of `sources` (`cluster.sources`).
        """
        import ray

        from fedlora.compute import workbench

        try:
            bench = workbench.refreshed(from_json(experiment))  # a worker stays for runs whose data have been edited since
            cluster.check_sources(bench.config, sources)
            assert bench.rows is not None  # encodes the examples and tries them
        except ConfigError as error:
            raise RunError(f"{cluster.here()}: {error}") from error
        return ray.get_runtime_context().get_node_id(), self.processor

    def play(
        self, cohorts: list[list[Message]], contents: list[list[Any]], states: list[list[RecordDict | None]], clients: int
    ) -> tuple[list[Message], list[RecordDict | None]]:
        """The ClientApp's replies, added up if they may be, and what each client keeps.

        `contents` has a reference for each message; in a list, Ray does not take their values.
        """
        import ray

        keys = dict.fromkeys(key for of_cohort in contents for key in of_cohort)
        self.held = {key: self.held[key] if key in self.held else ray.get(key) for key in keys}
        replies, kept = list[Message](), list[RecordDict | None]()
        for batch, own, before in zip(cohorts, contents, states, strict=True):
            carried = [carrying(message, self.held[key]) for message, key in zip(batch, own, strict=True)]
            played, after = play(self.app, carried, before, clients)
            replies += played
            kept += after
        return self.app.added(replies) if adds(self.app, carried) else replies, kept


@dataclass(eq=False)
class Seat:
    """A worker, and the id of its node as soon as it is up."""

    worker: Any
    node: str = ""


class Kind(NamedTuple):
    """What a pool depends on. Without a number of `workers` it has as many as the cluster has room for, at any time."""

    app: str
    address: str | None
    workers: int | None
    gpus: float
    driver: cluster.Driver


class Pool:
    """The workers of this process, kept from one experiment of a sweep to the next."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.actor, self.nodes = cluster.actor(Worker, kind.gpus), cluster.Nodes(kind.gpus)
        self.experiment = ""
        self.sources: dict[str, str] | None = None  # `cluster.sources` of the experiment
        self.served = False  # whether any worker has been warm for the experiment
        self.idle: deque[Seat] = deque()
        self.warming: dict[Any, Seat] = {}  # by the reference to the end of it
        self.size = 0  # workers, the busy ones included
        self._looked = -math.inf

    def warm(self, experiment: str, sources: dict[str, str] | None = None) -> None:
        """Let every worker build what the experiment needs, from the same files; `admit` says when."""
        self.experiment, self.sources = experiment, sources
        self.served, self.nodes = False, cluster.Nodes(self.kind.gpus)
        for _ in range((self.kind.workers or 0) - self.size):
            self._add()
        while self.idle:
            self._warm(self.idle.popleft())
        self._grow()

    def _add(self) -> None:
        self.size += 1
        self._warm(Seat(self.nodes.place(self.actor).remote(self.kind.app, self.kind.driver)))

    def _warm(self, seat: Seat) -> None:
        self.warming[seat.worker.warm.remote(self.experiment, self.sources)] = seat

    def _grow(self) -> None:
        """Take on what the cluster has room for; what it says lags behind, so not before all those asked for are up."""
        if self.kind.workers is None and not self.warming and time.monotonic() > self._looked + TICK:
            self._looked = time.monotonic()
            for _ in range(self.nodes.free()):
                self._add()

    def admit(self) -> None:
        """Workers that are warm become idle, others are taken on, and a node that lacks something is left out.

        Raises RunError where every node does and none has worked, as on a machine of its own where no worker can start.
        """
        import ray

        ready = ray.wait(list(self.warming), num_returns=len(self.warming), timeout=0.0)[0] if self.warming else ()
        for reference in ready:
            seat = self.warming.pop(reference)
            try:
                seat.node, processor = ray.get(reference)
                if processor != self.kind.driver.processor:
                    told = f"nodes have {processor} and {self.kind.driver.processor}: numbers agree to rounding, not to the bit"
                    warnings.warn(told, cluster.MixedProcessors, stacklevel=2)
            except ray.exceptions.RayError as error:
                died = isinstance(error, ray.exceptions.RayActorError)
                unable = died and error.actor_init_failed
                if unable and self.kind.address is None:
                    self._drop(seat)
                    raise cluster.cause(error) from error
                if unable or (self.kind.address is not None and not died):
                    self.nodes.bar(seat.worker, error)
                if self.kind.address is not None:
                    self.replace(seat, node_lost=True)
                    continue
                # On this machine a client says what is wrong, or it is what an earlier experiment asked for.
            self.served = True
            self.idle.append(seat)
        if not self.served:
            self.nodes.check()
        self._grow()

    def lost(self, seat: Seat, error: Exception) -> bool:
        """Whether a worker on a cluster is gone because its node is, which is no client's fault."""
        import ray

        away = isinstance(error, ray.exceptions.ActorUnavailableError | ray.exceptions.ObjectLostError)
        return self.kind.address is not None and (away or not cluster.alive(seat.node))

    def replace(self, seat: Seat, node_lost: bool = False) -> None:
        """A new worker in the place of one that died or hangs; for a node that is lost, where there is room for it."""
        self._drop(seat)
        if not node_lost or self.kind.workers is not None:
            self._add()

    def _drop(self, seat: Seat) -> None:
        import ray

        self.size -= 1
        ray.kill(seat.worker)

    def stop(self) -> None:
        """End all workers."""
        for seat in (*self.idle, *self.warming.values()):
            self._drop(seat)
        self.idle.clear()
        self.warming.clear()


_pool: Pool | None = None


def pool(config: Config, app: str) -> Pool:
    """The pool of this process, made anew where another one is asked for."""
    global _pool
    workers, gpus = resources(config)
    engine = config.engine
    wanted = engine.workers if engine.address else workers
    kind = Kind(app, engine.address, wanted, gpus, cluster.driver(config))
    if _pool is None or _pool.kind != kind:
        if _pool is not None:
            _pool.stop()
        _pool = Pool(kind)
    return _pool


def resources(config: Config) -> tuple[int, float]:
    """Workers, and GPUs a worker: what the settings say, else one worker a core, or one a GPU with device=cuda,
    of this machine or of the cluster's that are free."""
    from fedlora.compute.workbench import torch_device

    on_gpu = torch_device(config.device).type == "cuda"
    gpus = config.engine.gpus_per_worker
    share = gpus if gpus is not None else float(on_gpu)
    if share and not on_gpu:
        raise ConfigError(f"engine.gpus_per_worker={share:g} needs a GPU, and device={config.device} gives none; set it to 0")
    if config.engine.workers is not None:
        return config.engine.workers, share
    if config.engine.address is not None:
        return room(config.engine, share), share
    if share:
        import torch

        return max(1, int(torch.cuda.device_count() / share)), share
    return os.cpu_count() or 1, 0.0


def room(engine: EngineConfig, gpus: float) -> int:
    """Workers that the cluster of `engine.address` has, or has room for. Raises ConfigError where it does not answer."""
    start_ray(engine)
    return max(1, _pool.size if _pool is not None and _pool.size else cluster.Nodes(gpus).free())


def shutdown() -> None:
    """End the workers of this process and its Ray, for an engine that wants the cores and starts a Ray of its own."""
    global _pool
    import ray

    if _pool is not None:
        _pool.stop()
        _pool = None
    ray.shutdown()
    cluster.joined = None


def start_ray(engine: EngineConfig, app: str = CLIENT_APP) -> None:
    """The cluster of `engine.address`, or a Ray of this process's own with room for `engine.workers` one-core workers.

    Another one that this process is on, or a smaller one, is left first.
    """
    import ray

    workers, own = engine.workers or 0, engine.address is None
    if ray.is_initialized():
        if cluster.joined == engine.address and (not own or ray.cluster_resources().get("CPU", 0) >= workers):
            return
        shutdown()
    if engine.address is not None:
        with interrupt.kept():
            cluster.join(engine.address, app)
        atexit.register(ray.shutdown)
    else:
        start_own(max(workers, os.cpu_count() or 1))


def start_own(cores: int) -> None:
    """A Ray of this process's own. Its processes end with the thread that calls this: they ask the kernel for it.

    Raises RunError where it does not start.
    """
    import ray

    # Ray's agents outlive a process that is killed for as long as they hope for their server: 60 s by default.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
    try:
        with interrupt.kept():
            ray.init("local", num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # as of a machine that is too busy; Ray has no kind of its own for it
        raise RunError(f"Ray did not start on this machine ({reason(error)}); try again, or choose engine=inline") from error
    atexit.register(ray.shutdown)
