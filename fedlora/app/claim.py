"""A results folder that one process has to itself."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fedlora import disk
from fedlora.app.folder import LOCK


class Claim:
    """A folder that this process has to itself while the context lasts. Where nothing was written, nothing stays of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock: disk.Lock | None = None
        self._made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have it, and take away the folders that were made for it, if there is nothing but the lock in them."""
        if self._made and self.folder.is_dir() and all(path.name == LOCK for path in self.folder.iterdir()):
            disk.remove(self.folder / LOCK)
            with contextlib.suppress(OSError):  # another run has begun beside it
                for path in self._made:
                    path.rmdir()
        if self.lock is not None:
            self.lock.close()
