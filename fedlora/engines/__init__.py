"""Where clients run: one module here for each choice of `engine`, all with the same two functions' worth of interface.

An engine changes speed and nothing else. It owns a Flower Grid and hands it to whoever drives the rounds:

    engine = engines.make(config, app)     # starts what takes time to start, and returns at once
    engine.run(drive)                      # calls drive(grid) and returns when that is done
    engine.close()
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, Protocol

from flwr.serverapp import Grid

from fedlora import interrupt
from fedlora.check import ConfigError, RunError
from fedlora.config import Config

CLIENT_APP = "clients.app:app"
OnReply = Callable[[int], None]  # called with the number of replies of the running round, where the engine can tell


class Engine(Protocol):
    """What an engine must offer."""

    def run(self, drive: Callable[[Grid], object]) -> None:
        """Call `drive` with a grid on which every client of the federation is a node."""

    def close(self) -> None:
        """Give back what is not worth keeping for another run in this process."""


def make(config: Config, app: str = CLIENT_APP, on_reply: OnReply = lambda count: None) -> Engine:
    """The engine that `config.engine` names, for `config.clients` nodes that run the ClientApp at `app` (module:name)."""
    engine: Engine = importlib.import_module(f"fedlora.engines.{config.engine.name}").make(config, app, on_reply)
    return engine


def attempt(engine: Engine, rounds: Callable[[Grid], object]) -> dict[str, Any]:
    """Run the rounds on the engine's grid and say how that ended: finished, interrupted or failed, with the reason."""
    try:
        engine.run(rounds)
    except KeyboardInterrupt:
        return interrupt.outcome()
    except RunError as error:
        return {"status": "failed", "reason": str(error)}
    return {"status": "finished"}


def cohort(config: Config) -> int | None:
    """Clients that share a pass by the settings; None: as many as is quickest."""
    return None if config.engine.cohort == "auto" else int(config.engine.cohort)


def load_app(app: str) -> Any:
    """The ClientApp at `module:name`. It must be in an importable module: one in __main__ is unknown to a worker."""
    module, _, name = app.partition(":")
    return getattr(importlib.import_module(module), name)


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
        from fedlora.engines import pool

        return pool.room(config.engine, share), share
    if share:
        import torch

        return max(1, int(torch.cuda.device_count() / share)), share
    return os.cpu_count() or 1, 0.0
