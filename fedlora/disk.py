"""Files that are whole or not there, whenever the process or the machine stops, and folders that one process has to itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import BinaryIO


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


def lock(path: Path) -> BinaryIO:
    """The file, this process's own until it is closed or the process ends, however it ends; nothing stale is left.

    Raises BlockingIOError where another process has it, and OSError where the file system has no locks.
    """
    # flock, and a file that is open for writing: between machines on NFS, Linux makes it a lock of the server's (unless it is
    # mounted with nolock or local_lock), which the server takes back when a machine is gone.
    file = open(path, "ab")  # noqa: SIM115
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
