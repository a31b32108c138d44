"""Where clients run: one module here for each choice of `engine`, all with the same two functions' worth of interface.

An engine changes speed and nothing else. It owns a Flower Grid and hands it to whoever drives the rounds:

    engine = engines.make(config, app)     # starts what takes time to start, and returns at once
    engine.run(drive)                      # calls drive(grid) and returns when that is done
    engine.close()
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from flwr.serverapp import Grid

from fedlora import interrupt
from fedlora.check import RunError
from fedlora.config import Config
from fedlora.engines.base import CLIENT_APP, Engine, OnReply, load_app

__all__ = ["CLIENT_APP", "Engine", "OnReply", "attempt", "cohort", "load_app", "make"]


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
