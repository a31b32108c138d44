"""What a device's owner allows, whatever a server asks for: privacy, and the device's memory and time."""

from __future__ import annotations

import math
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from fedlora.check import ConfigError
from fedlora.config import Config
from fedlora.deploy.reasons import Reason, Refused

GIGABYTE = 10**9


@dataclass(frozen=True)
class Limits:
    """The owner's limits. Those on numbers are compared before anything of that size is made."""

    epsilon: float  # for everything that the device ever takes part in; inf: no privacy is demanded
    delta: float
    clip: float  # the largest bound on one record's gradient
    steps: int  # local steps in a round, at most
    adjacency: str = "add_remove"  # what ε is about: a record more or less, or another in its place (replace)
    rank: int = 256
    threads: int = os.cpu_count() or 1
    clients: int = 100_000  # in the federation
    rounds: int = 10_000
    seconds: float = 3600.0  # for one message
    memory: int = psutil.virtual_memory().total // 2  # bytes of the whole process

    def allow(self, config: Config) -> None:
        """Raises Refused where an experiment asks for more than this. Its steps a round need the examples: `allow_steps`."""
        for name, value, most, option in (
            ("adapter.rank", config.adapter.rank, self.rank, "--max-rank"),
            ("threads", config.threads, self.threads, "--max-threads"),
            ("clients", config.clients, self.clients, "--max-clients"),
            ("rounds", config.rounds, self.rounds, "--max-rounds"),
        ):
            if value > most:
                raise beyond(f"this device allows {name}={most} at most ({option}), the experiment has {value}")
        if math.isfinite(self.epsilon):
            self._allow_privacy(config)

    def allow_steps(self, steps: int) -> None:
        """Raises Refused for more local steps in a round."""
        if steps > self.steps:
            raise beyond(f"this device takes at most {self.steps} steps a round (--max-steps), the experiment asks for {steps}")

    def _allow_privacy(self, config: Config) -> None:
        privacy = config.privacy
        if privacy.name != "record":
            raise beyond(f"this device trains with privacy=record only (--epsilon), the experiment has privacy={privacy.name}")
        if privacy.clip > self.clip:
            raise beyond(
                f"this device clips at {self.clip:g} or below (--clip), the experiment has privacy.clip={privacy.clip}"
            )
        if privacy.delta > self.delta:
            raise beyond(f"this device allows δ = {self.delta:g} (--delta), the experiment has privacy.delta={privacy.delta}")

    def bound_memory(self) -> None:
        """From now on this process gets no more than `memory`: what would take it beyond raises MemoryError or RuntimeError.

        The operating system counts what the process may write to (RLIMIT_DATA). Its child, the SuperNode, has the same bound.
        Raises ConfigError where the process has more already.
        """
        taken = psutil.Process().memory_info().data
        if taken >= self.memory:
            raise ConfigError(
                f"--memory={self.memory / GIGABYTE:g} GB is too little: program, model and data take "
                f"{taken / GIGABYTE:.2g} GB before the first message; raise it"
            )
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        bound = self.memory if hard == resource.RLIM_INFINITY else min(self.memory, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """What takes longer than `seconds` within is broken off with Refused. In the main thread, by SIGALRM."""

        def late(*_: object) -> None:
            raise _Late

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        try:
            yield
        except _Late:
            raise beyond(f"the message took longer than {self.seconds:g} s (--max-seconds)") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class _Late(BaseException):
    """Time is up. No `except Exception` in between, of ours or of a library, takes it for a fault that it can mend."""


def beyond(details: str) -> Refused:
    """The refusal of what goes beyond a limit."""
    return Refused(Reason.BEYOND_LIMITS, details)
