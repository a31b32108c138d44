"""An existing Ray cluster, which `engine.address` names: joining it, and what its nodes must have in common with the driver.

The project's code travels to the nodes as Ray's `py_modules`; Python packages, data and models must be there. Leaving it
ends this process's actors and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import socket
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedlora import identity
from fedlora.check import ConfigError, RunError, reason
from fedlora.config import Config

ANSWER = 5.0  # seconds that a cluster has to say that it is there
PACKAGES = ("fedlora", "strategies", "clients")
NUMERIC = ("torch", "numpy", "transformers", "peft", "opacus", "flwr")  # packages whose version may change a number
joined: str | None = None  # the address of the cluster that this process is on


class MixedProcessors(UserWarning):
    """Nodes whose sums may be rounded in other ways."""


class LeftOut(UserWarning):
    """A node that lacks something."""

    each = True  # told of every one


def join(address: str, app: str) -> None:
    """Connect to the cluster and ship the code, the package of the ClientApp `app` (module:name) with it.

    Raises ConfigError, within seconds, where nobody answers or this machine is no node of the cluster.
    """
    global joined
    import ray

    where = f"engine.address={address}"
    cure = "start a cluster (ray start --head --port=6379 --disable-usage-stats), or correct the address"
    try:
        place = _place(address)
        if place is None:
            raise ConfigError(f"{where}: no cluster was started on this machine by ray start; {cure}")
        if not _answers(place):  # ray.init would wait for long, or for ever
            raise ConfigError(f"{where}: no Ray cluster answers {f'at {place}' if address == 'auto' else 'there'}; {cure}")
        modules = [_source(name) for name in dict.fromkeys((*PACKAGES, app.partition(".")[0]))]
        code = {"py_modules": modules, "excludes": ["__pycache__"]}
        ray.init(place, runtime_env=code, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # another Ray or Python; no node here
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} cannot be joined from this machine ({reason(error)}); {cure}") from error
    joined = address


def _place(address: str) -> str | None:
    """host:port of the cluster; of "auto" that of RAY_ADDRESS, or else of the last `ray start` here; None without either.

    Ray itself would look for any Ray among the processes of this machine too, and find the private one of another run.
    """
    from ray._private.services import canonicalize_bootstrap_address, find_bootstrap_address

    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or find_bootstrap_address(None) or ""
    return canonicalize_bootstrap_address(address) if address else None


def _answers(place: str) -> bool:
    """Whether a gRPC server, as the head of a cluster is one, answers at host:port."""
    import grpc  # type: ignore[import-untyped]

    if os.environ.get("RAY_USE_TLS") == "1":  # Ray has the certificates
        return True
    with contextlib.closing(grpc.insecure_channel(place)) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER)
        except grpc.FutureTimeoutError:
            return False
    return True


def _source(package: str) -> str:
    """The folder, or the file, that a package of this process is imported from, installed or not."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return next(iter(spec.submodule_search_locations)) if spec.submodule_search_locations else str(spec.origin)


def room(resources: dict[str, float], gpus: float) -> int:
    """Workers with a core, and so many GPUs, for which a node with these resources has room."""
    return int(min(resources.get("CPU", 0.0), resources.get("GPU", 0.0) / gpus if gpus else float("inf")))


class Nodes:
    """The nodes of the cluster as places for workers of one experiment: all but those that turn out to lack something."""

    def __init__(self, gpus: float) -> None:
        self.gpus = gpus
        self.barred: dict[str, RunError] = {}  # why, by the node's id

    def free(self) -> int:
        """Workers for which there is room now."""
        from ray._private.state import available_resources_per_node

        available = available_resources_per_node()
        return sum(room(resources, self.gpus) for node, resources in available.items() if node not in self.barred)

    def place(self, actor: Any) -> Any:
        """What `actor` returned, for the nodes that are not barred."""
        if not self.barred:
            return actor
        return actor.options(label_selector={"ray.io/node-id": f"!in({','.join(self.barred)})"})

    def bar(self, worker: Any, error: Exception) -> None:
        """The node of this worker, which could not start or not warm up there, is given no more work; each is told once."""
        from ray._private.state import actors

        node = str(actors(worker._actor_id.hex())["Address"]["NodeID"])  # of an actor that never was, it has no public way
        if node not in self.barred:
            self.barred[node] = why = cause(error, node)
            warnings.warn(f"{why}; the node is left out", LeftOut, stacklevel=2)

    def check(self) -> None:
        """Raises the RunError of a barred node, if no other has room for a worker even when it is free."""
        import ray

        if self.barred:
            able = {node["NodeID"] for node in ray.nodes() if node["Alive"] and room(node["Resources"], self.gpus)}
            if able <= self.barred.keys():
                raise next(iter(self.barred.values()))


def alive(node: str) -> bool:
    """Whether the node of this id is still part of the cluster."""
    import ray

    return any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())


def sees(folder: Path) -> bool:
    """Whether every node sees this folder of the driver's, so that a worker may write into it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_exists)
    mark = folder.absolute() / f".{os.getpid()}.{socket.gethostname()}"
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        placed = [look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes]
        return all(ray.get([each.remote(str(mark)) for each in placed], timeout=60))
    except ray.exceptions.RayError:  # a node has left meanwhile, or cannot run our code
        return False
    finally:
        mark.unlink()


def _exists(path: str) -> bool:
    return Path(path).exists()


def actor(kind: type, gpus: float) -> Any:
    """A class as Ray actors with a core each, spread over the nodes; one that dies stays dead, and is replaced by its owner."""
    import ray

    return ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")(kind)


@dataclass(frozen=True)
class Driver:
    """What a worker, on whichever node, takes over from the process that drives the run, and must have in common with it."""

    folder: str  # relative paths are meant from here
    device: str  # what device=auto stands for: the driver's choice, so that no number depends on the node
    address: str | None  # of the cluster that both are on
    versions: dict[str, str]
    processor: str

    def settle(self) -> str:
        """Make the process of a worker like the driver's; returns its processor. Raises RunError, with the difference."""
        global joined
        joined = self.address
        with contextlib.suppress(OSError):  # absolute paths need no such folder
            os.chdir(self.folder)
        if self.device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        own = versions()
        differences = [
            f"{name} {own[name]} and not {version}" for name, version in self.versions.items() if own[name] != version
        ]
        if differences:
            raise RunError(f"{here()} has {', '.join(differences)} as here; install the same versions on every node")
        return processor()


def driver(config: Config) -> Driver:
    """This process, for its workers."""
    from fedlora.compute.workbench import torch_device

    return Driver(os.getcwd(), torch_device(config.device).type, config.engine.address, versions(), processor())


def sources(config: Config) -> dict[str, str] | None:
    """Digests of the data, the base model and the strategy's code of this process, for workers on other machines.

    None where all workers are on this machine. Raises ConfigError where data or model cannot be read.
    """
    return None if config.engine.address is None else identity.sources(config)


def check_sources(config: Config, theirs: dict[str, str] | None) -> None:
    """Raises RunError where the files of this worker are not those of the driver, whose `sources` these are.

    None: the driver is on this machine, and nothing is compared.
    """
    if theirs is None:
        return
    others = [name for name, found in identity.sources(config).items() if found != theirs[name]]
    if others:
        raise RunError(f"{here()} differs from the command in {', '.join(others)}; copy the command's files there")


def versions() -> dict[str, str]:
    """Python and the packages that numbers come from; "missing" where one is not installed."""
    found = {"python": platform.python_version()}
    for name in NUMERIC:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def processor() -> str:
    """What the kernels of torch are chosen by: AVX2, AVX512, …"""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def cause(error: Exception, node: str | None = None) -> RunError:
    """Why a worker could not start, on which node, from the error of its actor: the last line of its traceback."""
    last = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    kind, _, sentence = last.partition(": ")
    if kind.endswith(RunError.__name__):  # ours, which names the node where there are several
        return RunError(sentence)
    return RunError(f"{f'{name(node)}: ' if node else ''}a worker cannot start: {last}")


def here() -> str:
    """This node, for an error to name."""
    import ray

    return name(ray.get_runtime_context().get_node_id())


def name(node: str) -> str:
    """The node of this id, for people."""
    import ray

    (found,) = (each for each in ray.nodes() if each["NodeID"] == node)
    return f"node {found['NodeManagerHostname']} ({found['NodeManagerAddress']})"
