"""Records as lines of a log: the one way from a ServerApp back to whoever started it that every SuperLink offers.

    fedlora <number> say <a line for people>
    fedlora <number> row <a line of rounds.jsonl>
    fedlora <number> part <name> <base64>          a piece of a file, in order
    fedlora <number> end <name>                    the file is whole

Lines are numbered, so that a log that is read again from its beginning changes nothing.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable
from pathlib import Path

from fedlora import untrusted
from fedlora.check import RunError
from fedlora.folder import ADAPTER, CURVES, MERGED, PRIVACY, ROUNDS, SUMMARY

MARK, PIECE = "fedlora", 48_000  # bytes of a file in one line
LONGEST, MOST_BYTES = 2000, 2**36  # characters of a line for people, bytes of a file
HOME = (PRIVACY, ADAPTER, MERGED, CURVES, SUMMARY)  # what goes home besides the rounds; the mark of the end comes last


class Sender(io.TextIOBase):
    """Says the files of a folder, and what is printed to it; `write_line` takes a whole line. For several threads.

    `sent` has the names of the files that went.
    """

    def __init__(self, folder: Path, write_line: Callable[[str], object]) -> None:
        self.folder, self.write_line = folder, write_line
        self.sent: set[str] = set()
        self._lines = self._rows = 0
        self._begun = ""  # a line that is not whole yet
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """As a file does."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._line("say", line)
        return len(text)

    def rounds(self) -> None:
        """The rounds that are new since the last call, without a line that is not whole yet."""
        try:
            lines = (self.folder / ROUNDS).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except OSError:
            return
        for line in lines[self._rows :]:
            self._line("row", line)
        self._rows = len(lines)

    def files(self, name: str) -> None:
        """A file, or all that are in a folder, by its path within the folder; nothing where there is none."""
        for path in sorted((self.folder / name).rglob("*")) or [self.folder / name]:
            if path.is_file():
                self.file(path.relative_to(self.folder).as_posix(), path.read_bytes())

    def file(self, name: str, content: bytes) -> None:
        """A file of this name and content."""
        for start in range(0, len(content), PIECE):
            self._line("part", name, base64.b64encode(content[start : start + PIECE]).decode())
        self._line("end", name)
        self.sent.add(name)

    def _line(self, *words: str) -> None:
        with self._lock:
            self.write_line(" ".join([MARK, str(self._lines), *words]) + "\n")
            self._lines += 1


class Receiver:
    """Reads what a `Sender` says out of a log.

    What comes is only taken for what it says. Lines for people are of printable characters, `LONGEST` at most. One file is held
    at a time, `MOST_BYTES` of it at most. RunError is raised for a file whose name would leave the folder or is none of `HOME`,
    for a larger one, and for a piece that cannot be read.
    """

    def __init__(
        self, say: Callable[[str], object], row: Callable[[str], object], file: Callable[[str, bytes], object]
    ) -> None:
        self.say, self.row, self.file = say, row, file
        self._read = 0
        self._name, self._parts, self._size = "", list[bytes](), 0  # of the file that is not whole yet

    def take(self, line: str) -> bool:
        """Acts on a line of the log; whether it was one of ours."""
        words = line.rstrip("\n").split(" ", 3)
        number = words[1] if len(words) > 2 else ""
        if words[0] != MARK or not (number.isascii() and number.isdecimal() and len(number) < 19):
            return False
        if int(number) == self._read:
            self._read += 1
            self._act(words[2], words[3] if len(words) > 3 else "")
        return True

    def _act(self, kind: str, rest: str) -> None:
        if kind == "say":
            self.say(untrusted.text(rest, LONGEST))
            return
        if kind == "row":
            self.row(rest)
            return
        name, _, piece = rest.partition(" ")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RunError(f"the server sent a file named {untrusted.text(name)}, which would lie outside the results folder")
        if name.split("/")[0] not in HOME:
            raise RunError(f"the server sent a file named {untrusted.text(name)}, which belongs to no results")
        if name != self._name:
            self._name, self._parts, self._size = name, [], 0
        if kind == "part":
            try:
                self._parts.append(base64.b64decode(piece, validate=True))
            except ValueError as error:
                raise RunError(f"the server sent a piece of {untrusted.text(name)} that cannot be read") from error
            self._size += len(self._parts[-1])
            if self._size > MOST_BYTES:
                raise RunError(f"the server sent more than {MOST_BYTES} bytes of {untrusted.text(name)}")
        elif kind == "end":
            content, self._name, self._parts = b"".join(self._parts), "", []
            self.file(name, content)
