"""Ctrl-C that is never lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class CtrlC:
    """Raises KeyboardInterrupt as usual, and remembers it; use as a context manager around a run.

    Python drops an exception that is raised in a finaliser or a library's callback, with no more than a line on stderr.
    `check`, called once a round, raises it again. With `later` it is raised by `check` alone, or when pressed twice.
    """

    def __init__(self, later: bool = False) -> None:
        self.later, self.pressed = later, False
        self._before: Any = None

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed since the run began."""
        if self.pressed:
            raise KeyboardInterrupt

    def __enter__(self) -> CtrlC:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        before, self.pressed = self.pressed, True
        if before or not self.later:
            raise KeyboardInterrupt
