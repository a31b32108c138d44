"""Files that are whole or not there, whenever the process or the machine stops, and folders that one process has to itself."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    flush_names(path.parent)


class Lock:
    """A folder that this process has to itself until it closes this, or ends, however it ends; nothing stale is left.

    The folder itself is locked, and a file in it: a file system that locks no folders (NFS) still locks the file. So nobody
    gets in by removing the file. Raises BlockingIOError where another process has either, OSError where there are no locks.
    """

    def __init__(self, path: Path) -> None:
        # flock, and a file that is open for writing: between machines on NFS, Linux makes it a lock of the server's (unless it
        # is mounted with nolock or local_lock), which the server takes back when a machine is gone.
        self.path, self.folder = path, -1
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.folder = os.open(path.parent, os.O_RDONLY)
            self.whole = _locked(self.folder)
        except OSError:
            self.close()
            raise

    @property
    def held(self) -> bool:
        """Whether what is locked still is what the names lead to, so that no other process can have a lock there."""
        try:
            same = os.path.samestat(os.fstat(self.folder), os.stat(self.path.parent))
            return same and (self.whole or os.path.samestat(os.fstat(self.file), os.stat(self.path)))
        except OSError:
            return False

    def close(self) -> None:
        """Let others have it."""
        for descriptor in (self.file, self.folder):
            if descriptor >= 0:
                os.close(descriptor)
        self.file = self.folder = -1

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(path: Path) -> Lock:
    """The lock of a folder by this file in it."""
    return Lock(path)


def _locked(folder: int) -> bool:
    """Lock the open folder; whether its file system can."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def remove(path: Path) -> None:
    """The file, or the folder with all that is in it, if there is one; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_private(folder: Path) -> None:
    """The folder, made where it is missing, which nobody but its owner may read from now on. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Within, nobody but its owner may read what this process writes."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def sealed(content: dict[str, Any]) -> str:
    """JSON that has its own digest in it, so that `unsealed` notices any change."""
    return json.dumps(content | {"digest": _digest(content)}, indent=1)


def unsealed(text: str | bytes) -> dict[str, Any]:
    """The inverse of `sealed`. Raises ValueError for anything else."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise ValueError("it is not as it was written")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def flush_names(folder: Path) -> None:
    """When this returns, the names of the folder's files are on disk, where the file system can promise that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
