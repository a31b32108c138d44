"""Ten seconds for whatever is tried: it says something meanwhile, or it hangs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

COMPUTING = 10.0  # seconds of computing
LONGEST = 60.0  # seconds, where the machine is busy with something else


class Hang(BaseException):
    """Too long without a word. Not an Exception, which what is tried could turn into a sentence of its own."""


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Raises AssertionError where what is within takes too long. Only for a process's main thread."""
    before = [(number, signal.signal(number, _hang)) for number in (signal.SIGALRM, signal.SIGPROF)]
    try:
        anew()
        yield
    except Hang as error:
        raise AssertionError(f"nothing came in {COMPUTING:g} s") from error
    finally:
        _wait(0, 0)
        for number, handler in before:
            signal.signal(number, handler)


def anew() -> None:
    """Something was said: the time counts from now."""
    _wait(COMPUTING, LONGEST)


def _wait(computing: float, longest: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, computing)
    signal.setitimer(signal.ITIMER_REAL, longest)


def _hang(*_: object) -> None:
    raise Hang
