"""A folder that only its owner may read: made so, and checked when a device starts."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from fedlora.check import ConfigError


def private(folder: Path, say: Callable[[str], object]) -> None:
    """Makes the folder, with its parents, where it is missing. What in it others may read or write is shut, and named.

    Raises ConfigError where something in it belongs to another user, who could read and change it, or is a link; OSError as the
    system does.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in (folder, *sorted(folder.rglob("*"))):
        found = path.lstat()
        if found.st_uid != os.geteuid():
            raise ConfigError(f"--state: {path} belongs to another user; take it over (chown), or choose another folder")
        if path != folder and not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise ConfigError(f"--state: {path} is a link or no file, and what it leads to may not be yours alone; remove it")
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o077:
            path.chmod(mode & 0o700)
            say(f"{path} could be read or written by others (mode {mode:o}); it is now closed to them")
