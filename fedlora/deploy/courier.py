"""Records as lines of a log: the one way from a ServerApp back to whoever started it that every SuperLink offers.

    fedlora <number> say <a line for people>
    fedlora <number> row <a line of rounds.jsonl>
    fedlora <number> part <name> <base64>          a piece of a file, in order
    fedlora <number> end <name>                    the file is whole

Lines are numbered, so that a log that is read again from its beginning changes nothing. Whoever runs the SuperLink may write
any of them, so the receiver takes what it can bound and name, and nothing else.
"""

from __future__ import annotations

import base64
import io
import re
import threading
from collections.abc import Callable
from pathlib import Path

from fedlora import untrusted
from fedlora.app.folder import ADAPTER, CURVES, MERGED, PRIVACY, ROUNDS, SUMMARY
from fedlora.check import RunError

MARK, PIECE = "fedlora", 48_000  # bytes of a file in one line
HOME = (PRIVACY, ADAPTER, MERGED, CURVES, SUMMARY)  # what goes back besides the rounds; the mark of the end comes last
# Within the two folders: no name that a program would run or unpickle.
WITHIN = re.compile(
    rf"({ADAPTER}|{MERGED})(/\w[\w.-]{{0,127}}){{0,3}}/\w[\w.-]{{0,127}}\.(safetensors|json|txt|model|jinja|md|vocab|bpe)", re.A
)
LONGEST_TEXT, LONGEST_LINE = 4000, 2**24  # characters that are shown of a line; and that a line, such as a round, may have
MOST_BYTES = 2**32  # of all files of a run


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
    """Reads what a `Sender` says out of a log that anybody may have written.

    Guarantee: `say` gets one line of printable characters; `row` a text of `LONGEST_LINE` characters at most; `file` a name
    that a run's results have, within their folder, and `most_bytes` bytes at most of all files together. Whatever else comes
    under our mark raises RunError.
    """

    def __init__(
        self,
        say: Callable[[str], object],
        row: Callable[[str], object],
        file: Callable[[str, bytes], object],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.say, self.row, self.file, self.most_bytes = say, row, file, most_bytes
        self._read = self._held = 0
        self._parts: dict[str, bytearray] = {}

    def take(self, line: str) -> bool:
        """Acts on a line of the log; whether it was one of ours."""
        words = line.rstrip("\n").split(" ", 3)
        if words[0] != MARK or len(words) < 3 or not words[1].isdecimal() or len(words[1]) > 18:
            return False
        if int(words[1]) == self._read:
            self._read += 1
            self._act(words[2], words[3] if len(words) > 3 else "")
        return True

    def _act(self, kind: str, rest: str) -> None:
        name, _, piece = rest.partition(" ")
        if kind == "say":
            self.say(untrusted.text(rest, LONGEST_TEXT))
        elif kind == "row":
            if len(rest) >= LONGEST_LINE:
                raise RunError(
                    f"the server sent a round of {LONGEST_LINE} characters or more; look into its folder of this run"
                )
            self.row(rest)
        elif kind == "part":
            self._part(_known(name), piece)
        elif kind == "end":
            self.file(_known(name), bytes(self._parts.pop(name, b"")))
        else:
            raise RunError(f"the server sent a line of the unknown kind {untrusted.text(kind, 20)}; has it another fedlora?")

    def _part(self, name: str, piece: str) -> None:
        try:
            content = base64.b64decode(piece, validate=True)
        except ValueError as error:  # other characters than ASCII too
            raise RunError(f"the server sent a piece of {name} that is no base64; look into its folder of this run") from error
        self._held += len(content)
        if len(content) > PIECE or self._held > self.most_bytes:
            most = f"{PIECE} bytes in a piece or {self.most_bytes} in all"
            raise RunError(f"the server sent more of {name} than {most}; look into its folder of this run")
        self._parts.setdefault(name, bytearray()).extend(content)


def _known(name: str) -> str:
    """The name, if it is one of a run's files. Raises RunError for any other."""
    if name in (PRIVACY, CURVES, SUMMARY) or WITHIN.fullmatch(name):
        return name
    raise RunError(
        f"the server sent a file named {untrusted.text(name, 100)}, which is none of a run's or lies outside the results folder"
    )
