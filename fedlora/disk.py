"""Files that are whole or not there, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO


def write(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace the file in one move; when this returns, the new one is on disk. Raises OSError, the old one untouched.

    `mode` is who may read and write it, as the process's umask leaves it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # one that was left behind has a mode of its own
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_names(path.parent)


def lock(path: Path) -> IO[str]:
    """The file, made where it is missing and held until it is closed or the process ends.

    Raises BlockingIOError where another process holds it.
    """
    import fcntl  # Windows has none, and only what holds a lock needs it

    file = open(path, "w")  # noqa: SIM115  # held beyond this function
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def flush_names(folder: Path) -> None:
    """When this returns, the names of the folder's files are on disk, where the file system can promise that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
