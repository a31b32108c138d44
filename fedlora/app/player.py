"""A whole cell of a sweep in one Ray worker."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedlora.check import ConfigError, RunError
from fedlora.config import Config
from fedlora.validate import from_json

if TYPE_CHECKING:
    from fedlora.engines.cluster import Driver

Summary = dict[str, Any]
# Ray's processes block SIGINT, and a terminal would send it to the whole group besides; SIGTERM ends them without a word.
STOPS: dict[int, int] = {signal.SIGINT: signal.SIGUSR1, signal.SIGTERM: signal.SIGUSR2}  # what the driver sends instead
INTERRUPTED: Summary = {"status": "interrupted"}  # before anything was written


def attempt(cell: Config, started: float, engine_name: str | None = None) -> Summary:
    """The summary of one cell of several; where it fails, the reason instead, so that the others can go on."""
    from fedlora.app import experiment

    try:
        return experiment.run(cell, started, engine_name=engine_name)
    except (ConfigError, RunError) as error:
        return {"status": "failed", "reason": str(error)}
    except Exception:  # a defect, ours or a library's, that may concern this cell alone
        return {"status": "failed", "reason": traceback.format_exc()}


class Player:
    """A Ray actor: a process that plays one whole cell at a time."""

    def __init__(self, command: list[str], driver: Driver) -> None:
        driver.settle()
        from fedlora.app import experiment  # noqa: F401  # loads what is heavy before a cell's time begins

        sys.argv = command  # env.json tells the command of the sweep
        self.playing = self.stopped = False
        for number in STOPS.values():
            signal.signal(number, self._ctrl_c)

    def place(self) -> tuple[str, int]:
        """The node and the process, for the driver to signal."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def play(self, cells: list[str], sources: Sequence[dict[str, str] | None] | None = None) -> list[Summary]:
        """The summaries of the cells, played inline: one by itself, several in step.

        `sources` are those of the driver, one for each cell; a cell whose files are others here has failed.
        """
        from fedlora.engines import cluster, instep

        if self.stopped:
            return [INTERRUPTED] * len(cells)
        name, started = "inline" if len(cells) == 1 else "instep", time.perf_counter()
        configs = [from_json(cell) for cell in cells]
        try:
            for config, theirs in zip(configs, sources or [None] * len(cells), strict=True):
                cluster.check_sources(config, theirs)
        except (ConfigError, RunError) as error:
            return [{"status": "failed", "reason": str(error)} for _ in cells]
        played = [partial(attempt, config, started, engine_name=name) for config in configs]
        self.playing = True
        try:
            return [played[0]()] if len(cells) == 1 else instep.run(played, lambda: self.stopped)
        except KeyboardInterrupt:
            return [INTERRUPTED] * len(cells)
        finally:
            self.playing = False

    def _ctrl_c(self, number: int, frame: FrameType | None) -> None:
        """What Ctrl-C does in a process that plays a single run."""
        self.stopped = True
        handler = signal.getsignal(signal.SIGINT)
        if self.playing and callable(handler):
            handler(next(stop for stop, sent in STOPS.items() if sent == number), frame)


@dataclass
class Seat:
    """A player, and the reference to its node and process id, which is there as soon as the process is."""

    player: Any
    place: Any

    def stop(self, number: int | None) -> None:
        """Ctrl-C, or the other signal that came, for its cell; on another node a process there has to send it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        sent = STOPS.get(number or signal.SIGINT, signal.SIGUSR2)
        node, pid = ray.get(self.place)
        if node == ray.get_runtime_context().get_node_id():
            os.kill(pid, sent)
        else:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            ray.remote(num_cpus=0, max_retries=0)(os.kill).options(scheduling_strategy=there).remote(pid, sent)
