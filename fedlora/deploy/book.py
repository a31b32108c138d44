"""A file of JSON lines that only ever grows by whole lines, whenever the disk is full or the process stops."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fedlora import disk


class Book:
    """The lines of one file, `rows`. A last line that a kill cut off is removed: what it stands for never began."""

    def __init__(self, path: Path) -> None:
        """Raises OSError for a file that cannot be read, ValueError that names the line for one that is no JSON object."""
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._size = content.rfind(b"\n") + 1  # bytes of whole lines
        if self._size != len(content):
            with open(path, "r+b") as file:
                _cut(file.fileno(), self._size)
        self.rows: list[dict[str, Any]] = []
        for number, line in enumerate(content[: self._size].splitlines(), start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no object")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} ({error})") from error
            self.rows.append(row)

    def append(self, row: dict[str, Any]) -> None:
        """The row is on disk when this returns. Raises OSError, and leaves the file as it was, where it cannot be written.

        The file must end where the last whole line did; half a line that an earlier failure left goes first.
        """
        line = (json.dumps(row) + "\n").encode()
        opened = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._mend(opened)
            try:
                _write(opened, line, self._size)
                os.fsync(opened)
            except BaseException:
                _cut(opened, self._size)
                raise
        finally:
            os.close(opened)
        if not self._size:  # the name of a new file is on disk with its folder
            disk.flush_names(self.path.parent)
        self._size += len(line)
        self.rows.append(row)

    def _mend(self, opened: int) -> None:
        there = os.fstat(opened).st_size
        beyond = os.pread(opened, max(0, there - self._size), self._size)
        if there < self._size or b"\n" in beyond:
            raise OSError(0, "another program has changed it meanwhile")
        if beyond:
            _cut(opened, self._size)


def _write(opened: int, content: bytes, at: int) -> None:
    """A disk that is nearly full takes a part, and says so only when it is given the rest."""
    while content:
        written = os.pwrite(opened, content, at)
        content, at = content[written:], at + written


def _cut(opened: int, size: int) -> None:
    os.ftruncate(opened, size)
    os.fsync(opened)
