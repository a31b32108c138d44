"""Ctrl-C, SIGTERM and SIGHUP in the middle of work: none is lost, and what there is can be saved."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}

received: int | None = None  # the first of these signals that came
watched = False  # whether this process is a command of ours (`fedlora.app.command`), which ends after such a signal
begun = False  # whether work was ever under way, so that something may have been saved
work: list[CtrlC] = []  # what is under way and has something to save
_before: Any = None  # the handler of Ctrl-C outside of it, where this process is no command of ours


class CtrlC:
    """Work that a signal breaks off by a KeyboardInterrupt; use as a context manager around it, in the main thread.

    Python drops an exception that is raised in a finaliser or a library's callback, with no more than a line on stderr.
    `check`, called once a round, raises it again. With `later` it is raised by `check` alone: for what must be done whole.
    """

    def __init__(self, later: bool = False) -> None:
        self.later, self.pressed = later, False

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come since the work began."""
        if self.pressed:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is within is done whole; a signal that comes meanwhile raises KeyboardInterrupt at the end."""
        before, self.later = self.later, True
        try:
            yield
        finally:
            self.later = before
        if not before:
            self.check()

    def __enter__(self) -> CtrlC:
        global received, begun, _before
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handler
            return self
        if watched and received is not None:
            raise KeyboardInterrupt
        if not watched and not work:
            received, _before = None, signal.signal(signal.SIGINT, note)
        begun = True
        work.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self in work:
            work.remove(self)
            if not watched and not work:
                signal.signal(signal.SIGINT, _before)


def check() -> None:
    """Raises KeyboardInterrupt if a signal has come for any work that is under way and not to be done whole."""
    for each in work:
        if not each.later:
            each.check()


def note(number: int, frame: FrameType | None = None) -> None:
    """The handler of these signals. Of a command only the first one counts here: the second one ends it elsewhere."""
    global received
    received = received or number  # as the thread of a command, which sees to the end, may have done already
    first = not all(each.pressed for each in work)
    for each in work:
        each.pressed = True
    whole = any(each.later for each in work)
    if work and (not whole if first else not watched):
        raise KeyboardInterrupt


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within, a library may set handlers of its own for our signals, as Ray does in C++; a command's are put back at once."""
    if not watched:
        yield
        return
    ours = {number: signal.getsignal(number) for number in NAMES}
    actions, library, done = {}, ctypes.CDLL(None), threading.Event()
    for number in NAMES:
        actions[number] = ctypes.create_string_buffer(512)  # a struct sigaction, and more
        library.sigaction(int(number), None, actions[number])

    def put_back() -> None:
        while True:
            ended = done.wait(0.005)
            for number, action in actions.items():
                library.sigaction(int(number), action, None)
            if ended:
                return

    keeper = threading.Thread(target=put_back, daemon=True, name="handlers")
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        if threading.current_thread() is threading.main_thread():
            for number, handler in ours.items():
                signal.signal(number, handler)


def leaving() -> bool:
    """Whether this process is about to end, so that nothing need be put in order for what comes after."""
    return watched and received is not None


def reason() -> str:
    """Why work was broken off, for people."""
    return f"stopped by {NAMES[signal.Signals(received or signal.SIGINT)]}"


def outcome() -> dict[str, Any]:
    """How a run has ended that was stopped, for its summary."""
    return {"status": "interrupted", "reason": reason()}


def status() -> int:
    """The exit status of a command that was stopped, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (received or signal.SIGINT)
