"""A command of ours as a process: from its first moment to its last, one Ctrl-C, SIGTERM or SIGHUP ends it.

The handlers of Python run in the main thread, between two of its steps. It may be anywhere then: in an import, in a
library that swallows exceptions, in C++ code that does not come back. So a thread of its own, the watch, learns of a signal
at once (`signal.set_wakeup_fd`) and sees to the end:

    nothing to save yet, or no more     it ends the process there and then
    work is under way (`CtrlC`)         the main thread gets a KeyboardInterrupt, and `LIMIT` seconds to begin to save
    saving                              it waits, as long as that takes
    a second signal                     it ends the process there and then

What is on disk is whole at every moment, so the process may be ended at any. It ends by `os._exit`, after the processes that
it has started: an orderly end of the interpreter would wait for a Ray that is starting, or crash with it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from fedlora import interrupt

LIMIT = 4.0  # seconds from the signal until the main thread begins to save, and from there until it ends
AGAIN = 1.0  # a signal within so many seconds is the same one: `timeout` and Slurm send theirs twice
TICK = 0.05


class Watch:
    """The thread that ends the process after a signal."""

    def __init__(self, stopped: int | None = None) -> None:
        self.stopped = stopped  # the exit status after a signal, where it is not the usual one
        self.done: int | None = None  # that of a command whose work is done, so that it is about to end
        self._ending = threading.Lock()
        self._signals, write = os.pipe()
        os.set_blocking(write, False)
        interrupt.watched = True
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in interrupt.NAMES:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)
        threading.Thread(target=self._look, daemon=True, name="watch").start()
        import psutil  # noqa: F401  # not before a signal is noticed, and not only when one has come

    def _note(self, number: int, frame: Any) -> None:
        if not isinstance(sys.stdout, Calm):
            sys.stdout, sys.stderr = Calm(sys.stdout), Calm(sys.stderr)
        interrupt.note(number, frame)

    def _look(self) -> None:
        number = None
        while number is None:
            number = self._next(None)
        began, closed, told = time.monotonic(), None, False
        interrupt.received = interrupt.received or number
        if number == signal.SIGHUP:
            _to_nowhere(*(stream for stream in (0, 1, 2) if os.isatty(stream)))
        if not interrupt.work and self.done is None:
            nothing = not interrupt.begun and self.stopped is None
            self.end(interrupt.reason() + (" before a result was written" if nothing else ""))
        while True:
            again, now = self._next(TICK), time.monotonic()
            saving = any(each.later for each in interrupt.work)
            if again is not None and now > began + AGAIN:
                self.end(f"{interrupt.reason()}, and by a second signal before all was saved" if interrupt.work else "")
            if saving and not told and now > began + LIMIT:
                told = True
                _say("saving what there is; a second signal ends this at once")
            if interrupt.work and not saving and now > began + LIMIT:
                self.end(f"{interrupt.reason()}; the same command goes on after the last checkpoint")
            closed = None if interrupt.work else closed or now
            if closed and now > closed + LIMIT:
                self.end()

    def _next(self, timeout: float | None) -> int | None:
        """The next signal of ours, if one comes in time."""
        if not select.select([self._signals], [], [], timeout)[0]:
            return None
        return next((number for number in os.read(self._signals, 64) if number in interrupt.NAMES), None)

    def end(self, sentence: str = "") -> NoReturn:
        """End the process, now, with all that it has started."""
        status = self.done if self.done is not None else interrupt.status() if self.stopped is None else self.stopped
        if not self._ending.acquire(timeout=1.0):
            os._exit(status)  # another thread is at it, and does not get on
        flushing = threading.Thread(target=_flush, daemon=True)
        flushing.start()
        flushing.join(0.5)  # the reader of a pipe may have stopped reading
        if sentence:
            _say(sentence)
        _to_nowhere(1, 2)  # Ray's threads would report the end of its processes
        _end_children()
        os._exit(status)


def _deaf() -> None:
    """Ignores our signals. Python puts back its own handlers as it ends, and they would change the exit status.

    Registered first with `atexit` and so called last: before that a signal still ends a Ray that does not shut down.
    """
    for number in interrupt.NAMES:
        signal.signal(number, signal.SIG_IGN)


def _say(sentence: str) -> None:
    """A line on stderr, past whatever locks its stream has."""
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # a bar was shown, most likely: its cursor, and a line of its own
        os.write(2, f"{sentence}\n".encode())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _to_nowhere(*streams: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in streams:
        os.dup2(nowhere, stream)


def _end_children() -> None:
    """Kill all that this process has started, and what those have. One that is stopped first starts no others meanwhile."""
    import psutil

    found: set[Any] = set()
    while more := set(psutil.Process().children(recursive=True)) - found:
        for process in more:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        found |= more
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()


class Calm:
    """A stream whose reader may be gone: `run.py | tee` gets Ctrl-C too, and so does a terminal that is closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream, if it can."""
        with contextlib.suppress(OSError, ValueError):
            return int(self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As of the stream, if it can."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def run(main: Callable[[], int], stopped: int | None = None) -> int:
    """What `main` returns, which is to be the exit status of this process; `main` imports what takes long.

    After a signal the process ends with `main`: with 128 and the number of the signal, or with `stopped`.
    """
    atexit.register(_deaf)
    watch = Watch(stopped)
    try:
        status = main()
    except BaseException as error:
        if interrupt.received is None:
            raise
        told = isinstance(error, SystemExit | KeyboardInterrupt)
        watch.end(interrupt.reason() if told else f"{interrupt.reason()}; the same command goes on after the last checkpoint")
    if interrupt.received is not None:
        watch.end()
    watch.done = status
    return status
